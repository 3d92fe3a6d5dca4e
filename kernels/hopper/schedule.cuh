/*
 * schedule.cuh - which tile of the output a block works on next, and which tiles of keys that one sees.
 *
 * As many blocks as the GPU has multiprocessors share the tiles, dealt out like cards in turns of opposite
 * direction: 0 1 2 | 2 1 0 | ... Under a causal mask the rows of a head count down, so that costs fall linearly with
 * the number dealt; then every pair of turns costs every block the same, with no counter in memory to fetch work from.
 *
 * Heads come in groups of heads_at_once, whose keys and values stay in the L2 cache meanwhile.
 */
#ifndef FC_HOPPER_SCHEDULE_CUH
#define FC_HOPPER_SCHEDULE_CUH

#include <stdint.h>

#include "common/variant.h"
#include "kernels.h"

namespace fc {

struct tile_work {
    int batch, head, head_kv, row; /* rows row .. row + BLOCK_M - 1 */
    int first, end;                /* tiles of BLOCK_N keys first .. end - 1 hold all that they see */
};

struct tile_shape {
    uint32_t num_tiles, row_tiles, heads_at_once;
};

__device__ __forceinline__ bool next_tile(const fc_forward_args &args, const tile_shape &shape, uint32_t &turn,
                                          tile_work &work)
{
    const uint32_t place = turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const uint32_t tile = turn++ * gridDim.x + place;
    if (tile >= shape.num_tiles) return false;

    const uint32_t group = tile / (shape.heads_at_once * shape.row_tiles);
    const uint32_t in_group = tile - group * shape.heads_at_once * shape.row_tiles;
    const uint32_t first_head = group * shape.heads_at_once, num_heads = (uint32_t)args.num_heads_q;
    const uint32_t heads = min(shape.heads_at_once, (uint32_t)args.batch * num_heads - first_head);
    const uint32_t row_tile = in_group / heads;
    const uint32_t head = first_head + in_group - row_tile * heads;
    work.batch = (int)(head / num_heads);
    work.head = (int)(head - (uint32_t)work.batch * num_heads);
    work.head_kv = work.head / ((int)num_heads / (int)args.num_heads_kv);
    work.row = (int)((shape.row_tiles - 1 - row_tile) * BLOCK_M);

    int first_key = 0, end_key = (int)args.seqlen_k;
    if (MASK != mask_class::full) {
        const int64_t last_row = min(work.row + BLOCK_M, (int)args.seqlen_q) - 1;
        first_key = (int)max((int64_t)0, work.row + args.band_left);
        end_key = (int)min(args.seqlen_k, last_row + args.band_right + 1);
    }
    work.first = first_key / BLOCK_N;
    work.end = end_key > first_key ? (end_key + BLOCK_N - 1) / BLOCK_N : work.first;
    return true;
}

/* What one warpgroup's 64 rows see of their tile's keys. */
struct rows_view {
    int end;                    /* tiles work.first .. end - 1; none where the rows lie past the array */
    int first_whole, end_whole; /* all rows see all of these tiles: first_whole .. end_whole - 1 */

    __device__ __forceinline__ rows_view(const fc_forward_args &args, const tile_work &work, int warpgroup)
    {
        const int first_row = work.row + 64 * warpgroup, last_row = min(first_row + 63, (int)args.seqlen_q - 1);
        int64_t end_key = args.seqlen_k, end_whole_key = args.seqlen_k, first_whole_key = 0;
        if (MASK != mask_class::full) {
            end_key = min(end_key, last_row + args.band_right + 1);
            end_whole_key = max((int64_t)0, min(end_whole_key, first_row + args.band_right + 1));
            first_whole_key = max((int64_t)0, last_row + args.band_left);
        }
        end = first_row < args.seqlen_q && end_key > 0 ? (int)((end_key + BLOCK_N - 1) / BLOCK_N) : 0;
        end_whole = max(work.first, (int)(end_whole_key / BLOCK_N));
        first_whole = max(work.first, (int)((first_whole_key + BLOCK_N - 1) / BLOCK_N));
    }
};

} // namespace fc

#endif /* FC_HOPPER_SCHEDULE_CUH */
