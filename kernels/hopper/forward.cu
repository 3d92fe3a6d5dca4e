/*
 * forward.cu - attention forward on Hopper (sm_90a): float16 and bfloat16, on the tensor cores.
 *
 *     query [BLOCK_M, head_dim], key [BLOCK_N, head_dim], value [BLOCK_N, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * A block stays on its multiprocessor and works on one tile of BLOCK_M query rows after another. One thread drives the
 * copy engine; two to four warpgroups of 64 rows each compute. A warpgroup walks its tiles of keys from the last to
 * the first, since the masked ones are the last, and its out never leaves its registers.
 *
 * The trick is to keep little to hide: a warpgroup issues the next tile's q.k together with this tile's p.v, waits for
 * both, and its softmax then needs no maximum (softmax.cuh), so it fits under the other warpgroups' products.
 *
 *     barrier                completes by                                            means
 *     query_full[stage]      its copies: 1 arrival, then their bytes                 query may be read
 *     query_empty[stage]     every computing warp, after the tile's last q.k         it may be overwritten
 *     key_full[stage]        its copies                                              this key tile may be read
 *     key_empty[stage]       every computing warp, after its q.k of it               it may be overwritten
 *     value_full, value_empty: likewise, p.v
 *     TURN + w (named, 256)  warpgroup w waits, warpgroup w - 1 arrives              w may issue its products
 *     VOTE + w (named, 128)  the threads of warpgroup w                              whether its rows see the tile
 */
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/launch.cuh"
#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/attn_mask.cuh"
#include "hopper/options.cuh"
#include "hopper/out.cuh"
#include "hopper/products.cuh"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tiles.cuh"
#include "hopper/wgmma.cuh"

using T = fc::FC_DTYPE;

/* One warpgroup for the copies, the others compute. */
constexpr int WARPGROUPS = THREADS / 128 - 1;
static_assert(BLOCK_M == 64 * WARPGROUPS, "a warpgroup computes 64 rows");

/* Registers per thread: those that the launch bound gives all threads (128 * 512, say, or 96 * 640), the copying
 * warpgroup's share given to the others. */
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : WARPGROUPS == 3 ? 32 : 24;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
static_assert(128 * (PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS) <= 65536 / THREADS / 8 * 8 * THREADS,
              "they fit");

/* As many stages of keys and values as fit, at most 4; where one more tile fits, of keys, which are asked for first.
 * Two of query where three of the others still fit. */
using fc::at, fc::KEY_BYTES, fc::QUERY_BYTES, fc::SLABS;
constexpr int SMEM_BYTES = 227 * 1024, BARRIER_BYTES = 256;
constexpr int QUERY_STAGES = 2 * QUERY_BYTES + 6 * KEY_BYTES + BARRIER_BYTES <= SMEM_BYTES ? 2 : 1;
constexpr int STAGES_THAT_FIT = (SMEM_BYTES - BARRIER_BYTES - QUERY_STAGES * QUERY_BYTES) / (2 * KEY_BYTES);
constexpr int VALUE_STAGES = STAGES_THAT_FIT < 4 ? STAGES_THAT_FIT : 4;
constexpr int TILES_BYTES = QUERY_STAGES * QUERY_BYTES + 2 * VALUE_STAGES * KEY_BYTES;
constexpr bool ONE_MORE_FITS = MASK != mask_class::general && TILES_BYTES + KEY_BYTES + BARRIER_BYTES <= SMEM_BYTES;
constexpr int KEY_STAGES = VALUE_STAGES < 4 && ONE_MORE_FITS ? VALUE_STAGES + 1 : VALUE_STAGES;
static_assert(VALUE_STAGES >= 2, "one tile is copied while another is read");

/* A warpgroup lets go of the keys that only later rows of the tile see, and of their values a little later. */
static_assert((BLOCK_M - 64 + BLOCK_N - 1) / BLOCK_N < VALUE_STAGES, "meanwhile the copies go on");

struct shared_memory {
    alignas(1024) T::element query[QUERY_STAGES][SLABS][BLOCK_M][64];
    alignas(1024) T::element key[KEY_STAGES][SLABS][BLOCK_N][64];
    alignas(1024) T::element value[VALUE_STAGES][SLABS][BLOCK_N][64];
    int first_shown[QUERY_STAGES], end_shown[QUERY_STAGES]; /* with query: tiles of keys that attn_mask leaves */
    uint64_t query_full[QUERY_STAGES], query_empty[QUERY_STAGES];
    uint64_t key_full[KEY_STAGES], key_empty[KEY_STAGES];
    uint64_t value_full[VALUE_STAGES], value_empty[VALUE_STAGES];
    uint32_t unused; /* fc::prefetch_params */
};
static_assert(sizeof(shared_memory) <= SMEM_BYTES, "a block's share");

struct forward_params {
    CUtensorMap query, key, value;
    fc_forward_args args;
    fc::schedule schedule;
    fc::option_params options;
};

/* Named barriers from here on, one a warpgroup: whose turn it is to issue. Three warpgroups that take turns gain 3 to
 * 7%, two lose 2%. */
constexpr int TURN = 1, VOTE = TURN + WARPGROUPS;
constexpr bool TAKES_TURNS = WARPGROUPS > 2;

/* A mask's next tile is asked for while this one is multiplied, where the registers hold both: at D64, whose tiles have
 * twice the keys, they do not. Gains 10% with a bias for each score. */
constexpr bool FETCHES_AHEAD = HEAD_DIM > 64;

/* Where a role stands in a ring of stages. */
template <int COUNT> struct ring {
    int stage = 0;
    uint32_t phase = 0; /* of the barrier that will complete next */

    __device__ __forceinline__ void next()
    {
        if (++stage == COUNT) stage = 0, phase ^= 1;
    }
};

/* The copying thread, which a mask gives a warp to search with: brings, as room becomes free, what the consumers will
 * ask for. The first keys come before query, for whose room a tile's last q.k is waited for. */
static __device__ __forceinline__ void produce(const forward_params &params, shared_memory &smem)
{
    ring<QUERY_STAGES> queries;
    ring<KEY_STAGES> keys;
    ring<VALUE_STAGES> values;
    fc::shown_keys<T> shown;
    uint32_t turn = 0;
    bool first = true;
    fc::tile_work work = {};
    const auto load_query = [&] {
        mbarrier_wait(at(smem.query_empty[queries.stage]), queries.phase ^ 1);
        if (MASK == mask_class::general) {
            smem.first_shown[queries.stage] = work.first;
            smem.end_shown[queries.stage] = work.end;
        }
        fc::load_tile(smem.query[queries.stage], params.query, at(smem.query_full[queries.stage]), work.row, work.head,
                      work.batch);
        queries.next();
    };
    for (; fc::next_tile(params.schedule, turn, work); first = false) {
        if (work.first == work.end) continue; /* the rows see no key */
        if (MASK == mask_class::general) {
            __syncwarp();
            shown.narrow(work, params.args.attn_mask, params.schedule);
            if (threadIdx.x % 32 != 0) continue;
        }
        if (work.first == work.end) load_query();
        const int before_query = QUERY_STAGES == 2 || first ? work.end - 1 : max(work.first, work.end - KEY_STAGES + 1);
        for (int j = work.end - 1; j >= work.first; j--, keys.next(), values.next()) {
            mbarrier_wait(at(smem.key_empty[keys.stage]), keys.phase ^ 1);
            fc::load_tile(smem.key[keys.stage], params.key, at(smem.key_full[keys.stage]), j * BLOCK_N, work.head_kv,
                          work.batch);
            if (j == before_query) load_query();
            mbarrier_wait(at(smem.value_empty[values.stage]), values.phase ^ 1);
            fc::load_tile(smem.value[values.stage], params.value, at(smem.value_full[values.stage]), j * BLOCK_N,
                          work.head_kv, work.batch);
        }
    }
}

/* A computing warpgroup: 64 rows of each tile. */
static __device__ __forceinline__ void consume(const forward_params &params, shared_memory &smem, int warpgroup)
{
    const fc_forward_args &args = params.args;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int thread_row = 64 * warpgroup + 16 * warp + lane / 4, thread_key = lane % 4 * 2;
    const float unit = fc::unit_of_scores(args, params.options), unit_log2 = unit * fc::LOG2_E;

    const uint64_t query = fc::tile_descriptor(shared_address(smem.query[0][0][64 * warpgroup]), BLOCK_M * 128);
    const uint64_t key = fc::tile_descriptor(shared_address(smem.key), BLOCK_N * 128);
    const uint64_t value = fc::tile_descriptor(shared_address(smem.value), BLOCK_N * 128);
    const auto wait_turn = [&] {
        if (TAKES_TURNS) bar_sync(TURN + warpgroup, 256);
    };
    const auto end_turn = [&] {
        if (TAKES_TURNS) bar_arrive(TURN + (warpgroup + 1) % WARPGROUPS, 256);
    };

    ring<QUERY_STAGES> queries;
    ring<KEY_STAGES> keys;
    ring<VALUE_STAGES> values;
    const auto wait_for = [&](const uint64_t *full, const auto &stages) {
        mbarrier_wait(at(full[stages.stage]), stages.phase);
    };
    const auto let_go = [&](const uint64_t *empty, auto &stages) {
        if (lane == 0) mbarrier_arrive(at(empty[stages.stage]));
        stages.next();
    };

    float s[BLOCK_N / 2], out[HEAD_DIM / 2] = {};
    uint32_t p[BLOCK_N / 4];
    fc::online_softmax softmax;

    /* Every tile of keys is a turn, in which a warpgroup issues: the tile's q.k, and the p.v of the tile before it as
     * far as there is one. */
    const auto start_q_k = [&] {
        fc::multiply_q_k(s, fc::advance(query, queries.stage * QUERY_BYTES), fc::advance(key, keys.stage * KEY_BYTES));
    };
    const auto start_p_v = [&] { fc::multiply_p_v(out, p, fc::advance(value, values.stage * KEY_BYTES)); };
    const auto multiply_both = [&](auto meanwhile) {
        wait_for(smem.key_full, keys);
        wait_for(smem.value_full, values);
        wait_turn();
        fc::hold(out);
        fc::wgmma_fence();
        start_q_k();
        start_p_v();
        end_turn();
        meanwhile();
        fc::wgmma_wait<0>();
        fc::hold(s);
        fc::hold(out);
        let_go(smem.key_empty, keys);
        let_go(smem.value_empty, values);
    };
    const auto multiply_first = [&](auto meanwhile) {
        wait_for(smem.key_full, keys);
        wait_turn();
        fc::wgmma_fence();
        start_q_k();
        end_turn();
        if (MASK != mask_class::general) { /* now, while the product runs */
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
        }
        meanwhile();
        fc::hold(out);
        fc::wgmma_wait<0>();
        fc::hold(s);
        let_go(smem.key_empty, keys);
    };
    const auto multiply_last = [&](auto meanwhile) {
        wait_for(smem.value_full, values);
        fc::hold(out);
        fc::wgmma_fence();
        start_p_v();
        meanwhile();
        fc::wgmma_wait<0>();
        fc::hold(out);
        let_go(smem.value_empty, values);
    };
    /* A tile that none of these rows sees is let go unread. */
    const auto pass_key = [&] {
        wait_for(smem.key_full, keys);
        wait_turn();
        end_turn();
        let_go(smem.key_empty, keys);
    };
    const auto pass_value = [&] {
        wait_for(smem.value_full, values);
        let_go(smem.value_empty, values);
    };

    if (warpgroup == WARPGROUPS - 1) end_turn(); /* warpgroup 0 begins */

    uint32_t turn = 0;
    fc::tile_work work;
    while (fc::next_tile(params.schedule, turn, work)) {
        const bool has_query = work.first < work.end;
        if (has_query) wait_for(smem.query_full, queries);
        if (has_query && MASK == mask_class::general) {
            work.first = __shfl_sync(0xffffffffu, smem.first_shown[queries.stage], 0);
            work.end = __shfl_sync(0xffffffffu, smem.end_shown[queries.stage], 0);
        }
        const fc::rows_view view(params.schedule, work, warpgroup);
        const int row = work.row + thread_row;
        const std::true_type yes;
        const std::false_type no;
        softmax = fc::online_softmax();
        fc::out_rows<T> rows;
        const auto finish = [&] { rows = fc::out_rows<T>(softmax, unit, args, work, row); };
        int j = work.end - 1;

        if constexpr (MASK == mask_class::general) {
            /* Scores as options make them; a tile that the mask hides from all 64 rows is let go unread, too. */
            fc::score_options<T, FETCHES_AHEAD> options(args, params.options, params.schedule, work, row);
            const auto sees = [&] {
                const bool any = options.resolve(j);
                if (args.attn_mask.dtype == FC_NONE) return true;
                return __any_sync(0xffffffffu, bar_red_or(VOTE + warpgroup, 128, any)) != 0;
            };
            const auto fetch_next = [&] {
                if (j > view.first) options.fetch(j - 1);
            };
            const auto fetch_ahead = [&] {
                if (FETCHES_AHEAD) fetch_next();
            };
            const auto weigh = [&] {
                options.apply(s, j, j >= view.end_whole || j < view.first_whole);
                if (!FETCHES_AHEAD) fetch_next();
                softmax.step<T>(s, p, out, unit_log2);
            };
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
#pragma unroll 1
            for (; j >= max(view.end, work.first); j--) pass_key(), pass_value();
            bool pending = false; /* p.v of the tile before */
            if (j >= view.first) options.fetch(j);
#pragma unroll 1
            for (; j >= view.first; j--) {
                if (sees()) {
                    if (pending) {
                        multiply_both(fetch_ahead);
                    } else {
                        multiply_first(fetch_ahead);
                    }
                    pending = true;
                    weigh();
                } else {
                    if (pending) multiply_last([] {});
                    pending = false;
                    pass_key(), pass_value();
                    fetch_next();
                }
            }
            if (pending) {
                multiply_last(finish);
            } else {
                finish();
            }
#pragma unroll 1
            for (; j >= work.first; j--) pass_key(), pass_value();
            if (has_query) let_go(smem.query_empty, queries);
        } else if (view.first < view.end) {
            /* q.k of tile j in s -> weights in p. The last tile's q.k was the last to read query. */
            const auto is_cut = [&] { return j >= view.end_whole || j < view.first_whole; };
            const auto weigh = [&](auto masked, auto is_first) {
                if (j == view.first) let_go(smem.query_empty, queries);
                if (masked && (!is_first || is_cut())) {
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        fc::hide(s, r, fc::visible_columns(params.schedule, row, j * BLOCK_N + thread_key, r));
                }
                if constexpr (is_first) softmax.take_reference(s);
                softmax.step<T>(s, p, out, unit_log2);
            };
            const auto step = [&](auto masked) {
                multiply_both([] {});
                weigh(masked, no);
            };
#pragma unroll 1
            for (; j >= view.end; j--) pass_key();
            multiply_first([] {});
#pragma unroll 1
            for (int passed = work.end - 1; passed > j; passed--) pass_value();
            weigh(yes, yes);
            j--;
            if constexpr (MASK == mask_class::band) {
                for (; j >= view.end_whole; j--) step(yes);
                for (; j >= view.first_whole; j--) step(no);
                for (; j >= view.first; j--) step(yes);
            } else {
                for (; j >= view.first; j--) step(no);
            }
            multiply_last(finish);
            if constexpr (MASK == mask_class::band) {
#pragma unroll 1
                for (; j >= work.first; j--) pass_key(), pass_value();
            }
        } else {
            finish();
            if (has_query) {
#pragma unroll 1
                for (; j >= work.first; j--) pass_key(), pass_value();
                let_go(smem.query_empty, queries);
            }
        }
        rows.write(out, args);
        rows.write_lse(args, work, row);
    }
    if (warpgroup == 0) wait_turn(); /* takes the arrival that nobody waits for */
}

/* A tile is full by one arrival and its bytes, and empty by all computing warps' arrivals. */
template <int COUNT>
static __device__ __forceinline__ void init_barriers(const uint64_t (&full)[COUNT], const uint64_t (&empty)[COUNT])
{
    for (int stage = 0; stage < COUNT; stage++) {
        mbarrier_init(at(full[stage]), 1);
        mbarrier_init(at(empty[stage]), 4 * WARPGROUPS);
    }
}

static __global__ __launch_bounds__(THREADS,
                                    1) void FC_NAME(forward_kernel)(const __grid_constant__ forward_params params)
{
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    griddepcontrol_launch_dependents();
    if (threadIdx.x == 0) {
        prefetch_tensormap(&params.query);
        prefetch_tensormap(&params.key);
        prefetch_tensormap(&params.value);
        init_barriers(smem.query_full, smem.query_empty);
        init_barriers(smem.key_full, smem.key_empty);
        init_barriers(smem.value_full, smem.value_empty);
        fence_mbarrier_init();
    }
    if (threadIdx.x == 32) fc::prefetch_params(params, smem.unused);
    if (threadIdx.x == 64) { /* Gains 7% where all keys fit on chip at once; where more follow, little or nothing. */
        uint32_t turn = 0;
        fc::tile_work work;
        if (fc::next_tile(params.schedule, turn, work) && work.end - work.first <= VALUE_STAGES)
            fc::prefetch_keys(params, work);
    }
    __syncthreads();
    griddepcontrol_wait(); /* from here on memory is as the kernels before left it */

    /* The same in all lanes, which the compiler cannot see by itself. */
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        const int thread = threadIdx.x - 128 * WARPGROUPS;
        if (thread < (MASK == mask_class::general ? 32 : 1)) produce(params, smem);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume(params, smem, warpgroup);
    }
}

extern "C" int FC_NAME(forward)(const fc_forward_args *args, const fc_plan *plan, void *, void *stream)
{
    forward_params params = {{}, {}, {}, *args, fc::schedule(*args, *plan), fc::option_params(*args)};
    const cudaError_t error = fc::make_tensor_maps(&params.query, &params.key, &params.value, *args);
    if (error != cudaSuccess) return error;
    return fc::launch<FC_NAME(forward_kernel)>(
        {plan->num_blocks, THREADS, sizeof(shared_memory), sizeof(shared_memory), 1, true}, stream, params);
}
