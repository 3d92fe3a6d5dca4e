/*
 * softmax.cuh - the online softmax of the two rows that a thread shares with its quad in a wgmma result.
 *
 * s [N / 2] holds row g in s[4 i] and s[4 i + 1], row g + 8 in s[4 i + 2] and s[4 i + 3] (wgmma.cuh). p takes the
 * probabilities exp(score - reference), rounded to 16 bits, in pairs. A row's sum is kept per thread and joined
 * at the end.
 *
 * The trick is to need no maximum. Any reference gives the same quotient as long as nothing overflows or vanishes, so a
 * row takes it from a few scores of the first tile it sees, and weighs each tile by it at once; only where the
 * tile's own sum says that some score passed the reference by far is its maximum looked for, out rescaled and the tile
 * weighed again. Half the work of the classical softmax (its comparisons, and the rescaling of out) falls away.
 *
 * A bias often leaves a row one key, whose weight must then be 1 to the last bit, as only the reference's own is: so
 * biased calls, in which a reference is passed more often, look for the maximum sooner, and general ones always. (To a
 * row with one key in a mask of bools that key is the reference.)
 */
#ifndef FC_HOPPER_SOFTMAX_CUH
#define FC_HOPPER_SOFTMAX_CUH

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "hopper/quad.cuh"

namespace fc {

constexpr float LOG2_E = 1.4426950408889634f;

/* Two float32 as one register of two 16-bit numbers, the first in the lower half. */
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high)
{
    return T::dtype == FC_FLOAT16 ? cvt_rn_f16x2(high, low) : cvt_rn_bf16x2(high, low);
}

struct online_softmax {
    /* The reference of a row that has seen nothing. It is its own offset: hidden scores weigh 0 by it, and any other
     * more than float32 holds, which has the maximum looked for. But where a mask of floats is added scores may be just
     * that: there its offset is NaN, which always has the maximum looked for. */
    static constexpr float NOTHING = -FLT_MAX;
    static constexpr bool MAY_ADD_LEAST = MASK == mask_class::biased || MASK == mask_class::general;

    float reference[2]; /* in the units of s */
    float sum[2];       /* this thread's part of the sum of exp(score - reference) */
    float offset[2];    /* log2(e) * reference in natural units, or NaN where that would round too much (take_offset) */

    __device__ __forceinline__ online_softmax() : reference{NOTHING, NOTHING}, sum{0, 0}, offset{} {}

    /* For a row that has seen nothing: any of its scores will do that is not far below the largest, so the largest of a
     * few. The few are a tile's first keys, of which a causal row sees at least one. */
    template <int COUNT> __device__ __forceinline__ void take_reference(const float (&s)[COUNT], float unit_log2)
    {
        constexpr int FEW = COUNT < 32 ? COUNT : 32;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float max = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
            for (int i = 4; i < FEW; i += 4) max = fmaxf(max, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
            max = quad_max(max);
            if (reference[r] == NOTHING) reference[r] = fmaxf(NOTHING, max);
        }
        take_offset(unit_log2);
    }

    /*
     * A tile's scores to weights; s is used up. unit_log2 is (the unit of s) * log2(e), positive. Scores of float32's
     * finfo.min, from a mask, are no harm: their product is -inf, unless they are the row's reference, which is then
     * subtracted first.
     * settle(): called before p and out are touched, which a product may use until then: when all exponentials are
     * there, in general calls when the maximum is.
     */
    template <class T, int COUNT, int OUT, class Settle>
    __device__ __forceinline__ void step(float (&s)[COUNT], uint32_t (&p)[COUNT / 2], float (&out)[OUT],
                                         float unit_log2, Settle settle)
    {
        float tile_sum[2];
        if constexpr (MASK == mask_class::general) {
            take_maximum(s, out, unit_log2, settle);
            take_offset(unit_log2);
            if (__any_sync(0xffffffffu, isnan(offset[0] + offset[1]))) subtract_reference(s);
            weigh<T>(s, p, tile_sum, unit_log2);
        } else {
            uint32_t next[COUNT / 2];
            weigh<T>(s, next, tile_sum, unit_log2);
            settle();
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) p[i] = next[i];
            if (!__all_sync(0xffffffffu, tile_sum[0] < MOST && tile_sum[1] < MOST)) { /* or NaN */
                take_maximum(s, out, unit_log2, [] {});
                subtract_reference(s);
                weigh<T>(s, p, tile_sum, unit_log2);
                take_offset(unit_log2);
            }
        }
        sum[0] += tile_sum[0];
        sum[1] += tile_sum[1];
    }

  private:
    /* The classical step's first half: the reference becomes the maximum so far, and sum and out follow it. */
    template <int COUNT, int OUT, class Settle>
    __device__ __forceinline__ void take_maximum(const float (&s)[COUNT], float (&out)[OUT], float unit_log2,
                                                 Settle settle)
    {
        float next[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
            for (int i = 4; i < COUNT; i += 4) {
                even = fmaxf(even, s[i + 2 * r]);
                odd = fmaxf(odd, s[i + 2 * r + 1]);
            }
            next[r] = fmaxf(reference[r], quad_max(fmaxf(even, odd)));
        }
        const bool grows = __any_sync(0xffffffffu, next[0] != reference[0] || next[1] != reference[1]);
        float shrink[2];
        if (grows) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                shrink[r] = ex2_approx_ftz((reference[r] - next[r]) * unit_log2);
                sum[r] *= shrink[r];
                reference[r] = next[r];
            }
        }
        settle();
        if (grows) {
#pragma unroll
            for (int i = 0; i < OUT; i++) out[i] *= shrink[i / 2 % 2];
        }
    }

    /* What a thread's part of a tile may sum to: a quarter of float16's range, which no single weight then passes. In a
     * biased call less: a key that outweighs the reference by more becomes the reference. */
    static constexpr float MOST = MASK == mask_class::biased ? 256 : 16384;
    /* One fused multiply-add gives x * unit - reference * unit, but with the rounding of the latter, 2^-25 of it: up to
     * here less than what rounding p costs; the classical step has no cause to let lse lose so much. Rows beyond
     * subtract first. */
    static constexpr float LARGE = MASK == mask_class::general ? 128 : 4096;
    __device__ __forceinline__ void take_offset(float unit_log2)
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float exact = reference[r] * unit_log2;
            offset[r] = fabsf(exact) < LARGE ? exact : NAN;
            if (!MAY_ADD_LEAST && reference[r] == NOTHING) offset[r] = NOTHING;
        }
    }

    /* s becomes s - reference, and offset none: exact also where reference * unit is large. */
    template <int COUNT> __device__ __forceinline__ void subtract_reference(float (&s)[COUNT])
    {
#pragma unroll
        for (int i = 0; i < COUNT; i++) s[i] -= reference[i / 2 % 2];
        offset[0] = offset[1] = 0;
    }

    /* p = exp(unit * s - offset) and its sums. */
    template <class T, int COUNT>
    __device__ __forceinline__ void weigh(const float (&s)[COUNT], uint32_t (&p)[COUNT / 2], float (&tile_sum)[2],
                                          float unit_log2) const
    {
        float first[2] = {}, second[2] = {}; /* two chains: a warp is alone on its scheduler with their latency */
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const int r = i / 2 % 2;
            const float x = ex2_approx_ftz(fmaf(s[i], unit_log2, -offset[r]));
            const float y = ex2_approx_ftz(fmaf(s[i + 1], unit_log2, -offset[r]));
            first[r] += x;
            second[r] += y;
            p[i / 2] = pack<T>(x, y);
        }
        tile_sum[0] = first[0] + second[0];
        tile_sum[1] = first[1] + second[1];
    }
};

} // namespace fc

#endif /* FC_HOPPER_SOFTMAX_CUH */
