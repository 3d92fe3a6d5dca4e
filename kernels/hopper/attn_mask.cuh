/*
 * attn_mask.cuh - one tile of attn_mask in shared memory: how it comes there, and to the threads that hold its scores.
 *
 *     slabs [ROWS, 128 bytes], as the copy engine's swizzle leaves them: a row's 16-byte piece c in place c ^ row % 8
 *     of a bool mask with BLOCK_N 64 [ROWS, 64 bytes]: in place c ^ row / 2 % 4
 *
 * Where all rows are the same, as in a padding mask, there is one. A warp brings a tile, some time ahead of its use.
 * Then it is looked through for keys that it shows: where bools show all there is nothing to hide, and in the long
 * kernels a tile without any is not multiplied.
 *
 * The trick is the swizzle: ldmatrix finds the pieces of eight rows in all 32 banks, and gives a thread the
 * numbers of its own scores, two rows g and g + 8 and the key pairs 8 i + 2 t, 8 i + 2 t + 1 (wgmma.cuh). Nothing is
 * held in registers meanwhile. Where strides forbid the copy engine, numbers are copied one by one; rows that differ
 * are 64 a tile only once they are aligned (align_mask.cuh).
 */
#ifndef FC_HOPPER_ATTN_MASK_CUH
#define FC_HOPPER_ATTN_MASK_CUH

#include <string.h>

#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/schedule.cuh"
#include "hopper/scores.cuh"
#include "hopper/tiles.cuh"

namespace fc {

/* Does any of the numbers in these 32 bits? */
template <class M> __device__ __forceinline__ bool shows_any(uint32_t word)
{
    return word != (M::dtype == FC_BOOL      ? 0
                    : M::dtype == FC_FLOAT32 ? 0xff800000u
                    : M::dtype == FC_FLOAT16 ? 0xfc00fc00u
                                             : 0xff80ff80u);
}

/* What a tile of a mask leaves of its keys. Numbers that are added are some, where any is not -inf; all, if they are
 * known to be 0. */
enum class shown { none, some, all };

/* Of a tile. */
template <int ROWS> static __host__ __device__ constexpr int mask_tile_bytes(int dtype)
{
    return ROWS * BLOCK_N * (dtype == FC_BOOL ? 1 : dtype == FC_FLOAT32 ? 4 : 2);
}

/* A call's mask, made on the host. */
struct mask_params {
    CUtensorMap map;       /* boxes of a slab, or of the one row of it */
    bool is_mapped;        /* the copy engine reads it */
    bool by_row;           /* rows differ */
    int by_batch, by_head; /* what an index counts in the map: 0 where all see the same, or else 1 */
};

static_assert(!HAS_MASKS || BLOCK_N == 64 || BLOCK_N == 128, "the copy engine's swizzles");

/* Of a row of a slab. */
static constexpr int mask_slab_bytes(int dtype)
{
    return dtype == FC_BOOL && BLOCK_N < 128 ? BLOCK_N : 128;
}
static cudaError_t make_mask_params(mask_params *params, const fc_forward_args &args, int rows)
{
    const fc_tensor &mask = args.attn_mask;
    *params = {{}, false, fc_mask_rows_differ(&args), mask.strides[0] != 0, mask.strides[1] != 0};
    if (mask.dtype == FC_NONE || args.seqlen_k == 0 || !fc_hopper_maps(&mask)) return cudaSuccess;
    params->is_mapped = true;
    return make_tensor_map(&params->map, mask, args.seqlen_k, params->by_row ? args.seqlen_q : 1,
                           params->by_head ? args.num_heads_q : 1, params->by_batch ? args.batch : 1,
                           {mask_slab_bytes(mask.dtype), params->by_row ? rows : 1});
}

/* What of it a row of variants.def leaves open. */
__device__ __forceinline__ bool is_of_bools(const fc_tensor &mask)
{
    return MASK == mask_class::unbiased || (MASK != mask_class::biased && mask.dtype == FC_BOOL);
}

/* The tiles of a mask for a query of dtype T, as the warp that brings them and the threads that use them see them. */
template <class T, int ROWS> struct mask_tiles {
    __device__ __forceinline__ mask_tiles(const fc_tensor &mask, const mask_params &params, const schedule &all)
        : mask(mask), params(params), all(all)
    {
    }

    /* Calls use(float32()), say, where the mask is of that. */
    template <class Use> __device__ __forceinline__ auto with_dtype(Use use) const
    {
        if (is_of_bools(mask)) return use(boolean());
        if (mask.dtype == FC_FLOAT32) return use(float32());
        return use(T());
    }

    /* A warp begins to bring the tile of these first row and key, of a mask of M. What lies past the ends is no matter.
     * full: a barrier of arrivals() that completes when it is there. */
    template <class M>
    __device__ __forceinline__ void start(uint8_t *tile, uint32_t full, const tile_work &work, int row, int key) const
    {
        if (!params.is_mapped) {
            if (ROWS < 64 && params.by_row) { /* of 64 rows that differ there is an aligned copy */
                copy_rows<M>(tile, work, row, key);
            } else {
                copy_row<M>(tile, work, key);
            }
            mbarrier_arrive(full);
        } else if (threadIdx.x % 32 == 0) {
            mbarrier_arrive_expect_tx(full, (params.by_row ? ROWS : 1) * BLOCK_N * (int)sizeof(typename M::element));
#pragma unroll
            for (int slab = 0; slab < BLOCK_N / COLUMNS<M>; slab++)
                cp_async_bulk_tensor(shared_address(tile) + slab * SLAB_BYTES, &params.map, full,
                                     key + slab * COLUMNS<M>, params.by_row ? row : 0, work.head * params.by_head,
                                     work.batch * params.by_batch);
        }
    }
    static __device__ __forceinline__ int arrivals(const mask_params &params) { return params.is_mapped ? 1 : 32; }

    /* A warp looks at what all rows of the tile show of their keys. row, key: the tile's first of the array. */
    template <class M> __device__ __forceinline__ shown look(const uint8_t *tile, int row, int key) const
    {
        if (M::dtype == FC_BOOL) return look_at_bools<ROWS>(tile, 0);
        constexpr int EACH = 4 / (int)sizeof(typename M::element), PIECES = BLOCK_N / (4 * EACH); /* at most 32 a row */
        const int lane = threadIdx.x % 32, piece = lane % PIECES;
        const int rows = min(params.by_row ? ROWS : 1, all.seqlen_q - row),
                  keys = all.seqlen_k - key - 4 * EACH * piece;
        bool any = false;
#pragma unroll 1
        for (int i = lane / PIECES; __any_sync(0xffffffffu, i < rows); i += 32 / PIECES) {
            if (i < rows) {
                const uint4 x = *(const uint4 *)(tile + place<M>(i, piece));
                any |= 0 * EACH < keys && shows_any<M>(x.x);
                any |= 1 * EACH < keys && shows_any<M>(x.y);
                any |= 2 * EACH < keys && shows_any<M>(x.z);
                any |= 3 * EACH < keys && shows_any<M>(x.w);
            }
            if (__any_sync(0xffffffffu, any)) return shown::some;
        }
        return shown::none;
    }

    /* The same of bools, of COUNT rows. Past the end keys are false, and rows false or as the last, which at worst
     * hides from us that the tile shows all. */
    template <int COUNT> __device__ __forceinline__ shown look_at_bools(const uint8_t *tile, int first_row) const
    {
        constexpr int PIECES = BLOCK_N / 16, AT_ONCE = 32 / PIECES; /* of a row; rows of a warp */
        const int lane = threadIdx.x % 32, piece = lane % PIECES;
        uint32_t any = 0, ones = 0x01010101; /* a true one that is not 1 only costs time */
        const auto take = [&](int row) {
            const uint4 x = *(const uint4 *)(tile + place<boolean>(row, piece));
            any |= x.x | x.y | x.z | x.w;
            ones &= x.x & x.y & x.z & x.w;
        };
        if (params.by_row) {
#pragma unroll
            for (int i = 0; i < COUNT; i += AT_ONCE) take(first_row + lane / PIECES + i);
        } else {
            take(0);
        }
        if (!__any_sync(0xffffffffu, any != 0)) return shown::none;
        return __all_sync(0xffffffffu, ones == 0x01010101) ? shown::all : shown::some;
    }

    /* s in natural units = unit * s + the mask, where it is of floats. For a warp whose sixteen rows begin with the
     * tile's row first_row. shows: what the mask leaves of the tile; where that is all, it adds nothing, and is not
     * read. */
    __device__ __forceinline__ void add(float (&s)[BLOCK_N / 2], float unit, shown shows, const uint8_t *tile,
                                        int first_row) const
    {
        const int lane = threadIdx.x % 32;
        if (shows != shown::all && mask.dtype == T::dtype) {
            /* Lane 8 m + i says where row i of matrix m lies, of four: pieces c and c + 1 of two times eight rows. */
            const uint32_t from = shared_address(tile) + place<T>(params.by_row ? first_row + lane % 16 : 0, lane / 16);
#pragma unroll
            for (int c = 0; c < BLOCK_N / 8; c += 2) {
                uint32_t pairs[4];
                ldmatrix_x4(pairs, (from ^ 16 * (c % 8)) + c / 8 * SLAB_BYTES);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float *two = &s[4 * c + 2 * i];
                    two[0] = fmaf(two[0], unit, T::to_float((uint16_t)pairs[i]));
                    two[1] = fmaf(two[1], unit, T::to_float((uint16_t)(pairs[i] >> 16)));
                }
            }
            return;
        }
        if (unit != 1) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; i++) s[i] *= unit;
        }
        if (shows != shown::all && mask.dtype == FC_FLOAT32) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int t = lane % 4;
                const uint32_t from =
                    place<float32>(params.by_row ? first_row + lane / 4 + 8 * r : 0, t / 2) + t % 2 * 8;
#pragma unroll
                for (int i = 0; i < BLOCK_N / 8; i++) {
                    const float2 two = *(const float2 *)(tile + (from ^ 32 * (i % 4)) + i / 4 * SLAB_BYTES);
                    s[4 * i + 2 * r] += two.x;
                    s[4 * i + 2 * r + 1] += two.y;
                }
            }
        }
    }

    /* Hides what a tile of bools hides, for the same warp. */
    __device__ __forceinline__ void hide(float (&s)[BLOCK_N / 2], const uint8_t *tile, int first_row) const
    {
        const int lane = threadIdx.x % 32;
        /* Elsewhere more code costs what this gains. */
        if (MASK == mask_class::unbiased && ROWS == 64 && !params.by_row) {
            const uint32_t shown = shown_columns(tile);
            fc::hide(s, 0, shown);
            fc::hide(s, 1, shown);
            return;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t from = place<boolean>(params.by_row ? first_row + lane / 4 + 8 * r : 0, 0) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 8; i++) {
                const uint32_t two = *(const uint16_t *)(tile + (from ^ 16 * (i / 2)) + i % 2 * 8);
                if ((two & 0x00ff) == 0) s[4 * i + 2 * r] = -INFINITY;
                if ((two & 0xff00) == 0) s[4 * i + 2 * r + 1] = -INFINITY;
            }
        }
    }

  private:
    const fc_tensor &mask;
    const mask_params &params;
    const schedule &all;

    /* A bit for each of this thread's numbers of a row (as columns_below has them), where all rows are the same: column
     * 2 i + e of thread t is key 8 i + 2 t + e. A lane looks at one column of each of the quad's four threads. */
    __device__ __forceinline__ uint32_t shown_columns(const uint8_t *row) const
    {
        const int lane = threadIdx.x % 32;
        uint32_t own = 0;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const bool is_column = BLOCK_N / 4 == 32 || lane < BLOCK_N / 4;
            const uint32_t columns =
                __ballot_sync(0xffffffffu, is_column && row[8 * (lane / 2) + 2 * t + lane % 2] != 0);
            if (lane % 4 == t) own = columns;
        }
        return own;
    }

    static constexpr int SLAB_BYTES = ROWS * 128; /* where there is more than one */
    template <class M> static constexpr int COLUMNS = mask_slab_bytes(M::dtype) / (int)sizeof(typename M::element);

    template <class M> static __device__ __forceinline__ uint32_t place(int row, int piece)
    {
        if (mask_slab_bytes(M::dtype) == 64) return (uint32_t)(row * 64 + 16 * (piece ^ row / 2 % 4));
        return (uint32_t)(piece / 8 * SLAB_BYTES + row * 128 + 16 * (piece % 8 ^ row % 8));
    }

    /* A mask's only row, by a warp that has few registers. */
    template <class M> __device__ __forceinline__ void copy_row(uint8_t *tile, const tile_work &work, int key) const
    {
        using element = typename M::element;
        const auto *row = row_of<const element>(mask, work.batch, work.head, 0);
#pragma unroll 1
        for (int column = threadIdx.x % 32; column < BLOCK_N; column += 32) {
            const int byte = column * (int)sizeof(element);
            const element one = key + column < all.seqlen_k ? row[(key + column) * mask.strides[3]] : element(0);
            *(element *)(tile + place<M>(0, byte / 16) + byte % 16) = one;
        }
    }

    /* Words of 32 bits, of a number or more; four rows' loads before their stores, and none of them under a condition,
     * or each would be waited for by itself. Rows past the end are the last, keys likewise. */
    template <class M>
    __device__ __forceinline__ void copy_rows(uint8_t *tile, const tile_work &work, int first_row, int key) const
    {
        using element = typename M::element;
        constexpr int EACH = 4 / (int)sizeof(element), WORDS = BLOCK_N / EACH, PER_LANE = (WORDS + 31) / 32;
        constexpr int AT_ONCE = 4;
        const int lane = threadIdx.x % 32, last_row = all.seqlen_q - 1, last_key = all.seqlen_k - 1;
        const auto *from = row_of<const element>(mask, work.batch, work.head, 0);
        int64_t keys[PER_LANE][EACH];
#pragma unroll
        for (int w = 0; w < PER_LANE; w++) {
#pragma unroll
            for (int e = 0; e < EACH; e++)
                keys[w][e] = min(key + (lane + 32 * w) * EACH + e, last_key) * mask.strides[3];
        }
#pragma unroll 1
        for (int i = 0; i < ROWS; i += AT_ONCE) {
            element each[AT_ONCE][PER_LANE][EACH];
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++) {
                const auto *row = from + min(first_row + i + r, last_row) * mask.strides[2];
#pragma unroll
                for (int w = 0; w < PER_LANE; w++) {
#pragma unroll
                    for (int e = 0; e < EACH; e++) each[r][w][e] = row[keys[w][e]];
                }
            }
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++) {
#pragma unroll
                for (int w = 0; w < PER_LANE; w++) {
                    const int word = lane + 32 * w;
                    if (word < WORDS) memcpy(tile + place<M>(i + r, word / 4) + word % 4 * 4, each[r][w], 4);
                }
            }
        }
    }
};

} // namespace fc

#endif /* FC_HOPPER_ATTN_MASK_CUH */
