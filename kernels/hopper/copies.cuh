/*
 * copies.cuh - the roles of the copying warpgroup: a thread that has tiles brought, threads that have finished rows of
 * out taken away, and, where there is an attn_mask, a warp for each computing warpgroup that brings its rows of that.
 */
#ifndef FC_HOPPER_COPIES_CUH
#define FC_HOPPER_COPIES_CUH

#include "hopper/block.cuh"

/* Keys come a tile ahead of values, as they are used, or together with theirs: at head_dim 64, where that is 1% faster,
 * and with masks, whose copying thread has no registers for a second place in a ring. */
constexpr bool KEYS_ARE_AHEAD = !HAS_MASKS && HEAD_DIM > 64;
static_assert(KEYS_ARE_AHEAD || (KEY_STAGES == VALUE_STAGES && !OUT_IN_VALUES), "one place in both rings");

/* The copying thread: brings, as room becomes free, what the consumers will ask for. The first keys come before query,
 * for whose room a tile's last q.k is waited for. */
static __device__ __forceinline__ void produce(const forward_params &params, shared_memory &smem)
{
    ring<QUERY_STAGES> queries;
    ring<KEY_STAGES> keys;
    ring<VALUE_STAGES> values;
    ring<1> found;
    uint32_t round = 0;
    bool first = true;
    const bool has_mask = HAS_MASKS && params.args.attn_mask.dtype != FC_NONE;
    const bool is_by_key = has_mask && !params.mask->by_row;
    fc::shown_keys shown = {0, params.schedule.seqlen_k, !has_mask};
    fc::tile_work work = {};
    /* A stage that out is to go through, behind the tile's last; of values it need not be there before the next tile's
     * first keys. */
    const auto leave = [](const uint64_t *full, const uint64_t *empty, auto &stages) {
        mbarrier_wait(at(empty[stages.stage]), stages.phase ^ 1);
        mbarrier_arrive(at(full[stages.stage]));
        stages.next();
    };
    bool owes_values = false;
    const auto leave_values = [&] {
        if (owes_values) leave(smem.value_full, smem.value_empty, values);
        owes_values = false;
    };
    const auto load_query = [&] {
        const auto wait_for_room = [&](int part) {
            mbarrier_wait(at(smem.query_empty[part][queries.stage]), queries.phase ^ 1);
        };
        if (HAS_MASKS) {
            for (int part = 0; part < QUERY_PARTS; part++) wait_for_room(part);
            smem.shown[queries.stage] = shown;
        }
        for (int part = 0; part < QUERY_PARTS; part++) {
            if (!HAS_MASKS) wait_for_room(part);
            fc::load_tile(smem.query[queries.stage][part], params.query, at(smem.query_full[part][queries.stage]),
                          work.row + QUERY_ROWS * part, work.head, work.batch);
        }
        queries.next();
    };
    const auto load_key = [&](int j) {
        mbarrier_wait(at(smem.key_empty[keys.stage]), keys.phase ^ 1);
        fc::load_tile(smem.key[keys.stage], params.key, at(smem.key_full[keys.stage]), j * BLOCK_N, work.head_kv,
                      work.batch);
    };
    const auto load_value = [&](int j, auto &stages) {
        mbarrier_wait(at(smem.value_empty[stages.stage]), stages.phase ^ 1);
        fc::load_tile(smem.value[stages.stage], params.value, at(smem.value_full[stages.stage]), j * BLOCK_N,
                      work.head_kv, work.batch);
        stages.next();
    };
    for (; fc::next_tile(params.schedule, round, work); first = false) {
        if (work.first == work.end) continue; /* the rows see no key */
        if (HAS_MASKS && is_by_key) {
            mbarrier_wait(at(smem.found_full), found.phase);
            shown = smem.known.shown;
            mbarrier_arrive(at(smem.found_empty));
            found.next();
            fc::narrow(work, shown);
        }
        if (work.first == work.end) load_query();
        const int before_query =
            QUERY_STAGES == 2 || !HAS_MASKS || first ? work.end - 1 : max(work.first, work.end - KEY_STAGES + 1);
        for (int j = work.end - 1; j >= work.first; j--) {
            load_key(j);
            if (j == before_query) {
                leave_values();
                load_query();
            }
            if constexpr (KEYS_ARE_AHEAD) {
                keys.next();
                if (j + 1 < work.end) load_value(j + 1, values);
            } else {
                load_value(j, keys); /* its place is theirs */
            }
        }
        if (KEYS_ARE_AHEAD) load_value(work.first, values);
        owes_values = OUT_IN_VALUES && params.out->is_mapped;
        if (OUT_IN_KEYS && owes_values) leave(smem.key_full, smem.key_empty, keys);
    }
    leave_values();
}

/* A warp of the copying warpgroup: starts tile j of warpgroup w's rows of attn_mask when there is room. */
template <class M>
static __device__ __forceinline__ void start_mask(const forward_params &params, shared_memory &smem,
                                                  const mask_tiles &tiles, const fc::tile_work &work, int w, int j,
                                                  ring<MASK_STAGES> &started)
{
    __syncwarp(); /* nobody is a round of the ring behind */
    mbarrier_wait(at(smem.mask_empty[w][started.stage]), started.phase ^ 1);
    tiles.template start<M>(mask_tile(smem, w, started.stage, M::dtype), at(smem.mask_full[w][started.stage]), work,
                            work.row + 64 * w, j * BLOCK_N);
    started.next(num_mask_stages(M::dtype));
}

/* Narrows a tile of rows to the keys that a mask shows it; false where there is nothing of the mask to bring. The first
 * of the warps that copy a mask looks for them, and tells the others and the copying thread. */
static __device__ __forceinline__ bool needs_mask(const forward_params &params, shared_memory &smem, int mask_warp,
                                                  ring<1> &found, fc::tile_work &work)
{
    if (work.first == work.end || params.mask->by_row) return work.first < work.end;
    const bool finds = mask_warp == 0;
    mbarrier_wait(finds ? at(smem.found_empty) : at(smem.found_full), found.phase ^ finds);
    if (finds) fc::know_shown<T>(smem.known, work, params.args.attn_mask, *params.mask, params.schedule);
    const bool needs = __any_sync(0xffffffffu, !smem.known.shown.is_plain);
    fc::narrow(work, smem.known.shown);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(finds ? at(smem.found_full) : at(smem.found_empty));
    found.next();
    return needs;
}

/* A warp that brings bools, to as many warpgroups as there are for it. */
static __device__ __forceinline__ void bring_bools(const forward_params &params, shared_memory &smem,
                                                   const mask_tiles &tiles, int mask_warp)
{
    constexpr int EACH = (WARPGROUPS + MASK_WARPS - 1) / MASK_WARPS;
    ring<1> found;
    ring<MASK_STAGES> started[EACH];
    uint32_t round = 0;
    fc::tile_work work = {};
    while (fc::next_tile(params.schedule, round, work)) {
        if (!needs_mask(params, smem, mask_warp, found, work)) continue;
#pragma unroll 1
        for (int j = work.end - 1; j >= work.first; j--) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int w = mask_warp + i * MASK_WARPS;
                const fc::rows_view view(params.schedule, work, w);
                if (w < WARPGROUPS && j >= view.first && j < view.end)
                    start_mask<fc::boolean>(params, smem, tiles, work, w, j, started[i]);
            }
        }
    }
}

/* A warp that brings attn_mask, of M, where TELLS: to as many warpgroups as there are for it, as there is room, and
 * tells of one tile after another, as it has come, what it shows. */
template <class M>
static __device__ __forceinline__ void bring_and_tell(const forward_params &params, shared_memory &smem,
                                                      const mask_tiles &tiles, int mask_warp)
{
    constexpr int EACH = (WARPGROUPS + MASK_WARPS - 1) / MASK_WARPS, NUM_STAGES = num_mask_stages(M::dtype);
    const int lane = threadIdx.x % 32;
    ring<1> found;
    ring<MASK_STAGES> started[EACH], told[EACH];
    int next[EACH]; /* to be started */
    uint32_t round = 0;
    fc::tile_work work = {};
    const auto has_room = [&](int w, int i) {
        const uint32_t empty = at(smem.mask_empty[w][started[i].stage]);
        return __all_sync(0xffffffffu, mbarrier_test(empty, started[i].phase ^ 1));
    };
    const auto tell = [&](int w, int i, int j) {
        mbarrier_wait(at(smem.mask_full[w][told[i].stage]), told[i].phase);
        const fc::shown shows =
            tiles.template look<M>(mask_tile(smem, w, told[i].stage, M::dtype), work.row + 64 * w, j * BLOCK_N);
        if (lane == 0) smem.mask_shows[w][told[i].stage] = shows;
        __syncwarp();
        if (lane == 0 || each_tells(params)) mbarrier_arrive(at(smem.mask_told[w][told[i].stage]));
        told[i].next(NUM_STAGES);
    };
    while (fc::next_tile(params.schedule, round, work)) {
        if (!needs_mask(params, smem, mask_warp, found, work)) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++) next[i] = INT_MAX;
#pragma unroll 1
        for (int j = work.end - 1; j >= work.first; j--) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int w = mask_warp + i * MASK_WARPS;
                const fc::rows_view view(params.schedule, work, w);
                if (w >= WARPGROUPS || j < view.first || j >= view.end) continue;
                next[i] = min(next[i], j);
                while (next[i] >= view.first && (next[i] == j || (next[i] > j - NUM_STAGES && has_room(w, i))))
                    start_mask<M>(params, smem, tiles, work, w, next[i]--, started[i]);
                tell(w, i, j);
            }
        }
    }
}

/* A thread that has finished rows copied to memory: a computing warp would wait there, at each box, for the copies of
 * tiles that have been asked for before. It is one of three, which the warpgroups share. */
constexpr int STORING_THREADS = 3;
static __device__ __forceinline__ void store_out(const forward_params &params, shared_memory &smem, int storer)
{
    /* The room's barrier waits for the warps whose rows lie there; for a stage that is one warpgroup's, for all. */
    constexpr int ARRIVALS = OUT_IN_KEYS ? 4 * WARPGROUPS : 4;
    ring<1> outs;
    uint32_t round = 0;
    fc::tile_work work = {};
    while (fc::next_tile(params.schedule, round, work)) {
        if (work.first == work.end) continue; /* written by the warpgroup itself */
#pragma unroll 1
        for (int w = storer; w < WARPGROUPS; w += STORING_THREADS) {
            mbarrier_wait(at(smem.out_full[w]), outs.phase);
            const out_room room = smem.rooms[w];
            mbarrier_arrive(at(smem.out_empty[w]));
            for (int slab = 0; slab < SLABS; slab++)
                cp_async_bulk_tensor_store(&params.out->map, room.rows + slab * OUT_SLAB_BYTES, 64 * slab,
                                           work.row + 64 * w, work.head, work.batch);
            cp_async_bulk_commit_group();
            cp_async_bulk_wait_group_read();
#pragma unroll 1
            for (int i = 0; i < ARRIVALS; i++) mbarrier_arrive(room.empty);
        }
        outs.next();
    }
}

#endif /* FC_HOPPER_COPIES_CUH */
