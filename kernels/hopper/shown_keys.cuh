/*
 * shown_keys.cuh - which keys a mask that is the same for all rows, as a padding mask is, leaves at all: tiles of keys
 * before the first and after the last are not even copied. Where it changes nothing between them, as most do, they are
 * just another end of the keys, and the mask is not read again.
 *
 * A warp looks through it once, and remembers what it found for the next tile of the same row.
 */
#ifndef FC_HOPPER_SHOWN_KEYS_CUH
#define FC_HOPPER_SHOWN_KEYS_CUH

#include <limits.h>
#include <math.h>

#include "common/offsets.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/attn_mask.cuh"
#include "hopper/schedule.cuh"

namespace fc {

/* All keys that a mask shows to a tile's rows lie in first .. end - 1. If it is plain it shows all of these, and adds
 * nothing to their scores. */
struct shown_keys {
    int first, end;
    bool is_plain;
};

/* Leaves out tiles of keys before the first and after the last. */
__device__ __forceinline__ void narrow(tile_work &work, const shown_keys &shown)
{
    work.first = max(work.first, shown.first / BLOCK_N);
    work.end = max(work.first, min(work.end, (shown.end + BLOCK_N - 1) / BLOCK_N));
}

/* What is known of one row of a mask. In shared memory, since the warp that looks for it has few registers. */
struct known_keys {
    int row; /* -1: of none yet */
    shown_keys shown;
};

/* What a piece of a mask's row leaves: 16 bytes of it, or one number. all: each key, and adds nothing. */
template <class M> __device__ __forceinline__ shown shown_of(const uint4 &x)
{
    constexpr uint32_t PLAIN = M::dtype == FC_BOOL ? 0x01010101 : 0;
    if (!shows_any<M>(x.x) && !shows_any<M>(x.y) && !shows_any<M>(x.z) && !shows_any<M>(x.w)) return shown::none;
    return x.x == PLAIN && x.y == PLAIN && x.z == PLAIN && x.w == PLAIN ? shown::all : shown::some;
}
template <class M> __device__ __forceinline__ shown shown_of(typename M::element x)
{
    const float number = M::to_float(x);
    if (M::dtype == FC_BOOL) return number == 0 ? shown::none : number == 1 ? shown::all : shown::some;
    return number == -INFINITY ? shown::none : number == 0 ? shown::all : shown::some;
}

/* By one warp, which reads whole pieces, several of a lane at once, and then those at both ends number by number. */
template <class M, class Piece>
__device__ __forceinline__ shown_keys find_shown(const typename M::element *row, int64_t stride, int keys)
{
    constexpr int EACH = (int)(sizeof(Piece) / sizeof(typename M::element)), AT_ONCE = EACH > 1 ? 4 : 8;
    const int lane = threadIdx.x % 32, pieces = keys / EACH;
    int first = INT_MAX, last = 0, plain = 0; /* of the pieces that show any; how many show all */
#pragma unroll 1
    for (int i = 0; i < pieces; i += 32 * AT_ONCE) {
        Piece x[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) /* past the end the last one, again */
            x[k] = *(const Piece *)(row + min(i + 32 * k + lane, pieces - 1) * EACH * stride);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int begin = i + 32 * k;
            const shown shows = begin + lane < pieces ? shown_of<M>(x[k]) : shown::none;
            const uint32_t any = __ballot_sync(0xffffffffu, shows != shown::none);
            plain += __popc(__ballot_sync(0xffffffffu, shows == shown::all));
            if (any == 0) continue;
            first = min(first, begin + __ffs(any) - 1);
            last = begin + 31 - __clz(any);
        }
    }
    if (first > last) return {0, 0, true};
    /* Lanes 0 to 15 look at the numbers of the first, the others at those of the last. */
    shown shows = shown::none;
    if (lane % 16 < EACH) shows = shown_of<M>(row[((lane < 16 ? first : last) * EACH + lane % 16) * stride]);
    const uint32_t any = __ballot_sync(0xffffffffu, shows != shown::none);
    const uint32_t all = __ballot_sync(0xffffffffu, shows == shown::all);
    const int of_first = __popc(all & 0xffff), of_last = last > first ? __popc(all >> 16) : 0;
    const int between = plain - (of_first == EACH) - (of_last == EACH);
    const int first_key = first * EACH + __ffs(any) - 1, end_key = last * EACH + 16 - __clz(any);
    return {first_key, end_key, between * EACH + of_first + of_last == end_key - first_key};
}
template <class M>
__device__ __forceinline__ shown_keys find_shown(const tile_work &work, const fc_tensor &mask, const schedule &all)
{
    using element = typename M::element;
    const auto *row = row_of<const element>(mask, work.batch, work.head, 0);
    const bool is_aligned = mask.strides[3] == 1 && ((uintptr_t)row | all.seqlen_k * sizeof(element)) % 16 == 0;
    return is_aligned ? find_shown<M, uint4>(row, 1, all.seqlen_k)
                      : find_shown<M, element>(row, mask.strides[3], all.seqlen_k);
}

/* Sees to it that `known` is what a mask that is the same for all rows leaves to a tile of them. By one warp. */
template <class T>
__device__ __forceinline__ void know_shown(known_keys &known, const tile_work &work, const fc_tensor &mask,
                                           const mask_params &params, const schedule &all)
{
    const int row = work.batch * params.by_batch * (int)all.by_num_heads_q.divisor + work.head * params.by_head;
    if (row == known.row) return;
    __syncwarp();
    const shown_keys shown = is_of_bools(mask)          ? find_shown<boolean>(work, mask, all)
                             : mask.dtype == FC_FLOAT32 ? find_shown<float32>(work, mask, all)
                                                        : find_shown<T>(work, mask, all);
    if (threadIdx.x % 32 == 0) known = {row, shown};
    __syncwarp();
}

} // namespace fc

#endif /* FC_HOPPER_SHOWN_KEYS_CUH */
