/*
 * attn_mask.cuh - one tile of attn_mask in the registers of the threads that hold its scores.
 *
 * A thread's numbers of a tile are of two rows, g and g + 8, and of the key pairs 8 i + 2 t, 8 i + 2 t + 1 (wgmma.cuh).
 * A mask of the query's dtype is kept as it is, in pairs; a bool mask as a bit for each number, and so is what a float
 * mask hides with -inf. Float32 masks are read where they are added.
 *
 * The trick is to load a tile while the one before it is multiplied or in the softmax: the loads are 16 bytes wide, of
 * which the four lanes of a quad trade parts, and a warpgroup whose rows see nothing of a tile does not multiply it.
 * Where strides or the tile's end forbid wide loads, numbers are read one by one.
 */
#ifndef FC_HOPPER_ATTN_MASK_CUH
#define FC_HOPPER_ATTN_MASK_CUH

#include <math.h>

#include "common/offsets.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/quad.cuh"
#include "hopper/schedule.cuh"

namespace fc {

/* Does this number of a mask leave its key visible? */
template <class M> __device__ __forceinline__ bool shows(float x)
{
    return M::dtype == FC_BOOL ? x != 0 : x != -INFINITY;
}

/* Is a pair of 16-bit floats -inf twice? */
template <class T> __device__ __forceinline__ bool is_hidden_pair(uint32_t pair)
{
    return pair == (T::dtype == FC_FLOAT16 ? 0xfc00fc00u : 0xff80ff80u);
}

/* The lowest bit of each byte that is not zero, as four bits. */
__device__ __forceinline__ uint32_t bits_of_bytes(uint32_t bytes)
{
    /* The product has byte k's bit at 24 + k, and no two others in one place. */
    return (__vminu4(bytes, 0x01010101u) * 0x01020408u >> 24) & 0xf;
}

/* Of 32 columns' bits those of lane t of the quad, columns 8 i + 2 t and 8 i + 2 t + 1, side by side. */
__device__ __forceinline__ uint32_t own_columns(uint32_t columns, int t)
{
    const uint32_t pairs = columns >> 2 * t & 0x03030303u;
    return (pairs | pairs >> 6 | pairs >> 12 | pairs >> 18) & 0xff;
}

/* What a thread's two rows of a tile of the output see of the mask, one tile of keys after another. With KEEPS_TWO the
 * next tile may be fetched once this one is resolved, else once it was added. */
template <class T, bool KEEPS_TWO> struct attn_mask_tile {
    uint32_t visible[2];        /* a bit for each of a row's BLOCK_N / 4 numbers */
    uint32_t bias[BLOCK_N / 4]; /* pairs, in the layout of s; of a mask of dtype T only */

    /* row: this thread's first. A row beyond the last is read as the last: what it gives is of no use to anybody. */
    __device__ __forceinline__ attn_mask_tile(const fc_tensor &mask, const schedule &all, const tile_work &work,
                                              int row)
        : mask(mask), seqlen_k(all.seqlen_k)
    {
        visible[0] = visible[1] = 0xffffffffu;
        if (mask.dtype == FC_NONE) return;
        const int bytes = mask.dtype == FC_BOOL ? 1 : mask.dtype == FC_FLOAT32 ? 4 : 2;
#pragma unroll
        for (int r = 0; r < 2; r++)
            rows[r] = (const uint8_t *)mask.data +
                      row_offset(mask, work.batch, work.head, min(row + 8 * r, all.seqlen_q - 1)) * bytes;
        /* Pieces of 16 bytes of a row; of float32, pairs. */
        const int piece = mask.dtype == FC_FLOAT32 ? 8 : 16;
        const int64_t offsets = (mask.strides[0] | mask.strides[1] | mask.strides[2]) * bytes | (intptr_t)mask.data;
        rows_are_wide =
            mask.strides[3] == 1 && (offsets & (piece - 1)) == 0 && (mask.dtype != FC_BOOL || BLOCK_N >= 64);
    }

    /* Begins to load a tile, whose first key is `key`; resolve() ends it. */
    __device__ __forceinline__ void fetch(int key)
    {
        if (mask.dtype == FC_NONE || mask.dtype == FC_FLOAT32 || !is_wide(key)) return;
        const int bytes = mask.dtype == FC_BOOL ? 1 : 2;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint8_t *at = rows[r] + key * bytes + threadIdx.x % 4 * 16;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 32; i++) {
                if (mask.dtype == FC_BOOL && i >= BLOCK_N / 64) break;
                const uint4 sixteen = *(const uint4 *)(at + 64 * i);
                uint32_t *into = &fetched()[4 * (2 * i + r)];
                into[0] = sixteen.x, into[1] = sixteen.y, into[2] = sixteen.z, into[3] = sixteen.w;
            }
        }
    }

    /* Returns whether this thread sees any of the tile. */
    __device__ __forceinline__ bool resolve(int key)
    {
        if (mask.dtype == FC_NONE) return true;
        const bool wide = is_wide(key);
        if (mask.dtype == FC_FLOAT32) {
            visible[0] = visible[1] = 0;
            each_float<4>(key, [&](int r, int c, float x) { visible[r] |= (uint32_t)shows<float32>(x) << c; });
        } else if (mask.dtype == FC_BOOL && wide) {
            resolve_bool();
        } else if (mask.dtype == FC_BOOL) {
            visible[0] = visible[1] = 0;
            each<boolean, 4>(key, [&](int r, int c, float x) { visible[r] |= (uint32_t)shows<boolean>(x) << c; });
        } else {
            if (wide) {
                trade_pairs();
            } else {
#pragma unroll
                for (int i = 0; i < BLOCK_N / 4; i++) bias[i] = 0;
                each<raw>(key, [&](int r, int c, uint16_t x) { bias[2 * (c / 2) + r] |= (uint32_t)x << 16 * (c % 2); });
            }
            bool sees_any = false; /* where it sees some, the sums are -inf where they should */
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; i++) sees_any |= !is_hidden_pair<T>(bias[i]);
            visible[0] = visible[1] = sees_any ? 0xffffffffu : 0;
        }
        return (visible[0] | visible[1]) != 0;
    }

    /* s in natural units = unit * s + the mask, where it is of floats; visible tells the rest. */
    __device__ __forceinline__ void add(float (&s)[BLOCK_N / 2], float unit, int key) const
    {
        if (mask.dtype == T::dtype) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; i++) {
                s[2 * i] = fmaf(s[2 * i], unit, T::to_float((uint16_t)bias[i]));
                s[2 * i + 1] = fmaf(s[2 * i + 1], unit, T::to_float((uint16_t)(bias[i] >> 16)));
            }
        } else {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; i++) s[i] *= unit;
            if (mask.dtype == FC_FLOAT32)
                each_float<BLOCK_N / 4>(key, [&](int r, int c, float x) { s[4 * (c / 2) + 2 * r + c % 2] += x; });
        }
    }

  private:
    uint32_t next[KEEPS_TWO ? BLOCK_N / 4 : 1]; /* as it was loaded */
    const fc_tensor &mask;
    const int seqlen_k;
    const uint8_t *rows[2]; /* element 0 */
    bool rows_are_wide;

    __device__ __forceinline__ uint32_t *fetched() { return KEEPS_TWO ? next : bias; }

    /* Can this tile's part of the rows be read in pieces? */
    __device__ __forceinline__ bool is_wide(int key) const { return rows_are_wide && key + BLOCK_N <= seqlen_k; }

    /* Calls use(r, c, number) for each of this thread's numbers that lies before the end of the keys. */
    template <class M, int UNROLL = BLOCK_N / 4, class Use> __device__ __forceinline__ void each(int key, Use use) const
    {
        const int first = key + threadIdx.x % 4 * 2, keys = seqlen_k - first;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const auto *at = (const typename M::element *)rows[r] + first * mask.strides[3];
#pragma unroll UNROLL
            for (int c = 0; c < BLOCK_N / 4; c++) {
                const int column = 8 * (c / 2) + c % 2;
                if (column < keys) use(r, c, M::to_float(at[column * mask.strides[3]]));
            }
        }
    }
    template <int UNROLL, class Use> __device__ __forceinline__ void each_float(int key, Use use) const
    {
        if (!is_wide(key)) return each<float32, UNROLL>(key, use);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const auto *at = (const float2 *)rows[r] + key / 2 + threadIdx.x % 4;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 8; i++) {
                const float2 pair = at[4 * i];
                use(r, 2 * i, pair.x);
                use(r, 2 * i + 1, pair.y);
            }
        }
    }

    /* From the 16 bytes of each lane to the bits of its columns: lane t holds bytes 64 i + 16 t of a row. */
    __device__ __forceinline__ void resolve_bool()
    {
        const int t = threadIdx.x % 4;
        visible[0] = visible[1] = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 64; i++) {
                const uint32_t *bytes = &fetched()[4 * (2 * i + r)];
                const uint32_t sixteen = bits_of_bytes(bytes[0]) | bits_of_bytes(bytes[1]) << 4 |
                                         bits_of_bytes(bytes[2]) << 8 | bits_of_bytes(bytes[3]) << 12;
                const uint32_t own = sixteen << 16 * (t % 2);
                const uint32_t half = own | __shfl_xor_sync(0xffffffffu, own, 1);
                const uint32_t other = __shfl_xor_sync(0xffffffffu, half, 2);
                const uint32_t low = t < 2 ? half : other, high = t < 2 ? other : half;
                visible[r] |= (own_columns(low, t) | own_columns(high, t) << 8) << 16 * i;
            }
        }
    }

    /* From columns 32 i + 8 t .. + 7 in lane t to the pairs of its columns. */
    __device__ __forceinline__ void trade_pairs()
    {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 32; i++) {
            uint4 own[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint32_t *eight = &fetched()[4 * (2 * i + r)];
                own[r] = quad_transpose(eight[0], eight[1], eight[2], eight[3]);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bias[8 * i + r] = own[r].x, bias[8 * i + 2 + r] = own[r].y;
                bias[8 * i + 4 + r] = own[r].z, bias[8 * i + 6 + r] = own[r].w;
            }
        }
    }

    struct raw {
        using element = uint16_t;
        static __device__ __forceinline__ uint16_t to_float(element x) { return x; }
    };
};

/*
 * Where all rows see the same of the mask, as under a padding mask: the tiles of keys work.first .. work.end - 1, less
 * those before the first and after the last key that it shows. By one warp. What was found is kept for the next tile of
 * the same row of the mask.
 */
template <class T> struct shown_keys {
    const void *row = nullptr; /* of which the following is known */
    int first = 0, end = 0;    /* keys */

    __device__ __forceinline__ void narrow(tile_work &work, const fc_tensor &mask, const schedule &all)
    {
        if (mask.dtype == FC_NONE || (mask.strides[2] != 0 && all.seqlen_q > 1)) return;
        if (mask.dtype == FC_BOOL) {
            find<boolean>(work, mask, all);
        } else if (mask.dtype == FC_FLOAT32) {
            find<float32>(work, mask, all);
        } else {
            find<T>(work, mask, all);
        }
        work.first = max(work.first, first / BLOCK_N);
        work.end = max(work.first, min(work.end, (end + BLOCK_N - 1) / BLOCK_N));
    }

  private:
    static constexpr int EACH = 4, SPAN = 32 * EACH; /* keys looked at in one go */

    template <class M>
    __device__ __forceinline__ void find(const tile_work &work, const fc_tensor &mask, const schedule &all)
    {
        const auto *at = row_of<const typename M::element>(mask, work.batch, work.head, 0);
        if (at == row) return;
        row = at;
        const int lane = threadIdx.x % 32;
        /* The bits of this lane's keys among those of a span. */
        const auto look = [&](int span) {
            uint32_t bits = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int key = span + EACH * lane + i;
                if (key >= all.seqlen_k) continue;
                if (shows<M>(M::to_float(at[key * mask.strides[3]]))) bits |= 1u << i;
            }
            return bits;
        };
        first = end = 0;
        for (int span = 0; span < all.seqlen_k; span += SPAN) {
            const uint32_t bits = look(span), lanes = __ballot_sync(0xffffffffu, bits != 0);
            if (lanes == 0) continue;
            const int one = __ffs(lanes) - 1;
            first = span + EACH * one + __ffs(__shfl_sync(0xffffffffu, bits, one)) - 1;
            break;
        }
        for (int span = (all.seqlen_k - 1) / SPAN * SPAN; span >= 0; span -= SPAN) {
            const uint32_t bits = look(span), lanes = __ballot_sync(0xffffffffu, bits != 0);
            if (lanes == 0) continue;
            const int one = 31 - __clz(lanes);
            end = span + EACH * one + 32 - __clz(__shfl_sync(0xffffffffu, bits, one));
            break;
        }
    }
};

} // namespace fc

#endif /* FC_HOPPER_ATTN_MASK_CUH */
