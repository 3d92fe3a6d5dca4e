/*
 * shown_keys.cuh - which keys a mask that is the same for all rows, as a padding mask is, leaves at all: tiles of keys
 * before the first and after the last are not even copied.
 *
 * A warp searches from both ends, 128 keys at a time, and remembers what it found for the next tile of the same row.
 */
#ifndef FC_HOPPER_SHOWN_KEYS_CUH
#define FC_HOPPER_SHOWN_KEYS_CUH

#include <math.h>

#include "common/offsets.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/attn_mask.cuh"
#include "hopper/schedule.cuh"

namespace fc {

/* Does this number of a mask leave its key visible? */
template <class M> __device__ __forceinline__ bool shows(float x)
{
    return M::dtype == FC_BOOL ? x != 0 : x != -INFINITY;
}

/* What is known of one row of a mask: all keys that it shows lie in first .. end - 1. In shared memory, since the warp
 * that looks for them has few registers. */
struct shown_keys {
    int row; /* -1: of none yet */
    int first, end;
};

/* By one warp. */
template <class M>
__device__ __forceinline__ void find_shown(shown_keys &known, const tile_work &work, const fc_tensor &mask,
                                           const schedule &all)
{
    constexpr int EACH = 4, SPAN = 32 * EACH; /* keys looked at in one go */
    const auto *row = row_of<const typename M::element>(mask, work.batch, work.head, 0);
    const int lane = threadIdx.x % 32;
    /* The bits of this lane's keys among those of a span. */
    const auto look = [&](int span) {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int key = span + EACH * lane + i;
            if (key >= all.seqlen_k) continue;
            if (shows<M>(M::to_float(row[key * mask.strides[3]]))) bits |= 1u << i;
        }
        return bits;
    };
    int first = 0, end = 0;
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
    __syncwarp();
    if (lane == 0) known.first = first, known.end = end;
    __syncwarp();
}

/* Narrows the tiles of keys work.first .. work.end - 1. By one warp, whose own `known` is. */
template <class T>
__device__ __forceinline__ void narrow(tile_work &work, shown_keys &known, const fc_tensor &mask,
                                       const mask_params &params, const schedule &all)
{
    if (mask.dtype == FC_NONE || params.by_row) return;
    const int row = work.batch * params.by_batch * (int)all.by_num_heads_q.divisor + work.head * params.by_head;
    if (row != known.row) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) known.row = row;
        if (MASK == mask_class::unbiased || mask.dtype == FC_BOOL) {
            find_shown<boolean>(known, work, mask, all);
        } else if (mask.dtype == FC_FLOAT32) {
            find_shown<float32>(known, work, mask, all);
        } else {
            find_shown<T>(known, work, mask, all);
        }
    }
    work.first = max(work.first, known.first / BLOCK_N);
    work.end = max(work.first, min(work.end, (known.end + BLOCK_N - 1) / BLOCK_N));
}

} // namespace fc

#endif /* FC_HOPPER_SHOWN_KEYS_CUH */
