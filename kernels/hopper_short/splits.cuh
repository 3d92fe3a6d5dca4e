/*
 * splits.cuh - the keys of a row tile shared by a cluster of blocks: who takes which, and how their parts are joined.
 *
 * A part is what a thread holds at the end: out [HEAD_DIM / 2], and of its two rows the reference and the sum. Block 0
 * of the cluster joins them in the order of the ranks, so the result is the same each time. A thread's part goes to the
 * same thread, four numbers at a time in rows of THREADS, so that a warp writes and reads in one piece; a barrier of
 * block 0 counts the bytes.
 */
#ifndef FC_HOPPER_SHORT_SPLITS_CUH
#define FC_HOPPER_SHORT_SPLITS_CUH

#include "common/ptx.cuh"
#include "common/variant.h"
#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"

namespace fc {

constexpr int FOURS = HEAD_DIM / 8; /* of out */
using part = float4[FOURS + 1][THREADS];

/* Of a tile's keys those of one rank: the last tiles are rank 0's, and a late rank may get none. */
__device__ __forceinline__ void take_share(tile_work &work, int rank, const fast_divisor &by_splits)
{
    const int share = (int)by_splits.divide((uint32_t)(work.end - work.first) + by_splits.divisor - 1);
    work.end = max(work.first, work.end - rank * share);
    work.first = max(work.first, work.end - share);
}

/* to, full: addresses in the shared memory of block 0. */
__device__ __forceinline__ void send_part(const float (&out)[HEAD_DIM / 2], const online_softmax &softmax, uint32_t to,
                                          uint32_t full)
{
    to += threadIdx.x * sizeof(float4);
#pragma unroll
    for (int i = 0; i < FOURS; i++)
        st_async(to + i * THREADS * sizeof(float4), full, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    st_async(to + FOURS * THREADS * sizeof(float4), full, softmax.reference[0], softmax.reference[1], softmax.sum[0],
             softmax.sum[1]);
}

__device__ __forceinline__ void join_part(float (&out)[HEAD_DIM / 2], online_softmax &softmax, const part &other,
                                          float unit_log2)
{
    const float4 last = other[FOURS][threadIdx.x];
    const float references[2] = {last.x, last.y}, sums[2] = {last.z, last.w};
    float own_shrink[2], other_shrink[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float reference = fmaxf(softmax.reference[r], references[r]);
        own_shrink[r] = ex2_approx_ftz((softmax.reference[r] - reference) * unit_log2);
        other_shrink[r] = ex2_approx_ftz((references[r] - reference) * unit_log2);
        softmax.reference[r] = reference;
        softmax.sum[r] = softmax.sum[r] * own_shrink[r] + sums[r] * other_shrink[r];
    }
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        const float4 four = other[i][threadIdx.x];
        out[4 * i] = out[4 * i] * own_shrink[0] + four.x * other_shrink[0];
        out[4 * i + 1] = out[4 * i + 1] * own_shrink[0] + four.y * other_shrink[0];
        out[4 * i + 2] = out[4 * i + 2] * own_shrink[1] + four.z * other_shrink[1];
        out[4 * i + 3] = out[4 * i + 3] * own_shrink[1] + four.w * other_shrink[1];
    }
}

} // namespace fc

#endif /* FC_HOPPER_SHORT_SPLITS_CUH */
