/*
 * out.cuh - from a warpgroup's finished registers to out and lse.
 *
 * In a wgmma result a row's neighbours lie two by two in the four lanes of a quad. The quad trades them, so that each
 * lane gets eight in a row, which one 16-byte store writes: nothing passes through shared memory, and
 * nothing waits. Where out's strides forbid such a store, each lane writes its own elements.
 */
#ifndef FC_HOPPER_OUT_CUH
#define FC_HOPPER_OUT_CUH

#include "common/offsets.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/quad.cuh"
#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"

namespace fc {

/* row: of this thread's first one. out: not yet divided by the sums. */
template <class T>
__device__ __forceinline__ void write_out(float (&out)[HEAD_DIM / 2], const online_softmax &softmax, float unit_log2,
                                          const fc_forward_args &args, const tile_work &work, int row)
{
    using element = typename T::element;
    const int lane = threadIdx.x % 4;
    const fc_tensor &to = args.out;
    const int64_t strides = to.strides[0] | to.strides[1] | to.strides[2] | args.head_dim_v;
    const bool eights = to.strides[3] == 1 && strides % 8 == 0 && (uintptr_t)to.data % 16 == 0;
#pragma unroll
    for (int r = 0; r < 2; r++, row += 8) {
        float max = softmax.reference[r] * (unit_log2 / LOG2_E), shrink = 1; /* in natural units */
        float sum = quad_sum(softmax.sum[r]);
        const bool saw_none = sum == 0;
        if (MASK == mask_class::general && args.sinks.dtype != FC_NONE) {
            const float sink = head_value<T>(args.sinks, work.batch, work.head);
            const float new_max = fmaxf(max, sink), finite = new_max == -INFINITY ? 0.0f : new_max;
            shrink = ex2_approx_ftz((max - finite) * LOG2_E);
            sum = sum * shrink + ex2_approx_ftz((sink - finite) * LOG2_E);
            max = new_max;
        }
        if (row < args.seqlen_q && lane == 0 && args.lse.dtype != FC_NONE)
            *row_of<float>(args.lse, work.batch, work.head, row) = sum == 0 ? -INFINITY : max + logf(sum);

        const float factor = shrink * rcp_approx_ftz(sum);
        uint32_t pairs[HEAD_DIM / 8];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++)
            pairs[i] = pack<T>(out[4 * i + 2 * r] * factor, out[4 * i + 2 * r + 1] * factor);
        if (__any_sync(0xffffffffu, saw_none)) { /* 0 / 0, or a hidden NaN */
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) pairs[i] = saw_none ? 0 : pairs[i];
        }
        element *out_row = row_of<element>(to, work.batch, work.head, row);
        if (eights) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) {
                const uint4 eight = quad_transpose(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
                const int column = 32 * i + 8 * lane;
                if (row < args.seqlen_q && column < args.head_dim_v) *(uint4 *)(out_row + column) = eight;
            }
        } else if (row < args.seqlen_q) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) {
                const int column = 8 * i + 2 * lane;
                if (column < args.head_dim_v) out_row[column * to.strides[3]] = (element)pairs[i];
                if (column + 1 < args.head_dim_v) out_row[(column + 1) * to.strides[3]] = (element)(pairs[i] >> 16);
            }
        }
    }
}

} // namespace fc

#endif /* FC_HOPPER_OUT_CUH */
