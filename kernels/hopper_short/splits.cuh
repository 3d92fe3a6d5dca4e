/*
 * splits.cuh - the keys of a row tile shared by a cluster of blocks: who takes which, and how their parts are joined.
 *
 * A part is what a warp holds at the end: out [HEAD_DIM / 2] of each thread, and of its two rows the reference and the
 * sum. The blocks share that work, too: each joins the parts of a few warps' rows, and writes them. So parts travel in
 * all directions at once. A warp joins its own part and the others' in the order of their ranks, so the result is the
 * same each time. A thread's part goes to the same thread, four numbers at a time in rows of 32, so that a warp writes
 * and reads in one piece; a barrier of the joining block counts the bytes.
 */
#ifndef FC_HOPPER_SHORT_SPLITS_CUH
#define FC_HOPPER_SHORT_SPLITS_CUH

#include "common/ptx.cuh"
#include "common/variant.h"
#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"

namespace fc {

constexpr int FOURS = HEAD_DIM / 8; /* of out */
using part = float4[FOURS + 1][32];
static_assert(sizeof(part) == FC_HOPPER_SHORT_PART_BYTES(HEAD_DIM), "the planner reserves room");

/* Rows are joined warp by warp: a rank's are as many warps as come to it, or one of several ranks has one. */
constexpr int WARPS = THREADS / 32;
struct joining {
    int num_splits; /* a power of two */
    int warps_each; /* of a rank that joins any */

    explicit joining(int num_splits)
        : num_splits(num_splits), warps_each((int)fc_hopper_short_joined_warps(WARPS, num_splits))
    {
    }
    /* The rank that joins a warp's rows. */
    __device__ __forceinline__ int rank_of(int warp) const { return warp * num_splits / WARPS; }
    /* Where, there, the parts of this warp's rows begin, which the other ranks send. */
    __device__ __forceinline__ int first_part(int warp) const { return (warp & (warps_each - 1)) * (num_splits - 1); }
    /* How many parts a rank gets. */
    __device__ __forceinline__ int parts_of(int rank) const
    {
        return (rank * WARPS & (num_splits - 1)) == 0 ? warps_each * (num_splits - 1) : 0;
    }
};

/* Of a tile's keys those of one rank: the last tiles are rank 0's, and a late rank may get none. */
__device__ __forceinline__ void take_share(tile_work &work, int rank, const fast_divisor &by_splits)
{
    const int share = (int)by_splits.divide((uint32_t)(work.end - work.first) + by_splits.divisor - 1);
    work.end = max(work.first, work.end - rank * share);
    work.first = max(work.first, work.end - share);
}

/* to, full: addresses in the shared memory of the block that joins. */
__device__ __forceinline__ void send_part(const float (&out)[HEAD_DIM / 2], const online_softmax &softmax, uint32_t to,
                                          uint32_t full)
{
    to += threadIdx.x % 32 * sizeof(float4);
#pragma unroll
    for (int i = 0; i < FOURS; i++)
        st_async(to + i * 32 * sizeof(float4), full, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    st_async(to + FOURS * 32 * sizeof(float4), full, softmax.reference[0], softmax.reference[1], softmax.sum[0],
             softmax.sum[1]);
}

__device__ __forceinline__ void join_part(float (&out)[HEAD_DIM / 2], online_softmax &softmax, const part &other,
                                          float unit_log2)
{
    const float4 last = other[FOURS][threadIdx.x % 32];
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
        const float4 four = other[i][threadIdx.x % 32];
        out[4 * i] = out[4 * i] * own_shrink[0] + four.x * other_shrink[0];
        out[4 * i + 1] = out[4 * i + 1] * own_shrink[0] + four.y * other_shrink[0];
        out[4 * i + 2] = out[4 * i + 2] * own_shrink[1] + four.z * other_shrink[1];
        out[4 * i + 3] = out[4 * i + 3] * own_shrink[1] + four.w * other_shrink[1];
    }
}

} // namespace fc

#endif /* FC_HOPPER_SHORT_SPLITS_CUH */
