/*
 * forward.cu - attention forward on Hopper (sm_90a) where a head's keys and values fit in shared memory: float16 and
 * bfloat16, on the tensor cores.
 *
 *     query [BLOCK_M, head_dim], key [seqlen_k, head_dim], value [seqlen_k, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * A block computes one tile of BLOCK_M query rows, 64 a warpgroup. All that it needs is asked for at once, in the order
 * of its use, and never replaced, but for attn_mask, of which each warp brings its rows tile by tile; so there are no
 * copying warps, and each barrier but mask_come completes once. A multiprocessor holds several blocks, and while one
 * waits for its copies another computes.
 *
 * The trick is not to wait twice. Behind a kernel that lets it in early a block is set up while that one still runs
 * (dependent launch); behind others one warp asks for the copies as soon as it can. And where tiles are few, a cluster
 * of blocks shares the keys of each, and then its rows: a block joins the parts of out of some warps', which the others
 * send to its shared memory.
 *
 *     barrier         completes by                            means
 *     query_full      its copies: 1 arrival, then their bytes the tile's rows may be read
 *     key_full[i]     its copies                              tile first + i of the keys may be read
 *     value_full[i]   its copies                              likewise, of the values
 *     mask_come[w]    its copies, for each tile               warp w's rows of attn_mask may be read
 *     parts_full      the other blocks' stores                all parts of the rows that this block joins are there
 *     READY (named)   warp 0 arrives, all others wait         the barriers above are there
 *     TURN + w        warpgroup w waits, the other arrives    w may issue its products
 */
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/launch.cuh"
#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/options.cuh"
#include "hopper/out.cuh"
#include "hopper/products.cuh"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tiles.cuh"
#include "hopper/wgmma.cuh"
#include "hopper_short/splits.cuh"

using T = fc::FC_DTYPE;
using fc::at, fc::KEY_BYTES, fc::QUERY_BYTES, fc::SLABS, fc::WARPS;

constexpr int WARPGROUPS = THREADS / 128;
static_assert(BLOCK_M == 64 * WARPGROUPS, "a warpgroup computes 64 rows");

/* Named barriers (0 is __syncthreads): mbarriers are ready; and from TURN on, one a warpgroup, whose turn it is to
 * issue. */
constexpr int READY = 1, TURN = 2;

/* Two warpgroups that begin together stay together: their products end at the same time, and then neither has any to
 * run under the other's softmax. In turns, handed on when q.k is done (the first as soon as it is issued), one is
 * ahead. */
constexpr bool TAKES_TURNS = WARPGROUPS == 2;

constexpr int BLOCKS_THAT_FIT = FC_HOPPER_SHORT_WARPGROUPS(BLOCK_N, HEAD_DIM, HAS_MASKS) / WARPGROUPS;

/* A lone warpgroup's p.v goes on under its next softmax, where there are registers for weights beside those in use. */
constexpr int NUMBERS = FC_HOPPER_SHORT_NUMBERS(BLOCK_N, HEAD_DIM, HAS_MASKS) + BLOCK_N / 4;
constexpr bool OVERLAPS_P_V = WARPGROUPS == 1 && !HAS_MASKS && NUMBERS + 40 <= 65536 / THREADS / BLOCKS_THAT_FIT;

/* As many tiles of keys and values as fit beside query. */
constexpr int MOST_TILES = (FC_HOPPER_BLOCK_SMEM_BYTES - FC_HOPPER_SHORT_BARRIER_BYTES - QUERY_BYTES) / (2 * KEY_BYTES);

/* Each warp copies its own sixteen rows of a mask, one tile at a time. */
using mask_tiles = fc::mask_tiles<T, 16>;

struct key_and_value {
    T::element key[SLABS][BLOCK_N][64], value[SLABS][BLOCK_N][64];
};
struct shared_memory {
    uint64_t query_full, key_full[MOST_TILES], value_full[MOST_TILES], parts_full, mask_come[WARPS];
    uint32_t unused; /* fc::prefetch_params */
    alignas(1024) T::element query[SLABS][BLOCK_M][64];
    alignas(1024) key_and_value tiles[]; /* first + i of what the block sees, as many as the launch has room for */
};
static_assert(offsetof(shared_memory, query) == FC_HOPPER_SHORT_BARRIER_BYTES, "as the planner has it");

struct forward_params {
    CUtensorMap query, key, value;
    fc_forward_args args;
    fc::schedule schedule;
    fc::option_params options;
    fc::fast_divisor by_splits;      /* blocks of a cluster */
    fc::joining joining;             /* their rows */
    int parts_offset;                /* in shared memory, behind the tiles: fc::part [joined warps][num_splits - 1] */
    int mask_offset;                 /* and behind these, of a mask: a tile of each warp */
    fc::mask_params mask[HAS_MASKS]; /* none elsewhere: 64 bytes cost time (launch.cuh) */
};

/* By one thread: a barrier for whatever comes. */
static __device__ __forceinline__ void init_barriers(const forward_params &params, shared_memory &smem, int num_tiles,
                                                     int rank)
{
    mbarrier_init(at(smem.query_full), 1);
#pragma unroll 1
    for (int i = 0; i < num_tiles; i++) {
        mbarrier_init(at(smem.key_full[i]), 1);
        mbarrier_init(at(smem.value_full[i]), 1);
    }
    mbarrier_init(at(smem.parts_full), 1);
    if (HAS_MASKS)
        for (int w = 0; w < WARPS; w++) mbarrier_init(at(smem.mask_come[w]), mask_tiles::arrivals(*params.mask));
    fence_mbarrier_init();
    if (params.joining.num_splits > 1)
        mbarrier_arrive_expect_tx(at(smem.parts_full), params.joining.parts_of(rank) * (int)sizeof(fc::part));
}

/* Asks for everything, in the order of its use, by one thread of the warp: what several ask for at once arrives in any
 * order, and the tile that all wait for among the last. */
static __device__ __forceinline__ void load_all(const forward_params &params, shared_memory &smem,
                                                const fc::tile_work &work)
{
    if (work.first == work.end || !elect_sync()) return;
    fc::load_tile(smem.query, params.query, at(smem.query_full), work.row, work.head, work.batch);
#pragma unroll 1
    for (int j = work.end - 1; j >= work.first; j--) {
        const int i = j - work.first;
        fc::load_tile(smem.tiles[i].key, params.key, at(smem.key_full[i]), j * BLOCK_N, work.head_kv, work.batch);
        fc::load_tile(smem.tiles[i].value, params.value, at(smem.value_full[i]), j * BLOCK_N, work.head_kv, work.batch);
    }
}

static __global__
__launch_bounds__(THREADS, BLOCKS_THAT_FIT) void FC_NAME(forward_kernel)(const __grid_constant__ forward_params params)
{
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    const fc_forward_args &args = params.args;
    /* The same in all lanes, which the compiler cannot see by itself. */
    const int warp_of_block = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int warpgroup = warp_of_block / 4, warp = warp_of_block % 4, lane = threadIdx.x % 32;

    griddepcontrol_launch_dependents();
    const uint32_t tile = params.by_splits.divide(blockIdx.x);
    const int num_splits = (int)params.by_splits.divisor, rank = (int)blockIdx.x - (int)tile * num_splits;
    if (tile >= params.schedule.num_tiles) { /* holds a place until the kernels before have ended, for an even grid */
        griddepcontrol_wait();
        return;
    }
    fc::tile_work work = fc::find_work(params.schedule, tile);
    fc::take_share(work, rank, params.by_splits);
    /* Behind a kernel that does not let this one in early all wait for the first copies: the warp that asks for them
     * readies the barriers, and does not wait for the others. */
    if (warp_of_block == 0) {
        if (elect_sync()) {
            prefetch_tensormap(&params.query);
            prefetch_tensormap(&params.key);
            prefetch_tensormap(&params.value);
            init_barriers(params, smem, work.end - work.first, rank);
        }
        __syncwarp();
        bar_arrive(READY, THREADS);
    } else {
        if (threadIdx.x == 32) fc::prefetch_params(params, smem.unused);
        /* Gains up to 4% where each block has a multiprocessor and a tile 128 keys, elsewhere costs up to 20%. */
        if (BLOCK_N == 128 && threadIdx.x == 64 && gridDim.x <= nsmid()) fc::prefetch_keys(params, work);
        if (HAS_MASKS && threadIdx.x == 96 && params.mask->is_mapped) prefetch_tensormap(&params.mask->map);
        __syncwarp();
        bar_sync(READY, THREADS);
    }
    if (num_splits > 1) barrier_cluster_arrive_relaxed(); /* this block's barriers are there */
    griddepcontrol_wait();                                /* from here on memory is as the kernels before left it */
    if (warp_of_block == 0) load_all(params, smem, work);
    __syncwarp();
    if (num_splits > 1) barrier_cluster_wait(); /* the others' are, long before the first copies have come */

    const int row = work.row + 64 * warpgroup + 16 * warp + lane / 4, thread_key = lane % 4 * 2;
    const float unit = fc::unit_of_scores(params.options, HAS_MASKS), unit_log2 = unit * fc::LOG2_E;
    const uint64_t query = fc::tile_descriptor(shared_address(smem.query[0][64 * warpgroup]), BLOCK_M * 128);
    const uint64_t key = fc::tile_descriptor(shared_address(smem.tiles[0].key), BLOCK_N * 128);
    const uint64_t value = fc::tile_descriptor(shared_address(smem.tiles[0].value), BLOCK_N * 128);
    const fc::rows_view view(params.schedule, work, warpgroup);
    float s[BLOCK_N / 2], out[HEAD_DIM / 2] = {};
    uint32_t p[BLOCK_N / 4];
    fc::online_softmax softmax;
    int j = view.end - 1;

    const auto wait_turn = [&] {
        if (TAKES_TURNS) bar_sync(TURN + warpgroup, 256);
    };
    const auto end_turn = [&] {
        if (TAKES_TURNS) bar_arrive(TURN + (warpgroup ^ 1), 256);
    };
    const auto start_q_k = [&] {
        fc::wgmma_fence();
        fc::multiply_q_k<BLOCK_M>(s, query, fc::advance(key, (j - work.first) * 2 * KEY_BYTES));
    };
    const auto start_p_v = [&](int tile) {
        fc::multiply_p_v(out, p, fc::advance(value, (tile - work.first) * 2 * KEY_BYTES));
    };
    /* q.k of tile j in s -> weights in p. */
    const mask_tiles masks(args.attn_mask, *params.mask, params.schedule);
    uint8_t *const mask =
        dynamic_shared() + params.mask_offset + warp_of_block * fc::mask_tile_bytes<16>(args.attn_mask.dtype);
    const uint32_t mask_come = at(smem.mask_come[warp_of_block]);
    uint32_t mask_phase = 0;
    const int first_row = work.row + 64 * warpgroup + 16 * warp; /* of the warp */
    const auto start_mask = [&](int tile) {
        if (args.attn_mask.dtype == FC_NONE) return;
        masks.with_dtype(
            [&](auto m) { masks.template start<decltype(m)>(mask, mask_come, work, first_row, tile * BLOCK_N); });
    };
    const auto finish_mask = [&] {
        if (args.attn_mask.dtype == FC_NONE) return fc::shown::all;
        mbarrier_wait(mask_come, mask_phase);
        mask_phase ^= 1;
        return args.attn_mask.dtype == FC_BOOL ? masks.template look_at_bools<16>(mask, 0) : fc::shown::some;
    };
    const fc::score_options<T, mask_tiles> options(args, params.options, params.schedule, masks, work, row);
    const auto weigh = [&](auto is_first, auto settle) {
        const bool is_cut = (is_first || MASK != mask_class::full) && (j >= view.end_whole || j < view.first_whole);
        if constexpr (HAS_MASKS) {
            options.apply(s, j, is_cut, [](int) { return ~0u; }, finish_mask(), mask, 0);
            __syncwarp();
            if (j > view.first) start_mask(j - 1);
        } else if (is_cut) {
#pragma unroll
            for (int r = 0; r < 2; r++)
                fc::hide(s, r, fc::visible_columns(params.schedule, row, j * BLOCK_N + thread_key, r));
        }
        if constexpr (is_first && MASK != mask_class::general) softmax.take_reference(s, unit_log2);
        softmax.step<T>(s, p, out, unit_log2, settle);
    };

    fc::out_rows<T> rows;
    const auto finish = [&] { rows = fc::out_rows<T>(softmax, unit, args, work, row); };
    /* Tiles of keys that these rows do not see. */
    const auto pass = [&](int tiles) {
#pragma unroll 1
        for (; TAKES_TURNS && tiles > 0; tiles--) wait_turn(), end_turn();
    };
    if (warpgroup == 1) end_turn(); /* warpgroup 0 begins */
    if (view.first < view.end) {
        pass(work.end - view.end);
        if (HAS_MASKS) start_mask(j);
        mbarrier_wait(at(smem.query_full), 0);
        mbarrier_wait(at(smem.key_full[j - work.first]), 0);
        wait_turn();
        start_q_k();
        end_turn();
        fc::wgmma_wait<0>();
        fc::hold(s);
        weigh(std::true_type(), [] {});
        for (j--; j >= view.first; j--) {
            mbarrier_wait(at(smem.key_full[j - work.first]), 0);
            mbarrier_wait(at(smem.value_full[j + 1 - work.first]), 0);
            wait_turn();
            fc::hold(out);
            start_q_k();
            start_p_v(j + 1);
            fc::wgmma_wait<1>();
            end_turn();
            if (!OVERLAPS_P_V) fc::wgmma_wait<0>();
            fc::hold(s);
            if (!OVERLAPS_P_V) fc::hold(out);
            weigh(std::false_type(), [&] {
                if (!OVERLAPS_P_V) return;
                /* It is full, as it was before; but the assembler moves the wait behind it up over the whole softmax,
                 * and not over a loop. (keep_order() it takes for a place to wait, and moves that up.) */
                mbarrier_wait(at(smem.value_full[j + 1 - work.first]), 0);
                fc::wgmma_wait<0>();
                fc::hold(out);
                fc::hold(p);
            });
        }
        mbarrier_wait(at(smem.value_full[view.first - work.first]), 0);
        fc::hold(out);
        fc::wgmma_fence();
        start_p_v(view.first);
        finish(); /* while the last product runs */
        fc::wgmma_wait<0>();
        fc::hold(out);
        pass(view.first - work.first);
    } else {
        pass(work.end - work.first);
        finish();
    }
    if (warpgroup == 0) wait_turn(); /* takes the arrival that nobody waits for */
    if (num_splits > 1) {
        const int joiner = params.joining.rank_of(warp_of_block);
        const auto *parts = (const fc::part *)(dynamic_shared() + params.parts_offset) +
                            params.joining.first_part(warp_of_block); /* the other ranks', in their order */
        if (rank != joiner) {
            fc::send_part(out, softmax, mapa(shared_address(parts[rank - (rank > joiner)]), joiner),
                          mapa(at(smem.parts_full), joiner));
            return;
        }
        mbarrier_wait(at(smem.parts_full), 0);
#pragma unroll 1
        for (int r = 0; r < num_splits - 1; r++) fc::join_part(out, softmax, parts[r], unit_log2);
        finish();
    }
    rows.write(out, args);
    rows.write_lse(args, work, row);
}

extern "C" int FC_NAME(forward)(const fc_forward_args *args, const fc_launch *launch, void *, void *stream)
{
    const int num_splits = launch->plan.num_splits;
    const fc_hopper_short_smem smem = fc_hopper_short_smem_of(args, HEAD_DIM, BLOCK_M, BLOCK_N, num_splits);
    int smem_bytes = (int)smem.bytes;
    /* So much that no more blocks fit. Where a mask's kernel has registers to spare for one more than the planner
     * counts on, those of two calls would crowd. */
    const int most_blocks = launch->blocks_per_sm > 0 ? launch->blocks_per_sm : HAS_MASKS ? BLOCKS_THAT_FIT : 0;
    if (most_blocks > 0) smem_bytes = std::max(smem_bytes, FC_HOPPER_SM_SMEM_BYTES / most_blocks - 1024);
    const fc::schedule schedule(*args, *launch);
    forward_params params = {{},
                             {},
                             {},
                             *args,
                             schedule,
                             fc::option_params(*args),
                             fc::fast_divisor(num_splits),
                             fc::joining(num_splits),
                             (int)smem.parts_offset,
                             (int)smem.mask_offset,
                             {}};
    cudaError_t error = fc::make_tensor_maps(&params.query, &params.key, &params.value, *args, BLOCK_M);
    if (error == cudaSuccess && HAS_MASKS) error = fc::make_mask_params(params.mask, *args, 16);
    if (error != cudaSuccess) return error;
    const fc::launch_shape shape = {launch->plan.num_blocks,    THREADS,    smem_bytes,
                                    FC_HOPPER_BLOCK_SMEM_BYTES, num_splits, true};
    return fc::launch<FC_NAME(forward_kernel)>(shape, stream, params);
}
