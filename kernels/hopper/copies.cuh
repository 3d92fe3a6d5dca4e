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

/* The copying thread, which a mask gives a warp to search with: brings, as room becomes free, what the consumers will
 * ask for. The first keys come before query, for whose room a tile's last q.k is waited for. */
static __device__ __forceinline__ void produce(const forward_params &params, shared_memory &smem)
{
    ring<QUERY_STAGES> queries;
    ring<KEY_STAGES> keys;
    ring<VALUE_STAGES> values;
    uint32_t round = 0;
    bool first = true;
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
            smem.first_shown[queries.stage] = work.first;
            smem.end_shown[queries.stage] = work.end;
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
        if (HAS_MASKS) {
            __syncwarp();
            fc::narrow<T>(work, smem.shown[0], params.args.attn_mask, *params.mask, params.schedule);
            if (threadIdx.x % 32 != 0) continue;
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

/* A warp that brings attn_mask, of M, to a computing warpgroup, as there is room. In a general call it also tells of
 * one tile after another, as it has come, what it shows; the bools of others the warpgroup itself looks at. */
template <class M>
static __device__ __forceinline__ void bring_mask(const forward_params &params, shared_memory &smem,
                                                  const mask_tiles &tiles, int warpgroup)
{
    constexpr int NUM_STAGES = num_mask_stages(M::dtype);
    const int lane = threadIdx.x % 32;
    ring<MASK_STAGES> started, told;
    uint32_t round = 0;
    fc::tile_work work = {};
    const auto has_room = [&] {
        const uint32_t empty = at(smem.mask_empty[warpgroup][started.stage]);
        return __all_sync(0xffffffffu, mbarrier_test(empty, started.phase ^ 1));
    };
    const auto start = [&](int j) {
        __syncwarp(); /* nobody is a round of the ring behind */
        mbarrier_wait(at(smem.mask_empty[warpgroup][started.stage]), started.phase ^ 1);
        tiles.template start<M>(mask_tile(smem, warpgroup, started.stage, M::dtype),
                                at(smem.mask_full[warpgroup][started.stage]), work, work.row + 64 * warpgroup,
                                j * BLOCK_N);
        started.next(NUM_STAGES);
    };
    const auto tell = [&](int j) {
        mbarrier_wait(at(smem.mask_full[warpgroup][told.stage]), told.phase);
        const fc::shown shows = tiles.template look<M>(mask_tile(smem, warpgroup, told.stage, M::dtype),
                                                       work.row + 64 * warpgroup, j * BLOCK_N);
        if (lane == 0) smem.mask_shows[warpgroup][told.stage] = shows;
        __syncwarp();
        if (lane == 0 || each_tells(params)) mbarrier_arrive(at(smem.mask_told[warpgroup][told.stage]));
        told.next(NUM_STAGES);
    };
    while (fc::next_tile(params.schedule, round, work)) {
        if (work.first < work.end)
            fc::narrow<T>(work, smem.shown[1 + warpgroup], params.args.attn_mask, *params.mask, params.schedule);
        const fc::rows_view view(params.schedule, work, warpgroup);
        int next = view.end - 1; /* to be started */
#pragma unroll 1
        for (int j = next; j >= view.first; j--) {
            while (next >= view.first && (next == j || (TELLS && next > j - NUM_STAGES && has_room()))) start(next--);
            if (TELLS) tell(j);
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
