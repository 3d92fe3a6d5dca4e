/*
 * forward.cu - attention forward on Hopper (sm_90a): float16 and bfloat16, on the tensor cores.
 *
 *     query [BLOCK_M, head_dim], key [BLOCK_N, head_dim], value [BLOCK_N, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * A block stays on its multiprocessor and works on one tile of BLOCK_M query rows after another. One thread drives the
 * copy engine; two or three warpgroups of 64 rows each compute. A warpgroup walks its tiles of keys from the last to
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
#include "hopper/out.cuh"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tensor_map.cuh"
#include "hopper/wgmma.cuh"

using T = fc::FC_DTYPE;

/* One warpgroup for the copies, the others compute. */
constexpr int WARPGROUPS = THREADS / 128 - 1;
static_assert(BLOCK_M == 64 * WARPGROUPS, "a warpgroup computes 64 rows");

/* Registers per thread: 65536 over all threads, the copying warpgroup's share given to the others. */
constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;
static_assert(128 * (PRODUCER_REGISTERS + WARPGROUPS * CONSUMER_REGISTERS) <= 65536, "they fit");

/* Tiles lie in slabs of 64 columns. As many stages of keys and values as fit, at most 4; where one more tile fits, of
 * keys, which are asked for first. Two of query where three of the others still fit. */
constexpr int SLABS = (HEAD_DIM + 63) / 64;
constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128;
constexpr int KEY_BYTES = SLABS * BLOCK_N * 128;
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
};
static_assert(sizeof(shared_memory) <= SMEM_BYTES, "a block's share");

struct forward_params {
    CUtensorMap query, key, value;
    fc_forward_args args;
    fc::schedule schedule;
};

/* Named barriers from here on, one a warpgroup: whose turn it is to issue. Three warpgroups that take turns gain 3 to
 * 7%, two lose 2%. */
constexpr int TURN = 1, VOTE = TURN + WARPGROUPS;
constexpr bool TAKES_TURNS = WARPGROUPS > 2;

/* Where a role stands in a ring of stages. */
template <int COUNT> struct ring {
    int stage = 0;
    uint32_t phase = 0; /* of the barrier that will complete next */

    __device__ __forceinline__ void next()
    {
        if (++stage == COUNT) stage = 0, phase ^= 1;
    }
};

static __device__ __forceinline__ uint32_t at(const uint64_t &barrier)
{
    return shared_address(&barrier);
}

/* One box after another of a tile, by one thread. */
template <int ROWS>
static __device__ __forceinline__ void load_tile(T::element (&tile)[SLABS][ROWS][64], const CUtensorMap &map,
                                                 const uint64_t &full, int row, int head, int batch)
{
    mbarrier_arrive_expect_tx(at(full), sizeof(tile));
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
        cp_async_bulk_tensor(shared_address(tile[slab]), &map, at(full), 64 * slab, row, head, batch);
}

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
    fc::tile_work work;
    const auto load_query = [&] {
        mbarrier_wait(at(smem.query_empty[queries.stage]), queries.phase ^ 1);
        if (MASK == mask_class::general) {
            smem.first_shown[queries.stage] = work.first;
            smem.end_shown[queries.stage] = work.end;
        }
        load_tile(smem.query[queries.stage], params.query, smem.query_full[queries.stage], work.row, work.head,
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
            load_tile(smem.key[keys.stage], params.key, smem.key_full[keys.stage], j * BLOCK_N, work.head_kv,
                      work.batch);
            if (j == before_query) load_query();
            mbarrier_wait(at(smem.value_empty[values.stage]), values.phase ^ 1);
            load_tile(smem.value[values.stage], params.value, smem.value_full[values.stage], j * BLOCK_N, work.head_kv,
                      work.batch);
        }
    }
}

/* s = query @ key.T for 64 rows and a tile of keys. */
static __device__ __forceinline__ void multiply_q_k(float (&s)[BLOCK_N / 2], uint64_t query, uint64_t key)
{
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        const uint64_t q = fc::advance(query, d / 64 * BLOCK_M * 128 + d % 64 * 2);
        const uint64_t k = fc::advance(key, d / 64 * BLOCK_N * 128 + d % 64 * 2);
        if (d == 0) {
            fc::wgmma_ss<0>(s, q, k);
        } else {
            fc::wgmma_ss<1>(s, q, k);
        }
    }
    fc::wgmma_commit();
}

/* out += p @ value. p: pairs of 16-bit probabilities, in the layout of s. */
static __device__ __forceinline__ void multiply_p_v(float (&out)[HEAD_DIM / 2], const uint32_t (&p)[BLOCK_N / 4],
                                                    uint64_t value)
{
#pragma unroll
    for (int j = 0; j < BLOCK_N; j += 16) fc::wgmma_rs<1>(out, &p[j / 4], fc::advance(value, j * 128));
    fc::wgmma_commit();
}

/* A computing warpgroup: 64 rows of each tile. */
static __device__ __forceinline__ void consume(const forward_params &params, shared_memory &smem, int warpgroup)
{
    const fc_forward_args &args = params.args;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int thread_row = 64 * warpgroup + 16 * warp + lane / 4, thread_key = lane % 4 * 2;
    /* Scores stay in units of scale, which the exponential's factor takes in, unless something is added to them. */
    const bool adds_bias = args.attn_mask.dtype != FC_NONE && args.attn_mask.dtype != FC_BOOL;
    const bool is_natural =
        MASK == mask_class::general &&
        (args.softcap != 0 || adds_bias || !((float)args.scale > 0) || args.alibi_slopes.dtype != FC_NONE);
    const float unit_log2 = (is_natural ? 1 : (float)args.scale) * fc::LOG2_E;

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
        multiply_q_k(s, fc::advance(query, queries.stage * QUERY_BYTES), fc::advance(key, keys.stage * KEY_BYTES));
    };
    const auto start_p_v = [&] { multiply_p_v(out, p, fc::advance(value, values.stage * KEY_BYTES)); };
    const auto multiply_both = [&] {
        wait_for(smem.key_full, keys);
        wait_for(smem.value_full, values);
        wait_turn();
        fc::hold(out);
        fc::wgmma_fence();
        start_q_k();
        start_p_v();
        end_turn();
        fc::wgmma_wait<0>();
        fc::hold(s);
        fc::hold(out);
        let_go(smem.key_empty, keys);
        let_go(smem.value_empty, values);
    };
    const auto multiply_first = [&] {
        wait_for(smem.key_full, keys);
        wait_turn();
        fc::wgmma_fence();
        start_q_k();
        end_turn();
        if (MASK != mask_class::general) { /* now, while the product runs */
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
        }
        fc::hold(out);
        fc::wgmma_wait<0>();
        fc::hold(s);
        let_go(smem.key_empty, keys);
    };
    const auto multiply_last = [&] {
        wait_for(smem.value_full, values);
        fc::hold(out);
        fc::wgmma_fence();
        start_p_v();
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
        int j = work.end - 1;

        if constexpr (MASK == mask_class::general) {
            /* Scores as options make them; a tile that the mask hides from all 64 rows is let go unread, too. */
            fc::attn_mask_tile<T> mask;
            const fc_tensor &attn_mask = args.attn_mask;
            const auto fetch = [&](int tile) {
                mask.fetch(attn_mask, params.schedule, work.batch, work.head, row, tile * BLOCK_N);
            };
            const auto sees = [&] {
                const bool any = mask.resolve(attn_mask, params.schedule, work.batch, work.head, row, j * BLOCK_N);
                return __any_sync(0xffffffffu, bar_red_or(VOTE + warpgroup, 128, any)) != 0;
            };
            const auto weigh = [&] {
                const int tile_key = j * BLOCK_N, thread_column = tile_key + thread_key;
                if (args.softcap != 0) {
                    const float softcap = (float)args.softcap, inner = (float)(args.scale / args.softcap);
#pragma unroll
                    for (int i = 0; i < BLOCK_N / 2; i++) s[i] = softcap * fc::tanh_both(s[i] * inner);
                }
                if (is_natural) {
                    const float unit = args.softcap != 0 ? 1 : (float)args.scale;
                    mask.add(s, unit, attn_mask, params.schedule, work.batch, work.head, row, tile_key);
                }
                if (args.alibi_slopes.dtype != FC_NONE)
                    fc::take_distance(s, fc::head_value<T>(args.alibi_slopes, work.batch, work.head),
                                      (float)(thread_column - row - args.diagonal));
                const uint32_t visible[2] = {
                    mask.visible[0] & fc::visible_columns(params.schedule, row, thread_column, 0),
                    mask.visible[1] & fc::visible_columns(params.schedule, row, thread_column, 1)};
                if (!__all_sync(0xffffffffu, fc::are_all_visible(visible[0] & visible[1]))) {
                    fc::hide(s, 0, visible[0]);
                    fc::hide(s, 1, visible[1]);
                }
                if (j > view.first) fetch(j - 1);
                softmax.take_reference(s);
                softmax.step<T>(s, p, out, unit_log2);
            };
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
#pragma unroll 1
            for (; j >= max(view.end, work.first); j--) pass_key(), pass_value();
            bool pending = false; /* p.v of the tile before */
            if (j >= view.first) fetch(j);
#pragma unroll 1
            for (; j >= view.first; j--) {
                if (sees()) {
                    if (pending) {
                        multiply_both();
                    } else {
                        multiply_first();
                    }
                    pending = true;
                    weigh();
                } else {
                    if (pending) multiply_last();
                    pending = false;
                    pass_key(), pass_value();
                    if (j > view.first) fetch(j - 1);
                }
            }
            if (pending) multiply_last();
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
                multiply_both();
                weigh(masked, no);
            };
#pragma unroll 1
            for (; j >= view.end; j--) pass_key();
            multiply_first();
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
            multiply_last();
            if constexpr (MASK == mask_class::band) {
#pragma unroll 1
                for (; j >= work.first; j--) pass_key(), pass_value();
            }
        } else if (has_query) {
#pragma unroll 1
            for (; j >= work.first; j--) pass_key(), pass_value();
            let_go(smem.query_empty, queries);
        }
        fc::write_out<T>(out, softmax, unit_log2, args, work, row);
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

extern __shared__ __align__(1024) unsigned char dynamic_smem[];

static __global__ __launch_bounds__(THREADS,
                                    1) void FC_NAME(forward_kernel)(const __grid_constant__ forward_params params)
{
    shared_memory &smem = *(shared_memory *)dynamic_smem;
    if (threadIdx.x == 0) {
        prefetch_tensormap(&params.query);
        prefetch_tensormap(&params.key);
        prefetch_tensormap(&params.value);
        init_barriers(smem.query_full, smem.query_empty);
        init_barriers(smem.key_full, smem.key_empty);
        init_barriers(smem.value_full, smem.value_empty);
        fence_mbarrier_init();
    }
    __syncthreads();

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
    forward_params params = {{}, {}, {}, *args, fc::schedule(*args, *plan)};
    /* Without keys nothing is copied; the maps must be valid all the same. */
    const bool keys = args->seqlen_k > 0;
    cudaError_t error = fc::make_tensor_map(&params.query, args->query, args->head_dim, args->seqlen_q,
                                            args->num_heads_q, args->batch, BLOCK_M);
    params.key = params.value = params.query;
    if (keys && error == cudaSuccess)
        error = fc::make_tensor_map(&params.key, args->key, args->head_dim, args->seqlen_k, args->num_heads_kv,
                                    args->batch, BLOCK_N);
    if (keys && error == cudaSuccess)
        error = fc::make_tensor_map(&params.value, args->value, args->head_dim_v, args->seqlen_k, args->num_heads_kv,
                                    args->batch, BLOCK_N);
    if (error != cudaSuccess) return error;
    return fc::launch<FC_NAME(forward_kernel)>(plan->num_blocks, THREADS, sizeof(shared_memory), stream, params);
}
