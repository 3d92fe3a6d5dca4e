/*
 * tiles.cuh - how tiles of query, key and value lie in shared memory, and how they come there.
 *
 * A tile is SLABS slabs of 64 columns, each of which the copy engine fills in one box; a head_dim below HEAD_DIM is
 * padded with zeros on the way (tensor_map.cuh).
 */
#ifndef FC_HOPPER_TILES_CUH
#define FC_HOPPER_TILES_CUH

#include "common/ptx.cuh"
#include "common/variant.h"
#include "hopper/tensor_map.cuh"

namespace fc {

constexpr int SLABS = (HEAD_DIM + 63) / 64;
constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128;
constexpr int KEY_BYTES = SLABS * BLOCK_N * 128; /* a tile of values takes as many */

/* A barrier's address. */
__device__ __forceinline__ uint32_t at(const uint64_t &barrier)
{
    return shared_address(&barrier);
}

/* One box after another of a tile, by one thread. */
template <class Element, int ROWS>
__device__ __forceinline__ void load_tile(Element (&tile)[SLABS][ROWS][64], const CUtensorMap &map, uint32_t full,
                                          int row, int head, int batch)
{
    mbarrier_arrive_expect_tx(full, sizeof(tile));
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
        cp_async_bulk_tensor(shared_address(tile[slab]), &map, full, 64 * slab, row, head, batch);
}

/* Brings keys and values that a tile will read into the L2 cache, each by one of the tiles of rows that read them. One
 * thread, before griddepcontrol_wait: what the kernel before still writes lands in the same cache. */
template <class Params> __device__ __forceinline__ void prefetch_keys(const Params &params, const tile_work &work)
{
    const int row_tiles = (int)params.schedule.row_tiles;
#pragma unroll 1
    for (int j = work.end - 1 - work.row / BLOCK_M; j >= work.first; j -= row_tiles)
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
            cp_async_bulk_prefetch_tensor(&params.key, 64 * slab, j * BLOCK_N, work.head_kv, work.batch);
            cp_async_bulk_prefetch_tensor(&params.value, 64 * slab, j * BLOCK_N, work.head_kv, work.batch);
        }
}

/* Those of a forward call's inputs, in boxes of the kernel's tiles, and of query_rows. Without keys nothing is copied;
 * the maps must be valid all the same. */
static cudaError_t make_tensor_maps(CUtensorMap *query, CUtensorMap *key, CUtensorMap *value,
                                    const fc_forward_args &args, int query_rows)
{
    cudaError_t error = make_tensor_map(query, args.query, args.head_dim, args.seqlen_q, args.num_heads_q, args.batch,
                                        {128, query_rows});
    *key = *value = *query;
    if (args.seqlen_k == 0 || error != cudaSuccess) return error;
    error = make_tensor_map(key, args.key, args.head_dim, args.seqlen_k, args.num_heads_kv, args.batch, {128, BLOCK_N});
    if (error != cudaSuccess) return error;
    return make_tensor_map(value, args.value, args.head_dim_v, args.seqlen_k, args.num_heads_kv, args.batch,
                           {128, BLOCK_N});
}

} // namespace fc

#endif /* FC_HOPPER_TILES_CUH */
