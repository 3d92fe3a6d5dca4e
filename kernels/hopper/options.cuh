/*
 * options.cuh - what the options of a general call make of a tile's q.k, before the softmax.
 *
 *     score = softcap(scale * q.k) + attn_mask - slope * |key - row - diagonal|
 *
 * where the band and the mask leave the key visible, else -inf. fetch() of a tile is best called a tile ahead.
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

/* Scores stay in units of scale, which the exponential's factor takes in, unless something is added to them. */
__device__ __forceinline__ bool are_natural(const fc_forward_args &args, const option_params &options)
{
    if (MASK != mask_class::general) return false;
    const bool adds_bias = args.attn_mask.dtype != FC_NONE && args.attn_mask.dtype != FC_BOOL;
    return options.softcap != 0 || adds_bias || !(options.scale > 0) || args.alibi_slopes.dtype != FC_NONE;
}
__device__ __forceinline__ float unit_of_scores(const fc_forward_args &args, const option_params &options)
{
    return are_natural(args, options) ? 1 : options.scale;
}

/* Of a thread's two rows in one tile of the output. */
template <class T, bool KEEPS_TWO> struct score_options {
    __device__ __forceinline__ score_options(const fc_forward_args &args, const option_params &options,
                                             const schedule &all, const tile_work &work, int row)
        : args(args), options(options), all(all), row(row), mask(args.attn_mask, all, work, row), slope(0)
    {
        if (args.alibi_slopes.dtype != FC_NONE) slope = head_value<T>(args.alibi_slopes, work.batch, work.head);
    }

    __device__ __forceinline__ void fetch(int tile) { mask.fetch(tile * BLOCK_N); }

    /* Whether the mask shows this thread any of the tile that was fetched. */
    __device__ __forceinline__ bool resolve(int tile) { return mask.resolve(tile * BLOCK_N); }

    /* is_cut: the band or the end of the keys hides some of the tile. */
    __device__ __forceinline__ void apply(float (&s)[BLOCK_N / 2], int tile, bool is_cut) const
    {
        const int column = tile * BLOCK_N + threadIdx.x % 4 * 2;
        if (options.softcap != 0) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; i++) s[i] = options.softcap * tanh_both(s[i] * options.inner);
        }
        if (are_natural(args, options)) mask.add(s, options.softcap != 0 ? 1 : options.scale, tile * BLOCK_N);
        if (args.alibi_slopes.dtype != FC_NONE) take_distance(s, slope, (float)(column - row - options.diagonal));
        if (!is_cut && args.attn_mask.dtype == FC_NONE) return;
        uint32_t visible[2] = {mask.visible[0], mask.visible[1]};
        if (is_cut) {
            visible[0] &= visible_columns(all, row, column, 0);
            visible[1] &= visible_columns(all, row, column, 1);
        }
        if (!__all_sync(0xffffffffu, are_all_visible(visible[0] & visible[1]))) {
            hide(s, 0, visible[0]);
            hide(s, 1, visible[1]);
        }
    }

  private:
    const fc_forward_args &args;
    const option_params &options;
    const schedule &all;
    const int row; /* this thread's first */
    attn_mask_tile<T, KEEPS_TWO> mask;
    float slope;
};

} // namespace fc

#endif /* FC_HOPPER_OPTIONS_CUH */
