/*
 * options.cuh - what the options of a call with masks make of a tile's q.k, before the softmax.
 *
 *     score = softcap(scale * q.k) + attn_mask - slope * |key - row - diagonal|
 *
 * where the band and the mask leave the key visible, else -inf.
 */
#ifndef FC_HOPPER_OPTIONS_CUH
#define FC_HOPPER_OPTIONS_CUH

#include "common/offsets.cuh"
#include "common/variant.h"
#include "hopper/attn_mask.cuh"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/softmax.cuh"

namespace fc {

/* A call's numbers, made on the host: a GPU divides doubles in hundreds of cycles. */
struct option_params {
    float softcap, inner, scale; /* softcap * tanh(inner * q.k), or scale * q.k */
    int diagonal;

    explicit option_params(const fc_forward_args &args)
        : softcap((float)args.softcap), inner(args.softcap != 0 ? (float)(args.scale / args.softcap) : 0),
          scale((float)args.scale), diagonal(schedule::clamp(args.diagonal))
    {
    }
};

/* Scores stay in units of scale, which the exponential's factor takes in, unless something is added to them: in general
 * calls, and in biased ones where the mask adds anything (adds_mask) to this tile of rows. */
constexpr bool IS_GENERAL = MASK == mask_class::general;
__device__ __forceinline__ float unit_of_scores(const option_params &options, bool adds_mask)
{
    return IS_GENERAL || (MASK == mask_class::biased && adds_mask) ? 1 : options.scale;
}

/* Of a thread's two rows in one tile of the output. MaskTiles: mask_tiles. */
template <class T, class MaskTiles> struct score_options {
    __device__ __forceinline__ score_options(const fc_forward_args &args, const option_params &options,
                                             const schedule &all, const MaskTiles &masks, const tile_work &work,
                                             int row)
        : args(args), options(options), all(all), masks(masks), row(row), slope(0)
    {
        if (IS_GENERAL && args.alibi_slopes.dtype != FC_NONE)
            slope = head_value<T>(args.alibi_slopes, work.batch, work.head);
    }

    /* is_cut: the band, the end of the keys or left() hides some of the tile: called with this thread's first column,
     * that gives a bit for each of its columns that are left to all rows (columns_below). shows, mask, first_row: as
     * mask_tiles::add() takes them. */
    template <class Left>
    __device__ __forceinline__ void apply(float (&s)[BLOCK_N / 2], int tile, bool is_cut, Left left, shown shows,
                                          const uint8_t *mask, int first_row) const
    {
        const int column = tile * BLOCK_N + threadIdx.x % 4 * 2;
        if (IS_GENERAL) {
            if (options.softcap != 0) {
#pragma unroll
                for (int i = 0; i < BLOCK_N / 2; i++) s[i] = options.softcap * tanh_both(s[i] * options.inner);
            }
            masks.add(s, options.softcap != 0 ? 1 : options.scale, shows, mask, first_row);
            if (args.alibi_slopes.dtype != FC_NONE) take_distance(s, slope, (float)(column - row - options.diagonal));
        }
        if (shows != shown::all) {
            if (MASK == mask_class::biased) masks.add(s, options.scale, shows, mask, first_row);
            if (is_of_bools(args.attn_mask)) masks.hide(s, mask, first_row);
        }
        if (!is_cut) return;
        const uint32_t columns = left(column);
#pragma unroll
        for (int r = 0; r < 2; r++) hide(s, r, visible_columns(all, row, column, r) & columns);
    }

  private:
    const fc_forward_args &args;
    const option_params &options;
    const schedule &all;
    const MaskTiles &masks;
    const int row; /* this thread's first */
    float slope;
};

} // namespace fc

#endif /* FC_HOPPER_OPTIONS_CUH */
