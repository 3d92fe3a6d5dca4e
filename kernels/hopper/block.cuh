/*
 * block.cuh - what a block of the forward kernel has: warpgroups and their registers, rings of stages in shared memory,
 * and the barriers between those who fill them (copies.cuh) and those who compute (forward.cu).
 *
 *     barrier                completes by                                         means
 *     query_full[p][stage]   its copies: 1 arrival, then their bytes              part p of query may be read
 *     query_empty[p][stage]  every warp that reads it (with masks, each lane),    it may be overwritten
 *                            after the tile's last q.k
 *     key_full[stage]        its copies                                           this key tile may be read
 *     key_empty[stage]       every computing warp, after its q.k of it            it may be overwritten
 *     value_full, value_empty: likewise, p.v
 *     out_full[w]            every warp of warpgroup w                            rooms[w] names its finished rows
 *     out_empty[w]           the thread that has them copied                      rooms[w] may name others
 *     found_full             the first warp that copies attn_mask                 known says which keys a tile is shown
 *     found_empty            the others that do, and the copying thread           it may say so of the next tile
 *     mask_full[w][stage]    its copies, or each lane that copied                 w's rows of attn_mask may be read
 *     mask_told[w][stage]    where TELLS: the warp that copied                    mask_shows says what they show
 *     mask_empty[w][stage]   every warp of w (where lanes copy, each lane)        they may be overwritten
 *     READY (named, all)     the copying warp arrives, all others wait            the barriers above are there
 *     TURN + w (named, 256)  warpgroup w waits, warpgroup w - 1 arrives           w may issue its products
 *     LOOK + w (named, 128)  every thread of warpgroup w                          do any of its rows see the tile?
 *
 * The room that out's finished rows have is a stage of one of these rings. Of query, where that has two: it is empty
 * when they have been copied. Elsewhere of values or keys: full, with nothing in it, by the thread that otherwise asks
 * for its copies, and empty when the rows have been copied. The thread that has them copied arrives for all.
 */
#ifndef FC_HOPPER_BLOCK_CUH
#define FC_HOPPER_BLOCK_CUH

#include <cuda.h>
#include <stdint.h>

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/attn_mask.cuh"
#include "hopper/options.cuh"
#include "hopper/out.cuh"
#include "hopper/schedule.cuh"
#include "hopper/shown_keys.cuh"
#include "hopper/tiles.cuh"

using T = fc::FC_DTYPE;

/* One warpgroup for the copies, the others compute. */
constexpr int WARPGROUPS = THREADS / 128 - 1;
static_assert(BLOCK_M == 64 * WARPGROUPS, "a warpgroup computes 64 rows");

/* Of attn_mask: one for each computing warpgroup, as far as there are any beside the one of query and keys. */
constexpr int MASK_WARPS = WARPGROUPS < 4 ? WARPGROUPS : 3;

/* Registers per thread: of those that the launch bound gives all threads (128 * 512, say, or 96 * 640) the copying
 * warpgroup keeps some, and the others share the rest. To look through a mask takes more than to copy. */
constexpr int PRODUCER_REGISTERS = MASK == mask_class::general ? (WARPGROUPS == 2 ? 72 : 80)
                                   : HAS_MASKS                 ? (WARPGROUPS >= 3 ? 32 : 56)
                                   : WARPGROUPS == 2           ? 40
                                   : WARPGROUPS == 3           ? 32
                                                               : 24;
constexpr int ALL_REGISTERS = 65536 / THREADS / 8 * 8 * (WARPGROUPS + 1);
constexpr int CONSUMER_REGISTERS = (ALL_REGISTERS - PRODUCER_REGISTERS) / WARPGROUPS / 8 * 8;

/* As many stages of keys and values as fit, at most 4; where one more tile fits, of keys, which are asked for first.
 * Two of query where three of the others still fit. */
using fc::at, fc::KEY_BYTES, fc::QUERY_BYTES, fc::SLABS;
constexpr int BARRIER_BYTES = 1024; /* at most, with the other small things */
constexpr int MASK_STAGES = MASK == mask_class::unbiased && WARPGROUPS == 3 ? 3 : 4;        /* of bools, the smallest */
constexpr int MASK_BYTES = HAS_MASKS ? MASK_STAGES * fc::mask_tile_bytes<64>(FC_BOOL) : 16; /* a warpgroup's */
constexpr int ROOM = FC_HOPPER_BLOCK_SMEM_BYTES - BARRIER_BYTES - WARPGROUPS * MASK_BYTES;
constexpr int QUERY_STAGES = 2 * QUERY_BYTES + 6 * KEY_BYTES <= ROOM ? 2 : 1;
constexpr int STAGES_THAT_FIT = (ROOM - QUERY_STAGES * QUERY_BYTES) / (2 * KEY_BYTES);
constexpr int VALUE_STAGES = STAGES_THAT_FIT < 4 ? STAGES_THAT_FIT : 4;
constexpr int TILES_BYTES = QUERY_STAGES * QUERY_BYTES + 2 * VALUE_STAGES * KEY_BYTES;
constexpr bool ONE_MORE_FITS = !HAS_MASKS && TILES_BYTES + KEY_BYTES <= ROOM;
constexpr int KEY_STAGES = VALUE_STAGES < 4 && ONE_MORE_FITS ? VALUE_STAGES + 1 : VALUE_STAGES;
static_assert(VALUE_STAGES >= 2, "one tile is copied while another is read");

/* A warpgroup lets go of the keys that only later rows of the tile see, and of their values a little later. */
static_assert((BLOCK_M - 64 + BLOCK_N - 1) / BLOCK_N < VALUE_STAGES, "meanwhile the copies go on");

/* Each warpgroup's rows come by themselves, so that the first products wait for 64 rows, not for all: in a call's first
 * tiles, and where there is one stage, as soon as that warpgroup is done with those before (with masks, when all are).
 * With masks and a second stage they come together, as what is shown to all of them does. */
constexpr int QUERY_PARTS = HAS_MASKS && QUERY_STAGES == 2 ? 1 : WARPGROUPS, QUERY_ROWS = BLOCK_M / QUERY_PARTS;

/* Of a warp, those that let go of query: with masks each, which has read beside it what is shown to all rows, since
 * racecheck does not see that a warp is in step. */
constexpr int QUERY_LANES = HAS_MASKS ? 32 : 1;

/* Where a warpgroup's finished rows lie, and which barrier hears that they have been copied. */
struct out_room {
    uint32_t rows, empty;
};

struct shared_memory {
    alignas(1024) T::element query[QUERY_STAGES][QUERY_PARTS][SLABS][QUERY_ROWS][64];
    alignas(1024) T::element key[KEY_STAGES][SLABS][BLOCK_N][64];
    alignas(1024) T::element value[VALUE_STAGES][SLABS][BLOCK_N][64];
    alignas(1024) uint8_t mask[WARPGROUPS][MASK_BYTES];
    fc::shown_keys shown[QUERY_STAGES]; /* with query: what attn_mask leaves to all of its rows */
    out_room rooms[WARPGROUPS];
    fc::known_keys known;                          /* what the first of the warps that copy a mask found */
    fc::shown mask_shows[WARPGROUPS][MASK_STAGES]; /* with mask, where TELLS */
    uint64_t query_full[QUERY_PARTS][QUERY_STAGES], query_empty[QUERY_PARTS][QUERY_STAGES];
    uint64_t key_full[KEY_STAGES], key_empty[KEY_STAGES];
    uint64_t value_full[VALUE_STAGES], value_empty[VALUE_STAGES];
    uint64_t out_full[WARPGROUPS], out_empty[WARPGROUPS];
    uint64_t found_full, found_empty;
    uint64_t mask_full[WARPGROUPS][MASK_STAGES], mask_told[WARPGROUPS][MASK_STAGES];
    uint64_t mask_empty[WARPGROUPS][MASK_STAGES];
    uint32_t unused; /* fc::prefetch_params */
};
static_assert(sizeof(shared_memory) <= FC_HOPPER_BLOCK_SMEM_BYTES, "a block's share");

/* Out's rows go to memory by way of shared memory: over those of query, which are done with, where a second stage has
 * the next tile's meanwhile; elsewhere through a stage of values, which the copying thread leaves free behind a tile's
 * last, or, where that has room for one warpgroup's rows alone, one of keys for the other's. */
constexpr bool COPIES_OUT = !HAS_MASKS, OUT_IN_QUERY = COPIES_OUT && QUERY_STAGES == 2;
constexpr bool OUT_IN_VALUES = COPIES_OUT && !OUT_IN_QUERY, OUT_IN_KEYS = OUT_IN_VALUES && BLOCK_M > BLOCK_N;
constexpr int OUT_SLAB_BYTES = (OUT_IN_QUERY ? QUERY_ROWS : BLOCK_N) * 128; /* from a slab of its rows to the next */
static_assert(!OUT_IN_VALUES || BLOCK_M == BLOCK_N || (WARPGROUPS == 2 && BLOCK_N == 64), "each has room for its rows");

struct forward_params {
    CUtensorMap query, key, value;
    fc_forward_args args;
    fc::schedule schedule;
    fc::option_params options;
    bool takes_turns;
    fc::out_map out[COPIES_OUT]; /* none elsewhere: 64 bytes of parameters cost time (launch.cuh) */
    fc::mask_params mask[HAS_MASKS];
};

/* Named barriers: mbarriers are ready; and from TURN and LOOK on, one a warpgroup: whose turn it is to issue, and
 * whether any of its rows see a tile. */
constexpr int READY = 1, TURN = 2, LOOK = TURN + WARPGROUPS;

using mask_tiles = fc::mask_tiles<T, 64>;

/* The warps that bring a mask look at it; at bools those that use them do, but in a general call. */
constexpr bool TELLS = MASK == mask_class::biased || MASK == mask_class::general;

/* As many tiles of a mask as fit: MASK_STAGES of bools, two of 16-bit numbers, one of float32. */
static __host__ __device__ constexpr int num_mask_stages(int dtype)
{
    return MASK_BYTES / fc::mask_tile_bytes<64>(dtype);
}
static __device__ __forceinline__ uint8_t *mask_tile(shared_memory &smem, int warpgroup, int stage, int dtype)
{
    return smem.mask[warpgroup] + stage * fc::mask_tile_bytes<64>(dtype);
}

/* One lane arrives for its warp, except at a mask that lanes copied: racecheck does not see that a warp is in step. */
static __device__ __forceinline__ bool each_tells(const forward_params &params)
{
    return HAS_MASKS && !params.mask->is_mapped;
}

/* Where a role stands in a ring of stages. */
template <int COUNT> struct ring {
    int stage = 0;
    uint32_t phase = 0; /* of the barrier that will complete next */

    __device__ __forceinline__ void next(int count = COUNT)
    {
        if (++stage == count) stage = 0, phase ^= 1;
    }
};

/* A stage is full by one arrival and its bytes, and empty by the arrivals of all who read it. */
template <int COUNT>
static __device__ __forceinline__ void init_ring(const uint64_t (&full)[COUNT], const uint64_t (&empty)[COUNT],
                                                 int arrivals)
{
    for (int stage = 0; stage < COUNT; stage++) {
        mbarrier_init(at(full[stage]), 1);
        mbarrier_init(at(empty[stage]), arrivals);
    }
}

/* By one thread. */
static __device__ __forceinline__ void init_barriers(const forward_params &params, shared_memory &smem)
{
    for (int part = 0; part < QUERY_PARTS; part++)
        init_ring(smem.query_full[part], smem.query_empty[part], 4 * QUERY_LANES * WARPGROUPS / QUERY_PARTS);
    init_ring(smem.key_full, smem.key_empty, 4 * WARPGROUPS);
    init_ring(smem.value_full, smem.value_empty, 4 * WARPGROUPS);
    for (int w = 0; w < (COPIES_OUT ? WARPGROUPS : 0); w++) {
        mbarrier_init(at(smem.out_full[w]), 4);
        mbarrier_init(at(smem.out_empty[w]), 1);
    }
    if (HAS_MASKS) {
        mbarrier_init(at(smem.found_full), 1);
        mbarrier_init(at(smem.found_empty), MASK_WARPS);
    }
    for (int w = 0; w < (HAS_MASKS ? WARPGROUPS : 0); w++) {
        for (int stage = 0; stage < MASK_STAGES; stage++) {
            mbarrier_init(at(smem.mask_full[w][stage]), mask_tiles::arrivals(*params.mask));
            mbarrier_init(at(smem.mask_told[w][stage]), each_tells(params) ? 32 : 1);
            mbarrier_init(at(smem.mask_empty[w][stage]), each_tells(params) ? 128 : 4);
        }
    }
    fence_mbarrier_init();
}

#endif /* FC_HOPPER_BLOCK_CUH */
