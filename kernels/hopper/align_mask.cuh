/*
 * align_mask.cuh - attn_mask [.., seqlen_q, seqlen_k] copied so that each row begins at whole 16 bytes, for the copy
 * engine to read: where a length is odd, say, or the mask is a transposed view.
 *
 * What all batches or all heads share is copied once. The planner asks for the room (csrc/plan_hopper.c).
 */
#ifndef FC_HOPPER_ALIGN_MASK_CUH
#define FC_HOPPER_ALIGN_MASK_CUH

#include "common/launch.cuh"
#include "common/offsets.cuh"
#include "common/variant.h"
#include "kernels.h"

namespace fc {

/* A warp copies 4 rows of 128 columns, whose loads wait together, and a block ALIGN_ROWS of them: rows may be many and
 * short or few and long. */
constexpr int ALIGN_WARPS = 8, ALIGN_ROWS = 4 * ALIGN_WARPS, ALIGN_COLUMNS = 128;
constexpr int MOST_ALIGN_BLOCKS = 132 * 8; /* a few on each multiprocessor */

/* Pieces of so many rows and columns: 32 bits count all that fit in a GPU's memory. */
struct align_params {
    fc_tensor mask, copy;
    uint32_t num_pieces, pieces, wide; /* in all; of a head; side by side */
    uint32_t heads;                    /* of a batch */
    int rows, columns;
};

/* Number: of the mask's size. Rows past the end are the last, again, and columns likewise. */
template <class Number>
static __global__ __launch_bounds__(32 * ALIGN_WARPS) void align_kernel(const __grid_constant__ align_params params)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t i = blockIdx.x; i < params.num_pieces; i += gridDim.x) {
        const uint32_t piece = i % params.pieces, batch = i / params.pieces / params.heads;
        const uint32_t head = i / params.pieces % params.heads;
        const int first_row = (int)(piece / params.wide) * ALIGN_ROWS + 4 * warp;
        const int first_column = (int)(piece % params.wide) * ALIGN_COLUMNS + lane;
        Number x[4][4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const auto *from = row_of<const Number>(params.mask, batch, head, min(first_row + r, params.rows - 1));
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[r][c] = from[min(first_column + 32 * c, params.columns - 1) * params.mask.strides[3]];
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            Number *to = row_of<Number>(params.copy, batch, head, min(first_row + r, params.rows - 1));
#pragma unroll
            for (int c = 0; c < 4; c++) to[min(first_column + 32 * c, params.columns - 1)] = x[r][c];
        }
    }
}

/* Begins the copy, and puts it in the mask's place. A template, so that only rows with masks have the kernels. */
template <mask_class> static cudaError_t align_mask(fc_forward_args *args, void *workspace, void *stream)
{
    const fc_tensor &mask = args->attn_mask;
    const fc_mask_copy copy = fc_mask_copy_of(args);
    const int64_t bytes = fc_dtype_bytes(mask.dtype), pitch = copy.row_bytes / bytes;
    const int64_t down = (args->seqlen_q + ALIGN_ROWS - 1) / ALIGN_ROWS;
    const int64_t wide = (args->seqlen_k + ALIGN_COLUMNS - 1) / ALIGN_COLUMNS;
    const int64_t num_pieces = copy.batch * copy.heads * down * wide;
    align_params params = {mask,
                           mask,
                           (uint32_t)num_pieces,
                           (uint32_t)(down * wide),
                           (uint32_t)wide,
                           (uint32_t)copy.heads,
                           (int)args->seqlen_q,
                           (int)args->seqlen_k};
    params.copy.data = workspace;
    params.copy.strides[0] = mask.strides[0] == 0 ? 0 : copy.heads * args->seqlen_q * pitch;
    params.copy.strides[1] = mask.strides[1] == 0 ? 0 : args->seqlen_q * pitch;
    params.copy.strides[2] = pitch;
    params.copy.strides[3] = 1;
    const launch_shape shape = {num_pieces < MOST_ALIGN_BLOCKS ? num_pieces : MOST_ALIGN_BLOCKS, 32 * ALIGN_WARPS, 0,
                                0};
    args->attn_mask = params.copy;
    return bytes == 1   ? launch<align_kernel<uint8_t>>(shape, stream, params)
           : bytes == 2 ? launch<align_kernel<uint16_t>>(shape, stream, params)
                        : launch<align_kernel<uint32_t>>(shape, stream, params);
}

} // namespace fc

#endif /* FC_HOPPER_ALIGN_MASK_CUH */
