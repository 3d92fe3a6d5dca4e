/*
 * out.cuh - from a warpgroup's finished registers to out and lse.
 *
 * In a wgmma result a row's neighbours lie two by two in the four lanes of a quad. Two ways from there to memory:
 * lay(), where there is room for the rows in shared memory: stmatrix lays them out, and the copy engine writes whole
 * lines while the warp goes on. write(), elsewhere: the quad trades neighbours, so that each lane gets eight in a row,
 * which one 16-byte store writes; or, where out's strides forbid such a store, each lane writes its own elements.
 *
 * In two steps, because the sums are known while the last product still runs: out_rows(), then lay() or write(), and
 * write_lse().
 */
#ifndef FC_HOPPER_OUT_CUH
#define FC_HOPPER_OUT_CUH

#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/quad.cuh"
#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tensor_map.cuh"

namespace fc {

/* How the copy engine reaches out, in boxes of a warpgroup's rows; is_mapped is false where it cannot, or would have to
 * write part of 16 bytes, and where blocks have two tiles or fewer on average: a block's last copies end later than
 * stores would, by 2% of such a call. */
struct out_map {
    CUtensorMap map;
    bool is_mapped;
};
static cudaError_t make_out_map(out_map *out, const fc_forward_args &args, const fc_plan &plan)
{
    out->is_mapped = plan.num_tiles > 2 * plan.num_blocks && args.head_dim_v % 8 == 0 && fc_hopper_maps(&args.out);
    if (!out->is_mapped) return cudaSuccess;
    return make_tensor_map(&out->map, args.out, args.head_dim_v, args.seqlen_q, args.num_heads_q, args.batch,
                           {128, 64});
}

/* A thread's two rows, g and g + 8. */
template <class T> struct out_rows {
    using element = typename T::element;
    element *at[2];
    float max[2], sum[2];     /* of the exponentials, in natural units, with the sink's */
    float factor[2];          /* what out is multiplied by */
    bool exists[2], shows[2]; /* in the array; any keys: or else 0 is written */
    bool any_hidden, eights;  /* of the warp's rows; may be written in eights */

    out_rows() = default;

    /* unit: of the scores, in natural ones. row: of this thread's first one. */
    __device__ __forceinline__ out_rows(const online_softmax &softmax, float unit, const fc_forward_args &args,
                                        const tile_work &work, int row)
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = quad_sum(softmax.sum[r]);
            shows[r] = sum[r] != 0;
            max[r] = shows[r] ? softmax.reference[r] * unit : -INFINITY;
            factor[r] = 1;
            exists[r] = row + 8 * r < args.seqlen_q;
            at[r] = row_of<element>(args.out, work.batch, work.head, row + 8 * r);
        }
        if (args.sinks.dtype != FC_NONE) {
            const float sink = head_value<T>(args.sinks, work.batch, work.head);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float new_max = fmaxf(max[r], sink), finite = new_max == -INFINITY ? 0.0f : new_max;
                factor[r] = ex2_approx_ftz((max[r] - finite) * LOG2_E);
                sum[r] = sum[r] * factor[r] + ex2_approx_ftz((sink - finite) * LOG2_E);
                max[r] = new_max;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) factor[r] = shows[r] ? factor[r] * rcp_approx_ftz(sum[r]) : 0;
        any_hidden = __any_sync(0xffffffffu, !shows[0] || !shows[1]);
        const fc_tensor &to = args.out;
        const int64_t strides = to.strides[0] | to.strides[1] | to.strides[2] | args.head_dim_v;
        eights = to.strides[3] == 1 && strides % 8 == 0 && (uintptr_t)to.data % 16 == 0;
    }

    /* Of a row that sees no key out may be NaN by a hidden value, or what an earlier tile left. */
    __device__ __forceinline__ void clear_hidden(float (&out)[HEAD_DIM / 2]) const
    {
        if (!any_hidden) return;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = shows[i / 2 % 2] ? out[i] : 0;
    }

    __device__ __forceinline__ void write_lse(const fc_forward_args &args, const tile_work &work, int row) const
    {
        if (args.lse.dtype == FC_NONE || threadIdx.x % 4 != 0) return;
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (exists[r])
                *row_of<float>(args.lse, work.batch, work.head, row + 8 * r) =
                    sum[r] == 0 ? -INFINITY : max[r] + logf(sum[r]);
    }

    /* Lays the warp's sixteen rows out in shared memory for the copy engine: in rows of 128 bytes from `room` on, of
     * each of the slabs, which are slab_bytes apart. */
    __device__ __forceinline__ void lay(float (&out)[HEAD_DIM / 2], uint32_t room, uint32_t slab_bytes) const
    {
        clear_hidden(out);
        const int lane = threadIdx.x % 32;
        /* Of each two groups of eight columns a lane names the place of one row of one; rows are swizzled. */
        const uint32_t place = room + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i += 2) {
            uint32_t pairs[4]; /* rows g and g + 8 of group i, then of i + 1 */
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const int r = m % 2, at = 4 * (i + m / 2) + 2 * r;
                pairs[m] = pack<T>(out[at] * factor[r], out[at + 1] * factor[r]);
            }
            stmatrix_x4((place ^ i % 8 * 16) + i / 8 * slab_bytes, pairs);
        }
        fence_proxy_async();
    }

    __device__ __forceinline__ void write(float (&out)[HEAD_DIM / 2], const fc_forward_args &args) const
    {
        clear_hidden(out);
        const int lane = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t pairs[HEAD_DIM / 8];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++)
                pairs[i] = pack<T>(out[4 * i + 2 * r] * factor[r], out[4 * i + 2 * r + 1] * factor[r]);
            if (eights) {
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 32; i++) {
                    const uint4 eight =
                        quad_transpose(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
                    const int column = 32 * i + 8 * lane;
                    if (exists[r] && column < args.head_dim_v) *(uint4 *)(at[r] + column) = eight;
                }
            } else if (exists[r]) {
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 8; i++) {
                    const int column = 8 * i + 2 * lane;
                    if (column < args.head_dim_v) at[r][column * args.out.strides[3]] = (element)pairs[i];
                    if (column + 1 < args.head_dim_v)
                        at[r][(column + 1) * args.out.strides[3]] = (element)(pairs[i] >> 16);
                }
            }
        }
    }
};

} // namespace fc

#endif /* FC_HOPPER_OUT_CUH */
