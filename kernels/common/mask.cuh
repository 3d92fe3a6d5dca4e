/*
 * mask.cuh - from q.k to the score: scale, softcap, attn_mask, ALiBi, and which keys a row sees.
 *
 * A thread holds scores [ROWS][KEYS] of one tile, strided over it (struct fragment). The band and the ends of the
 * sequences are one test on small integers relative to the tile's corner; a tile that lies inside all
 * of them skips it. Every other option is one uniform branch per tile.
 */
#ifndef FC_COMMON_MASK_CUH
#define FC_COMMON_MASK_CUH

#include <math.h>

#include "common/offsets.cuh"
#include "common/types.cuh"
#include "kernels.h"

namespace fc {

/* Which of a tile's scores a thread holds: [r][c] is row `row + r * row_step`, key `key + c * key_step`; or, of a
 * transposed tile, row `row + c * row_step`, key `key + r * key_step`. */
struct fragment {
    int row, row_step, key, key_step;
    bool transposed = false;

    __device__ __forceinline__ int row_at(int r, int c) const { return row + (transposed ? c : r) * row_step; }
    __device__ __forceinline__ int key_at(int r, int c) const { return key + (transposed ? r : c) * key_step; }
};

/* What is visible of the tile whose corner is (i, j). */
struct tile_view {
    int left, right; /* the band on key - row, both counted from the corner */
    int rows, keys;  /* how much of the tile lies inside the problem */

    __device__ __forceinline__ tile_view(const fc_forward_args &args, int64_t i, int64_t j)
    {
        /* Clamped to int: no tile is near 2^30 wide, so the test does not change. */
        const int64_t far = 1 << 30;
        left = (int)max(-far, min(far, args.band_left - (j - i)));
        right = (int)max(-far, min(far, args.band_right - (j - i)));
        rows = (int)min(far, args.seqlen_q - i);
        keys = (int)min(far, args.seqlen_k - j);
    }
    __device__ __forceinline__ bool sees(int row, int key) const
    {
        return key - row >= left && key - row <= right && key < keys && row < rows;
    }
    __device__ __forceinline__ bool sees_all(int block_m, int block_n) const
    {
        return left <= 1 - block_m && right >= block_n - 1 && keys >= block_n && rows >= block_m;
    }
};

/* Keys first .. end - 1 hold all that rows row .. row + block_m - 1 may see; first >= end: they see none. */
struct key_range {
    int64_t first, end;

    __device__ __forceinline__ key_range(const fc_forward_args &args, int64_t row, int block_m)
    {
        const int64_t last_row = min(row + block_m, args.seqlen_q) - 1;
        first = max((int64_t)0, row + args.band_left);
        end = min(args.seqlen_k, last_row + args.band_right + 1);
    }
};

/* Rows first .. end - 1 are all that may see keys key .. key + block_n - 1; first >= end: there are none. */
struct row_range {
    int64_t first, end;

    __device__ __forceinline__ row_range(const fc_forward_args &args, int64_t key, int block_n)
    {
        const int64_t last_key = min(key + block_n, args.seqlen_k) - 1;
        first = max((int64_t)0, key - args.band_right);
        end = min(args.seqlen_q, last_key - args.band_left + 1);
    }
};

/* Adds a float mask, or hides what a bool mask denies. Reads it only where the key is visible. */
template <class M, bool IS_BOOL, int ROWS, int KEYS>
__device__ __forceinline__ void apply_attn_mask(float (&s)[ROWS][KEYS], const typename M::element *corner,
                                                const int64_t *strides, const tile_view &view, const fragment &at)
{
    /* Two steps and one pointer to hold, where an offset per row and key would take tens of registers. */
    const typename M::element *mask = corner + at.row * strides[2] + at.key * strides[3];
    const int64_t row_step = at.row_step * strides[2], key_step = at.key_step * strides[3];
    const int64_t next_c = at.transposed ? row_step : key_step;
    const int64_t next_r = (at.transposed ? key_step : row_step) - KEYS * next_c;
#pragma unroll
    for (int r = 0; r < ROWS; r++, mask += next_r) {
#pragma unroll
        for (int c = 0; c < KEYS; c++, mask += next_c) {
            if (!view.sees(at.row_at(r, c), at.key_at(r, c))) continue;
            if (IS_BOOL) {
                if (*mask == 0) s[r][c] = -INFINITY;
            } else {
                s[r][c] += M::to_float(*mask);
            }
        }
    }
}

/* s: q.k in; scale * q.k out, and the softcap of that. Given `gradient`, it is multiplied by softcap's derivative. */
template <int ROWS, int KEYS>
__device__ __forceinline__ void scale_scores(float (&s)[ROWS][KEYS], const fc_forward_args &args,
                                             float (*gradient)[KEYS] = nullptr)
{
    const float scale = (float)args.scale;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < KEYS; c++) s[r][c] *= scale;
    }

    if (args.softcap != 0) {
        const float softcap = (float)args.softcap;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                const float capped = tanhf(s[r][c] / softcap);
                s[r][c] = softcap * capped;
                if (gradient) gradient[r][c] *= 1 - capped * capped;
            }
        }
    }
}

/* s: as scale_scores leaves it; scores in natural units out, -inf where the row does not see the key. (i, j): the
 * tile's corner. */
template <class T, int ROWS, int KEYS>
__device__ __forceinline__ void mask_scores(float (&s)[ROWS][KEYS], const fc_forward_args &args, int64_t batch,
                                            int64_t head, int64_t i, int64_t j, int block_m, int block_n,
                                            const fragment &at)
{
    const tile_view view(args, i, j);
    if (args.attn_mask.dtype != FC_NONE) {
        const fc_tensor &mask = args.attn_mask;
        const int64_t column = j * mask.strides[3];
        if (mask.dtype == FC_BOOL) {
            apply_attn_mask<boolean, true>(s, row_of<const uint8_t>(mask, batch, head, i) + column, mask.strides, view,
                                           at);
        } else if (mask.dtype == FC_FLOAT32) {
            apply_attn_mask<float32, false>(s, row_of<const float>(mask, batch, head, i) + column, mask.strides, view,
                                            at);
        } else {
            apply_attn_mask<T, false>(s, row_of<const typename T::element>(mask, batch, head, i) + column, mask.strides,
                                      view, at);
        }
    }

    if (args.alibi_slopes.dtype != FC_NONE) {
        const float slope = head_value<T>(args.alibi_slopes, batch, head);
        const int64_t corner = j - i - args.diagonal;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                const int64_t distance = corner + at.key_at(r, c) - at.row_at(r, c);
                s[r][c] -= slope * fabsf((float)distance);
            }
        }
    }

    if (!view.sees_all(block_m, block_n)) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                if (!view.sees(at.row_at(r, c), at.key_at(r, c))) s[r][c] = -INFINITY;
            }
        }
    }
}

} // namespace fc

#endif /* FC_COMMON_MASK_CUH */
