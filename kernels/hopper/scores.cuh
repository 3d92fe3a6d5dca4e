/*
 * scores.cuh - from the q.k of a wgmma result to scores, and which of them are hidden.
 *
 * A thread's s [BLOCK_N / 2] is of two rows, g and g + 8, and of the key pairs 8 i + 2 t, 8 i + 2 t + 1 (wgmma.cuh).
 * Hidden scores become -inf, and so weigh 0 in the softmax.
 */
#ifndef FC_HOPPER_SCORES_CUH
#define FC_HOPPER_SCORES_CUH

#include <math.h>

#include "common/mask.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/schedule.cuh"

namespace fc {

/* A bit for each of a row's BLOCK_N / 4 numbers in a thread, set where the number's column is below `end`, which is
 * relative to the thread's first one. The assembler turns tests of such bits into few instructions. */
__device__ __forceinline__ uint32_t columns_below(int end)
{
    static_assert(BLOCK_N / 4 <= 32, "a bit each");
    const int whole = max(0, min(end, BLOCK_N)) / 8, count = 2 * whole + max(0, min(end - 8 * whole, 2));
    return count < 32 ? (1u << count) - 1 : 0xffffffffu;
}

/* Hides what the band and the end of the keys hide. row: this thread's first one; key: the tile's first one, plus 2 t.
 */
__device__ __forceinline__ void hide_outside(float (&s)[BLOCK_N / 2], const schedule &all, int row, int key)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int corner = row + 8 * r - key;
        int end = all.seqlen_k - key;
        if (MASK != mask_class::full) end = min(end, corner + all.band_right + 1);
        uint32_t visible = columns_below(end);
        if (MASK != mask_class::full) visible &= ~columns_below(corner + all.band_left);
#pragma unroll
        for (int c = 0; c < BLOCK_N / 4; c++)
            if (!(visible >> c & 1)) s[4 * (c / 2) + 2 * r + c % 2] = -INFINITY;
    }
}

/* Adds a float mask, or hides what a bool mask denies, where the problem has keys and rows at all. */
template <class M, bool IS_BOOL>
__device__ __forceinline__ void apply_attn_mask(float (&s)[BLOCK_N / 2], const fc_forward_args &args, int batch,
                                                int head, int row, int key)
{
    const fc_tensor &mask = args.attn_mask;
    const typename M::element *corner =
        row_of<const typename M::element>(mask, batch, head, row) + key * mask.strides[3];
    const int rows = (int)min((int64_t)BLOCK_M, args.seqlen_q - row);
    const int keys = (int)min((int64_t)BLOCK_N, args.seqlen_k - key);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (8 * r >= rows) continue;
#pragma unroll
        for (int c = 0; c < BLOCK_N / 4; c++) {
            const int column = 8 * (c / 2) + c % 2;
            float &x = s[4 * (c / 2) + 2 * r + c % 2];
            if (column >= keys) continue;
            const typename M::element given = corner[8 * r * mask.strides[2] + column * mask.strides[3]];
            if (IS_BOOL) {
                if (given == 0) x = -INFINITY;
            } else {
                x += M::to_float(given);
            }
        }
    }
}

/* Every option but the band: q.k in, scores in natural units out. */
template <class T>
__device__ __forceinline__ void finish_scores(float (&s)[BLOCK_N / 2], const fc_forward_args &args, int batch, int head,
                                              int row, int key)
{
    const float scale = (float)args.scale;
    if (args.softcap != 0) {
        const float softcap = (float)args.softcap, inner = (float)(args.scale / args.softcap);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) s[i] = softcap * tanhf(s[i] * inner);
    } else {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) s[i] *= scale;
    }

    if (args.attn_mask.dtype == FC_BOOL) {
        apply_attn_mask<boolean, true>(s, args, batch, head, row, key);
    } else if (args.attn_mask.dtype == FC_FLOAT32) {
        apply_attn_mask<float32, false>(s, args, batch, head, row, key);
    } else if (args.attn_mask.dtype != FC_NONE) {
        apply_attn_mask<T, false>(s, args, batch, head, row, key);
    }

    if (args.alibi_slopes.dtype != FC_NONE) {
        const float slope = head_value<T>(args.alibi_slopes, batch, head);
        const float distance = (float)(key - row - args.diagonal);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++)
            s[i] -= slope * fabsf(distance + (float)(8 * (i / 4) + i % 2 - 8 * (i / 2 % 2)));
    }
}

} // namespace fc

#endif /* FC_HOPPER_SCORES_CUH */
