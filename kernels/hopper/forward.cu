/*
 * forward.cu - attention forward on Hopper (sm_90a): float16 and bfloat16, on the tensor cores.
 *
 *     query [BLOCK_M, head_dim], key [BLOCK_N, head_dim], value [BLOCK_N, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * A block stays on its multiprocessor and works on one tile of BLOCK_M query rows after another. One thread has the
 * copy engine bring tiles, others have it take out away; two to four warpgroups of 64 rows each compute. A warpgroup
 * walks its tiles of keys from the last to the first, since the masked ones are the last, and its out stays in
 * registers until it is finished. Where there is an attn_mask, further warps copy each warpgroup's rows of that; tiles
 * that these hide are passed, and a mask that only pads the keys is no more than another end of them.
 *
 * The trick is to keep little to hide: a warpgroup issues the next tile's q.k together with this tile's p.v, waits for
 * both, and its softmax then needs no maximum (softmax.cuh), so it fits under the other warpgroups' products. Two of
 * up to 128 columns wait for q.k alone, and for p.v only before out and the weights are touched; so do general calls,
 * which look for the maximum meanwhile.
 *
 * Who waits for whom stands in block.cuh.
 */
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/launch.cuh"
#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/align_mask.cuh"
#include "hopper/attn_mask.cuh"
#include "hopper/block.cuh"
#include "hopper/copies.cuh"
#include "hopper/options.cuh"
#include "hopper/out.cuh"
#include "hopper/products.cuh"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tiles.cuh"
#include "hopper/wgmma.cuh"

/* Two warpgroups leave the tensor cores idle while both are in a softmax: so a warpgroup's p.v goes on under its own
 * next one. (In general calls it does so under the search for the maximum.) At head_dim 256 products are so long that
 * they gain nothing by it; three fill each other's gaps, and have no registers for weights that are made while others
 * are in use. */
constexpr bool OVERLAPS_P_V = WARPGROUPS == 2 && HEAD_DIM <= 128 && MASK != mask_class::general;

/* Warpgroups whose products end at the same time have none to run under each other's softmax; in turns one is ahead.
 * Handed on as soon as products are issued, turns gain three warpgroups up to 14%; two gain more when q.k is done (a
 * tile's first excepted, which is alone), which leaves p.v to fill the change; three at head_dim 64, whose products are
 * short beside the softmax, when both are. But turns hold back a warpgroup that is not where the others are, as under a
 * band, whose rows see other tiles of keys: there three at head_dim 128 lose up to 3% in causal calls and 3 to 8% under
 * windows, and four at 64 lose 3 to 7% under narrow windows. */
enum class hands_on { when_issued, after_q_k, after_both };
constexpr hands_on HANDS_ON = WARPGROUPS == 2                     ? hands_on::after_q_k
                              : WARPGROUPS == 3 && HEAD_DIM <= 64 ? hands_on::after_both
                                                                  : hands_on::when_issued;
constexpr bool MAY_TAKE_TURNS = WARPGROUPS == 2 ? OVERLAPS_P_V : MASK != mask_class::band || HEAD_DIM <= 64;
constexpr bool MUST_TAKE_TURNS = MAY_TAKE_TURNS && (WARPGROUPS <= 3 || MASK != mask_class::band);
static bool should_take_turns(const fc_forward_args &args)
{
    return MUST_TAKE_TURNS || (MAY_TAKE_TURNS && !fc_is_narrow_window(&args));
}

/* Values are waited for under the q.k that is issued with their p.v, where that gains 1 to 2%. Longer products lose as
 * much by it in long calls, bools gain nothing, and where p.v is to go on under the softmax the assembler would have it
 * wait for q.k. */
constexpr bool VALUES_ARE_LATE = HEAD_DIM <= 64 && !OVERLAPS_P_V && MASK != mask_class::unbiased;

/* A warp's sixteen rows of bools are looked at by two or four loads (of a float mask they would be up to sixteen).
 * Where products are short, the next tile is looked at under them, elsewhere under the last p.v. */
constexpr bool LOOKS_AHEAD = !TELLS && HEAD_DIM <= 64;
/* Three warpgroups and more hide each other's waits, and masks leave them no registers for weights that are still in
 * use: they wait for p.v together with q.k. */
constexpr bool SETTLES_FIRST = HAS_MASKS && MASK != mask_class::general && WARPGROUPS >= 3;
static_assert(HANDS_ON != hands_on::after_both || !HAS_MASKS || SETTLES_FIRST, "or nobody hands the turn on");

/* A computing warpgroup: 64 rows of each tile. */
static __device__ __forceinline__ void consume(const forward_params &params, shared_memory &smem, int warpgroup)
{
    const fc_forward_args &args = params.args;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int thread_row = 64 * warpgroup + 16 * warp + lane / 4, thread_key = lane % 4 * 2;

    const int part = QUERY_PARTS == 1 ? 0 : warpgroup, row_of_part = 64 * (warpgroup - part); /* this warpgroup's */
    const uint64_t query = fc::tile_descriptor(shared_address(smem.query[0][part][0][row_of_part]), QUERY_ROWS * 128);
    const uint64_t key = fc::tile_descriptor(shared_address(smem.key), BLOCK_N * 128);
    const uint64_t value = fc::tile_descriptor(shared_address(smem.value), BLOCK_N * 128);
    const bool takes_turns = MUST_TAKE_TURNS || (MAY_TAKE_TURNS && params.takes_turns);
    const auto wait_turn = [&] {
        if (takes_turns) bar_sync(TURN + warpgroup, 256);
    };
    const auto end_turn = [&] {
        if (takes_turns) bar_arrive(TURN + (warpgroup + 1) % WARPGROUPS, 256);
    };

    ring<QUERY_STAGES> queries;
    ring<KEY_STAGES> keys;
    ring<VALUE_STAGES> values;
    ring<1> outs;
    ring<MASK_STAGES> masks, looked; /* done with; looked at */
    const mask_tiles tiles(args.attn_mask, *params.mask, params.schedule);
    const auto wait_for = [&](const uint64_t *full, const auto &stages) {
        mbarrier_wait(at(full[stages.stage]), stages.phase);
    };
    const auto let_go = [&](const uint64_t *empty, auto &stages, int lanes = 1) {
        if (lane < lanes) mbarrier_arrive(at(empty[stages.stage]));
        stages.next();
    };

    /* After the tile's last q.k; where out has that room after, the thread that has it copied does. */
    const auto let_go_query = [&] {
        if (!OUT_IN_QUERY) let_go(smem.query_empty[part], queries, QUERY_LANES);
    };
    /* Waits for the room of this warpgroup's rows of out. Of keys and values the stage that is the other's is passed
     * unwaited: a tile that is waited for lies between it and the next use of its barrier. */
    const auto take_room = [&] {
        out_room room;
        if constexpr (OUT_IN_QUERY) {
            room = {shared_address(smem.query[queries.stage][part][0][0]), at(smem.query_empty[part][queries.stage])};
            queries.next();
            return room;
        }
        if (OUT_IN_KEYS && warpgroup == 0) {
            wait_for(smem.key_full, keys);
            room = {shared_address(smem.key[keys.stage]), at(smem.key_empty[keys.stage])};
        } else {
            wait_for(smem.value_full, values);
            room = {shared_address(smem.value[values.stage][0][OUT_IN_KEYS ? 0 : 64 * warpgroup]),
                    at(smem.value_empty[values.stage])};
        }
        if (OUT_IN_KEYS) keys.next();
        values.next();
        return room;
    };

    float s[BLOCK_N / 2], out[HEAD_DIM / 2] = {};
    uint32_t p[BLOCK_N / 4];
    fc::online_softmax softmax;

    /* Every tile of keys is a turn, in which a warpgroup issues: the tile's q.k, and the p.v of the tile before it as
     * far as there is one. */
    const auto start_q_k = [&] {
        fc::multiply_q_k<QUERY_ROWS>(s, fc::advance(query, queries.stage * QUERY_BYTES),
                                     fc::advance(key, keys.stage * KEY_BYTES));
    };
    const auto start_p_v = [&] { fc::multiply_p_v(out, p, fc::advance(value, values.stage * KEY_BYTES)); };
    const auto start_both = [&] {
        wait_for(smem.key_full, keys);
        if (!VALUES_ARE_LATE) wait_for(smem.value_full, values);
        wait_turn();
        fc::hold(out);
        fc::wgmma_fence();
        start_q_k();
        if (VALUES_ARE_LATE) {
            wait_for(smem.value_full, values);
            fc::wgmma_fence();
        }
        start_p_v();
        if (HANDS_ON == hands_on::when_issued) end_turn();
    };
    /* One after the other, where the softmax is to run under p.v. */
    const auto finish_q_k = [&] {
        fc::wgmma_wait<1>();
        if (HANDS_ON == hands_on::after_q_k) end_turn();
        fc::hold(s);
        let_go(smem.key_empty, keys);
    };
    const auto finish_p_v = [&](int tile) {
        if (OVERLAPS_P_V) keep_order(tile > 1 << 30); /* there are fewer */
        fc::wgmma_wait<0>();
        fc::hold(out);
        fc::hold(p);
    };
    const auto multiply_both = [&](auto meanwhile) {
        start_both();
        meanwhile();
        fc::wgmma_wait<0>();
        if (HANDS_ON == hands_on::after_both) end_turn();
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
        if (HANDS_ON != hands_on::after_both) end_turn();
        meanwhile();
        fc::hold(out);
        fc::wgmma_wait<0>();
        if (HANDS_ON == hands_on::after_both) end_turn();
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
    /* A tile that none of these rows sees is let go unread. By the whole warp: products, which keep its lanes together
     * elsewhere, there are none, and a lane that still waits must not find the stage a round further on. */
    const auto pass_key = [&] {
        wait_for(smem.key_full, keys);
        wait_turn();
        end_turn();
        __syncwarp();
        let_go(smem.key_empty, keys);
    };
    const auto pass_value = [&] {
        wait_for(smem.value_full, values);
        __syncwarp();
        let_go(smem.value_empty, values);
    };

    if (warpgroup == WARPGROUPS - 1) end_turn(); /* warpgroup 0 begins */

    uint32_t round = 0;
    fc::tile_work work;
    while (fc::next_tile(params.schedule, round, work)) {
        const bool has_query = work.first < work.end;
        if (has_query) wait_for(smem.query_full[part], queries);
        fc::shown_keys shown = {};
        if (has_query && HAS_MASKS) {
            shown.first = __shfl_sync(0xffffffffu, smem.shown[queries.stage].first, 0);
            shown.end = __shfl_sync(0xffffffffu, smem.shown[queries.stage].end, 0);
            shown.is_plain = __all_sync(0xffffffffu, smem.shown[queries.stage].is_plain);
            fc::narrow(work, shown);
        }
        fc::rows_view view(params.schedule, work, warpgroup);
        if (HAS_MASKS) view.leave_keys(shown.first, shown.end);
        const int row = work.row + thread_row;
        const float unit = fc::unit_of_scores(params.options, !shown.is_plain), unit_log2 = unit * fc::LOG2_E;
        const std::true_type yes;
        const std::false_type no;
        softmax = fc::online_softmax();
        fc::out_rows<T> rows;
        const auto finish = [&] { rows = fc::out_rows<T>(softmax, unit, args, work, row); };
        const auto zero_out = [&] {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
        };

        if constexpr (HAS_MASKS) {
            int j = work.end; /* tile j is being worked on, or done with */
            /* Scores as options make them. A tile that the mask hides from all 64 rows is passed. */
            const fc::score_options<T, mask_tiles> options(args, params.options, params.schedule, tiles, work, row);
            fc::shown shows = fc::shown::all, next = fc::shown::all; /* tile j and tile j - 1 */
            bool sees_next = false;
            const auto look = [&] {
                sees_next = j > view.first;
                if (!sees_next || shown.is_plain) return;
                wait_for(TELLS ? smem.mask_told[warpgroup] : smem.mask_full[warpgroup], looked);
                if (TELLS) {
                    if (lane == 0) next = smem.mask_shows[warpgroup][looked.stage];
                    next = fc::shown(__shfl_sync(0xffffffffu, int(next), 0));
                    sees_next = next != fc::shown::none;
                } else {
                    next = tiles.template look_at_bools<16>(
                        mask_tile(smem, warpgroup, looked.stage, args.attn_mask.dtype), 16 * warp);
                    sees_next = __any_sync(0xffffffffu, bar_any(LOOK + warpgroup, 128, next != fc::shown::none));
                }
                looked.next(num_mask_stages(args.attn_mask.dtype));
            };
            const auto look_ahead = [&] {
                if (LOOKS_AHEAD) look();
            };
            const auto go_on = [&] {
                j--;
                shows = next;
            };
            const auto let_go_mask = [&] {
                if (shown.is_plain) return;
                __syncwarp();
                if (lane == 0 || each_tells(params)) mbarrier_arrive(at(smem.mask_empty[warpgroup][masks.stage]));
                masks.next(num_mask_stages(args.attn_mask.dtype));
            };
            /* pending: p.v of the tile before, which goes on under the options and the search for the maximum. */
            const auto weigh = [&](auto pending) {
                const bool is_cut = j >= view.end_whole || j < view.first_whole;
                const uint8_t *mask = mask_tile(smem, warpgroup, masks.stage, args.attn_mask.dtype);
                bool is_pending = pending;
                const auto settle = [&] {
                    if (SETTLES_FIRST) return;
                    finish_p_v(j);
                    if (is_pending) let_go(smem.value_empty, values);
                    is_pending = false;
                };
                /* Read again where a tile is cut, so that no registers hold them meanwhile. */
                const auto left = [&](int column) {
                    const fc::shown_keys &keys = smem.shown[queries.stage];
                    return fc::columns_between(keys.first - column, keys.end - column);
                };
                options.apply(s, j, is_cut, left, shows, mask, 16 * warp);
                let_go_mask();
                if (!TELLS && !LOOKS_AHEAD) look();
                if (MASK != mask_class::general && !pending) softmax.take_reference(s, unit_log2);
                constexpr bool IS_LATE = OVERLAPS_P_V || MASK == mask_class::general;
                if (!IS_LATE) settle();
                softmax.step<T>(s, p, out, unit_log2, [&] {
                    if (IS_LATE) settle();
                });
            };
            const auto start_next = [&] {
                if (TELLS) look();
                if (!sees_next) return false;
                go_on();
                if (SETTLES_FIRST) {
                    multiply_both(look_ahead);
                } else {
                    start_both();
                    look_ahead();
                    finish_q_k();
                }
                return true;
            };
            zero_out();
#pragma unroll 1
            for (; j > max(view.end, work.first); j--) pass_key(), pass_value();
            look();
#pragma unroll 1
            while (j > view.first) {
                const bool sees = sees_next;
                go_on();
                if (!sees) {
                    pass_key(), pass_value();
                    let_go_mask();
                    look();
                    continue;
                }
                multiply_first(look_ahead);
                if constexpr (MASK == mask_class::general) { /* once: twice so much code outgrows its cache */
                    bool pending = false;
#pragma unroll 1
                    do {
                        weigh(pending);
                        pending = start_next();
                    } while (pending);
                } else {
                    weigh(no);
#pragma unroll 1
                    while (start_next()) weigh(yes);
                }
                multiply_last([] {});
            }
            finish();
#pragma unroll 1
            for (; j > work.first; j--) pass_key(), pass_value();
            if (has_query) let_go_query();
        } else if (view.first < view.end) {
            int j = work.end - 1;
            /* q.k of tile j in s -> weights in p. The last tile's q.k was the last to read query. */
            const auto is_cut = [&] { return j >= view.end_whole || j < view.first_whole; };
            const auto weigh = [&](auto masked, auto is_first, auto settle) {
                if (j == view.first) let_go_query();
                if (masked && (!is_first || is_cut())) {
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        fc::hide(s, r, fc::visible_columns(params.schedule, row, j * BLOCK_N + thread_key, r));
                }
                if constexpr (is_first) softmax.take_reference(s, unit_log2);
                softmax.step<T>(s, p, out, unit_log2, settle);
            };
            const auto step = [&](auto masked) {
                if constexpr (OVERLAPS_P_V) {
                    start_both();
                    finish_q_k();
                    weigh(masked, no, [&] {
                        finish_p_v(j);
                        let_go(smem.value_empty, values);
                    });
                } else {
                    multiply_both([] {});
                    weigh(masked, no, [] {});
                }
            };
#pragma unroll 1
            for (; j >= view.end; j--) pass_key();
            multiply_first(zero_out);
#pragma unroll 1
            for (int passed = work.end - 1; passed > j; passed--) pass_value();
            weigh(yes, yes, [] {});
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
                for (int j = work.first; j < work.end; j++) pass_key(), pass_value();
                let_go_query();
            }
        }
        if (COPIES_OUT && has_query && params.out->is_mapped) {
            const out_room room = take_room();
            mbarrier_wait(at(smem.out_empty[warpgroup]), outs.phase ^ 1);
            rows.lay(out, room.rows + 16 * warp * 128, OUT_SLAB_BYTES);
            if (threadIdx.x % 128 == 0) smem.rooms[warpgroup] = room;
            __syncwarp();
            if (lane == 0) mbarrier_arrive(at(smem.out_full[warpgroup]));
            outs.next();
        } else {
            rows.write(out, args);
            if (OUT_IN_QUERY && has_query) let_go(smem.query_empty[part], queries);
        }
        rows.write_lse(args, work, row);
    }
    if (warpgroup == 0) wait_turn(); /* takes the arrival that nobody waits for */
}

static __global__ __launch_bounds__(THREADS,
                                    1) void FC_NAME(forward_kernel)(const __grid_constant__ forward_params params)
{
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    /* The same in all lanes, which the compiler cannot see by itself. */
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
    griddepcontrol_launch_dependents();
    /* Behind a kernel that does not let this one in early all wait for the first copies: the warp that asks for them
     * readies the barriers, and does not wait for the others. */
    if (warpgroup == WARPGROUPS && warp == 0) {
        if (threadIdx.x % 32 == 0) {
            prefetch_tensormap(&params.query);
            prefetch_tensormap(&params.key);
            prefetch_tensormap(&params.value);
            if (COPIES_OUT && params.out->is_mapped) prefetch_tensormap(&params.out->map);
            init_barriers(params, smem);
            if (HAS_MASKS) smem.known.row = -1;
        }
        __syncwarp();
        bar_arrive(READY, THREADS);
    } else {
        if (threadIdx.x == 32) fc::prefetch_params(params, smem.unused);
        if (HAS_MASKS && threadIdx.x == 96 && params.mask->is_mapped) prefetch_tensormap(&params.mask->map);
        /* Gains up to 17% where a block has one tile, all of whose keys fit on chip at once; costs 8% where more
         * follow. */
        if (threadIdx.x == 64 && params.schedule.num_tiles <= gridDim.x) {
            const fc::tile_work work = fc::find_work(params.schedule, blockIdx.x);
            if (work.end - work.first <= VALUE_STAGES) fc::prefetch_keys(params, work);
        }
        __syncwarp();
        bar_sync(READY, THREADS);
    }
    griddepcontrol_wait(); /* from here on memory is as the kernels before left it */

    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (warp == 0) {
            if (threadIdx.x % 32 == 0) produce(params, smem);
        } else if (HAS_MASKS && warp <= MASK_WARPS && params.args.attn_mask.dtype != FC_NONE) {
            const mask_tiles tiles(params.args.attn_mask, *params.mask, params.schedule);
            tiles.with_dtype([&](auto m) {
                if constexpr (TELLS) {
                    bring_and_tell<decltype(m)>(params, smem, tiles, warp - 1);
                } else {
                    bring_bools(params, smem, tiles, warp - 1);
                }
            });
        } else if (COPIES_OUT && threadIdx.x % 32 == 0 && params.out->is_mapped) {
            store_out(params, smem, warp - 1);
        }
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume(params, smem, warpgroup);
    }
}

extern "C" int FC_NAME(forward)(const fc_forward_args *given, const fc_launch *launch, void *workspace, void *stream)
{
    fc_forward_args args = *given;
    cudaError_t error = cudaSuccess;
    if constexpr (HAS_MASKS) {
        if (launch->plan.workspace_bytes > 0) error = fc::align_mask<MASK>(&args, workspace, stream);
    }
    forward_params params = {
        {}, {}, {}, args, fc::schedule(args, *launch), fc::option_params(args), should_take_turns(args), {}, {}};
    if (error == cudaSuccess) error = fc::make_tensor_maps(&params.query, &params.key, &params.value, args, QUERY_ROWS);
    if (error == cudaSuccess && COPIES_OUT) error = fc::make_out_map(params.out, args, launch->plan);
    if (error == cudaSuccess && HAS_MASKS) error = fc::make_mask_params(params.mask, args, 64);
    if (error != cudaSuccess) return error;
    return fc::launch<FC_NAME(forward_kernel)>(
        {launch->plan.num_blocks, THREADS, sizeof(shared_memory), sizeof(shared_memory), 1, true}, stream, params);
}
