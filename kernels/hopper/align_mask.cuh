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

constexpr int ALIGN_THREADS = 256, MOST_ALIGN_BLOCKS = 132 * 8; /* a few on each multiprocessor */

struct align_params {
    fc_tensor mask, copy;
    int64_t num_rows, rows, heads; /* in all; of a head; of a batch */
    int columns;
};

/* A block copies one row after another. Number: of the mask's size. */
template <class Number>
static __global__ __launch_bounds__(ALIGN_THREADS) void align_kernel(const __grid_constant__ align_params params)
{
    for (int64_t i = blockIdx.x; i < params.num_rows; i += gridDim.x) {
        const int64_t row = i % params.rows, head = i / params.rows % params.heads,
                      batch = i / params.rows / params.heads;
        const Number *from = row_of<const Number>(params.mask, batch, head, row);
        Number *to = row_of<Number>(params.copy, batch, head, row);
        for (int column = threadIdx.x; column < params.columns; column += ALIGN_THREADS)
            to[column] = from[column * params.mask.strides[3]];
    }
}

/* Begins the copy, and puts it in the mask's place. A template, so that only rows with masks have the kernels. */
template <mask_class> static cudaError_t align_mask(fc_forward_args *args, void *workspace, void *stream)
{
    const fc_tensor &mask = args->attn_mask;
    const fc_mask_copy copy = fc_mask_copy_of(args);
    const int64_t bytes = fc_dtype_bytes(mask.dtype), pitch = copy.row_bytes / bytes;
    const int64_t num_rows = copy.batch * copy.heads * args->seqlen_q;
    align_params params = {mask, mask, num_rows, args->seqlen_q, copy.heads, (int)args->seqlen_k};
    params.copy.data = workspace;
    params.copy.strides[0] = mask.strides[0] == 0 ? 0 : copy.heads * args->seqlen_q * pitch;
    params.copy.strides[1] = mask.strides[1] == 0 ? 0 : args->seqlen_q * pitch;
    params.copy.strides[2] = pitch;
    params.copy.strides[3] = 1;
    const launch_shape shape = {params.num_rows < MOST_ALIGN_BLOCKS ? params.num_rows : MOST_ALIGN_BLOCKS,
                                ALIGN_THREADS, 0, 0};
    args->attn_mask = params.copy;
    return bytes == 1   ? launch<align_kernel<uint8_t>>(shape, stream, params)
           : bytes == 2 ? launch<align_kernel<uint16_t>>(shape, stream, params)
                        : launch<align_kernel<uint32_t>>(shape, stream, params);
}

} // namespace fc

#endif /* FC_HOPPER_ALIGN_MASK_CUH */
