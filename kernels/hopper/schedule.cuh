/*
 * schedule.cuh - which tile of the output a block works on next, and which tiles of keys that one sees.
 *
 * As many blocks as the GPU has multiprocessors share the tiles, dealt out like cards in rounds of opposite
 * direction: 0 1 2 | 2 1 0 | ... with no counter in memory to fetch work from. Heads come in groups, the last of which
 * takes the rest, and in a group the rows of all heads count down together, or in every other one up. The planner
 * chooses the groups so that the blocks' loads come out even, and keys stay in the L2 cache meanwhile
 * (csrc/plan_hopper.c).
 */
#ifndef FC_HOPPER_SCHEDULE_CUH
#define FC_HOPPER_SCHEDULE_CUH

#include <stdint.h>

#include "common/variant.h"
#include "kernels.h"

namespace fc {

/* n / divisor for n < 2^31 as a multiplication and a shift, since a GPU divides in a hundred instructions. With
 * divisor <= 2^bits, magic is 2^(31 + bits) / divisor plus less than one, which adds less than n * 2^-(31 + bits) < 1 /
 * divisor to the quotient (Granlund and Montgomery, 1994). */
struct fast_divisor {
    uint32_t divisor, magic, shift;

    explicit fast_divisor(int64_t n = 1) : divisor((uint32_t)n), magic(0), shift(31)
    {
        while ((uint64_t)1 << (shift - 31) < divisor) shift++;
        magic = (uint32_t)(((uint64_t)1 << shift) / divisor + 1);
    }
    __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (uint32_t)((uint64_t)n * magic >> shift); }
};

/* Of a whole problem, made on the host. Its sizes fit in 30 bits; what a band leaves open is cut to as many. */
struct schedule {
    uint32_t num_tiles, row_tiles, group_tiles, num_groups;
    fast_divisor by_group_tiles, by_heads, by_last_heads, by_num_heads_q, by_heads_per_kv; /* heads: of a group */
    int seqlen_q, seqlen_k, band_left, band_right;
    bool groups_alternate;

    schedule(const fc_forward_args &args, const fc_launch &launch)
    {
        const int64_t heads = args.batch * args.num_heads_q, at_once = launch.heads_at_once;
        num_tiles = (uint32_t)launch.plan.num_tiles;
        row_tiles = (uint32_t)((args.seqlen_q + BLOCK_M - 1) / BLOCK_M);
        group_tiles = (uint32_t)(at_once * row_tiles);
        num_groups = (uint32_t)launch.num_groups;
        by_group_tiles = fast_divisor(group_tiles);
        by_heads = fast_divisor(at_once);
        by_last_heads = fast_divisor(heads - (num_groups - 1) * at_once);
        by_num_heads_q = fast_divisor(args.num_heads_q);
        by_heads_per_kv = fast_divisor(args.num_heads_q / args.num_heads_kv);
        seqlen_q = (int)args.seqlen_q;
        seqlen_k = (int)args.seqlen_k;
        band_left = clamp(args.band_left);
        band_right = clamp(args.band_right);
        groups_alternate = launch.groups_alternate;
    }

    static int clamp(int64_t x)
    {
        const int64_t most = (int64_t)1 << 30;
        return (int)(x < -most ? -most : x > most ? most : x);
    }
};

struct tile_work {
    int batch, head, head_kv, row; /* rows row .. row + BLOCK_M - 1 */
    int first, end;                /* tiles of BLOCK_N keys first .. end - 1 hold all that they see */
};

/* Which rows tile number `tile` has, and which tiles of keys they see. */
__device__ __forceinline__ tile_work find_work(const schedule &all, uint32_t tile)
{
    tile_work work;
    const uint32_t group = min(all.by_group_tiles.divide(tile), all.num_groups - 1);
    const uint32_t in_group = tile - group * all.group_tiles;
    const bool last = group + 1 == all.num_groups;
    const uint32_t heads = last ? all.by_last_heads.divisor : all.by_heads.divisor;
    const uint32_t row_tile = last ? all.by_last_heads.divide(in_group) : all.by_heads.divide(in_group);
    const uint32_t head = group * all.by_heads.divisor + in_group - row_tile * heads;
    work.batch = (int)all.by_num_heads_q.divide(head);
    work.head = (int)head - work.batch * (int)all.by_num_heads_q.divisor;
    work.head_kv = (int)all.by_heads_per_kv.divide((uint32_t)work.head);
    const bool first_rows_first = all.groups_alternate && (all.num_groups - 1 - group) % 2 != 0;
    work.row = (int)((first_rows_first ? row_tile : all.row_tiles - 1 - row_tile) * BLOCK_M);

    int first_key = 0, end_key = all.seqlen_k;
    if (MASK != mask_class::full) {
        const int last_row = min(work.row + BLOCK_M, all.seqlen_q) - 1;
        first_key = max(0, work.row + all.band_left);
        end_key = min(end_key, last_row + all.band_right + 1);
    }
    work.first = first_key / BLOCK_N;
    work.end = end_key > first_key ? (end_key + BLOCK_N - 1) / BLOCK_N : work.first;
    return work;
}

__device__ __forceinline__ bool next_tile(const schedule &all, uint32_t &round, tile_work &work)
{
    const uint32_t place = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const uint32_t tile = round++ * gridDim.x + place;
    if (tile >= all.num_tiles) return false; /* at the end, the assembler no longer sees that a warp's lanes agree */
    work = find_work(all, tile);
    return true;
}

/* What one warpgroup's 64 rows see of their tile's keys. */
struct rows_view {
    int first, end;             /* tiles first .. end - 1; none where the rows lie past the array */
    int first_whole, end_whole; /* all rows see all of these tiles: first_whole .. end_whole - 1 */

    __device__ __forceinline__ rows_view(const schedule &all, const tile_work &work, int warpgroup)
    {
        const int first_row = work.row + 64 * warpgroup, last_row = min(first_row + 63, all.seqlen_q - 1);
        int first_key = 0, end_key = all.seqlen_k, first_whole_key = 0, end_whole_key = all.seqlen_k;
        if (MASK != mask_class::full) {
            first_key = max(0, first_row + all.band_left);
            end_key = min(end_key, last_row + all.band_right + 1);
            end_whole_key = max(0, min(end_whole_key, first_row + all.band_right + 1));
            first_whole_key = max(0, last_row + all.band_left);
        }
        first = max(work.first, first_key / BLOCK_N);
        end = first_row < all.seqlen_q && end_key > 0 ? min(work.end, (end_key + BLOCK_N - 1) / BLOCK_N) : 0;
        first_whole = max(first, (first_whole_key + BLOCK_N - 1) / BLOCK_N);
        end_whole = max(first, end_whole_key / BLOCK_N);
    }

    /* All others are hidden from all rows. */
    __device__ __forceinline__ void leave_keys(int first_key, int end_key)
    {
        first_whole = max(first_whole, (first_key + BLOCK_N - 1) / BLOCK_N);
        end_whole = min(end_whole, end_key / BLOCK_N);
    }
};

} // namespace fc

#endif /* FC_HOPPER_SCHEDULE_CUH */
