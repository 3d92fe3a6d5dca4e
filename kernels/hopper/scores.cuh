/*
 * scores.cuh - from the q.k of a wgmma result to scores, and which of them are hidden.
 *
 * A thread's s [BLOCK_N / 2] is of two rows, g and g + 8, and of the key pairs 8 i + 2 t, 8 i + 2 t + 1 (wgmma.cuh).
 * Hidden scores become -inf, and so weigh 0 in the softmax.
 */
#ifndef FC_HOPPER_SCORES_CUH
#define FC_HOPPER_SCORES_CUH

#include <math.h>

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/schedule.cuh"
#include "hopper/softmax.cuh"

namespace fc {

/* A bit for each of a row's BLOCK_N / 4 numbers in a thread, set where the number's column is below `end`, which is
 * relative to the thread's first one. The assembler turns tests of such bits into few instructions. */
__device__ __forceinline__ uint32_t columns_below(int end)
{
    static_assert(BLOCK_N / 4 <= 32, "a bit each");
    const int whole = max(0, min(end, BLOCK_N)) / 8, count = 2 * whole + max(0, min(end - 8 * whole, 2));
    return count < 32 ? (1u << count) - 1 : 0xffffffffu;
}

/* The same of columns first .. end - 1. */
__device__ __forceinline__ uint32_t columns_between(int first, int end)
{
    return columns_below(end) & ~columns_below(first);
}

/* What the band and the end of the keys leave of row g + 8 r. row: this thread's first; key: the tile's, plus 2 t. */
__device__ __forceinline__ uint32_t visible_columns(const schedule &all, int row, int key, int r)
{
    const int corner = row + 8 * r - key, end = all.seqlen_k - key;
    if (MASK == mask_class::full) return columns_below(end);
    return columns_between(corner + all.band_left, min(end, corner + all.band_right + 1));
}

/* visible: a bit for each of the row's numbers in this thread. */
__device__ __forceinline__ void hide(float (&s)[BLOCK_N / 2], int r, uint32_t visible)
{
#pragma unroll
    for (int c = 0; c < BLOCK_N / 4; c++)
        if (!(visible >> c & 1)) s[4 * (c / 2) + 2 * r + c % 2] = -INFINITY;
}

/* tanh within some 2^-22 of itself, without a branch. Beyond 0.6 by tanh(x) = 1 - 2 / (exp(2 x) + 1), which below would
 * cancel; there x times a polynomial in x^2, fitted to tanh(x) / x with a relative error of 3e-9. */
__device__ __forceinline__ float tanh_both(float x)
{
    const float t = x * x;
    float ratio = -0.005845389794558287f;
    ratio = fmaf(ratio, t, 0.02074749395251274f);
    ratio = fmaf(ratio, t, -0.05376675724983215f);
    ratio = fmaf(ratio, t, 0.13331663608551025f);
    ratio = fmaf(ratio, t, -0.3333328068256378f);
    ratio = fmaf(ratio, t, 1.0f);
    const float large = fmaf(-2, rcp_approx_ftz(ex2_approx_ftz(x * (2 * LOG2_E)) + 1), 1);
    return fabsf(x) < 0.6f ? x * ratio : large;
}

/* s - slope * |key - row - diagonal|. distance: that of this thread's first number, before its absolute value. */
__device__ __forceinline__ void take_distance(float (&s)[BLOCK_N / 2], float slope, float distance)
{
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i++)
        s[i] = fmaf(-slope, fabsf(distance + (float)(8 * (i / 4) + i % 2 - 8 * (i / 2 % 2))), s[i]);
}

} // namespace fc

#endif /* FC_HOPPER_SCORES_CUH */
