/*
 * softmax.cuh - the online softmax of the rows that a group of lanes shares (Milakov and Gimelshein, 2018).
 *
 * After each tile of keys a row's max is its largest score so far, its sum that of exp(score - max), and its out is in
 * the same scale. When the maximum grows, sum and out shrink by exp(old - new). Every lane of a row would hold
 * the same max and sum; instead lane r of the group keeps those of the group's row r, in one register each.
 *
 * exp(x - m) is 2^((x - m) * log2(e)): the maximum is subtracted first, in natural units, because a mask
 * may hold finfo.min, whose product with log2(e) is infinite. The multiplication's rounding costs
 * |x - m| * 2^-24 of a term that weighs exp(x - m), at most 0.4 * 2^-24 of the row's sum.
 *
 * fmaxf skips NaN, and so NaN never becomes the maximum; it reaches sum and out through its own exp.
 */
#ifndef FC_COMMON_SOFTMAX_CUH
#define FC_COMMON_SOFTMAX_CUH

#include <math.h>

#include "common/ptx.cuh"

namespace fc {

/* exp(x - m), and 0 where x is -inf, also in a row that has seen no key yet (m is -inf). */
__device__ __forceinline__ float exp_minus(float x, float m)
{
    const float log2_e = 1.4426950408889634f;
    return ex2_approx_ftz((x - (m == -INFINITY ? 0.0f : m)) * log2_e);
}

/* LANES lanes that share rows: those that differ in lane bits 1 .. log2(LANES), bit 0 being another row. */
template <int LANES> struct row_group {
    int lane_x;     /* this lane's number in the group */
    float max, sum; /* of row lane_x */

    __device__ __forceinline__ explicit row_group(int lane) : lane_x(lane / 2 % LANES), max(-INFINITY), sum(0) {}

    /* The value that lane r of the group gives. */
    static __device__ __forceinline__ float from_lane(float x, int r)
    {
        const int lane = threadIdx.x % 32;
        return __shfl_sync(0xffffffffu, x, (lane & ~(2 * LANES - 2)) + 2 * r);
    }
    static __device__ __forceinline__ float reduce_max(float x)
    {
#pragma unroll
        for (int bit = 2; bit <= LANES; bit *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
        return x;
    }
    static __device__ __forceinline__ float reduce_sum(float x)
    {
#pragma unroll
        for (int bit = 2; bit <= LANES; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
        return x;
    }

    /* One tile: scores in s become exp(score - max), and out follows the new maximum. */
    template <int ROWS, int KEYS, int COLUMNS>
    __device__ __forceinline__ void step(float (&s)[ROWS][KEYS], float (&out)[ROWS][COLUMNS])
    {
        static_assert(ROWS <= LANES, "each row has a lane that keeps its state");
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float tile_max = s[r][0];
#pragma unroll
            for (int c = 1; c < KEYS; c++) tile_max = fmaxf(tile_max, s[r][c]);
            const float old_max = from_lane(max, r);
            const float new_max = fmaxf(old_max, reduce_max(tile_max));
            const float shrink = exp_minus(old_max, new_max);

            float tile_sum = 0;
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                s[r][c] = exp_minus(s[r][c], new_max);
                tile_sum += s[r][c];
            }
            tile_sum = reduce_sum(tile_sum);
            if (lane_x == r) {
                max = new_max;
                sum = sum * shrink + tile_sum;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) out[r][c] *= shrink;
        }
    }
};

} // namespace fc

#endif /* FC_COMMON_SOFTMAX_CUH */
