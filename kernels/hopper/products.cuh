/*
 * products.cuh - the two matrix products of a warpgroup's 64 rows with a tile of keys, as tiles.cuh lays them.
 *
 * A caller fences before the first product and waits after the last (wgmma.cuh).
 */
#ifndef FC_HOPPER_PRODUCTS_CUH
#define FC_HOPPER_PRODUCTS_CUH

#include "common/variant.h"
#include "hopper/tiles.cuh"
#include "hopper/wgmma.cuh"

namespace fc {

/* s = query @ key.T for 64 rows, of a tile of ROWS, and a tile of keys. */
template <int ROWS> __device__ __forceinline__ void multiply_q_k(float (&s)[BLOCK_N / 2], uint64_t query, uint64_t key)
{
    /* Where there are masks, no register is left for query's descriptors, advanced, from one tile to the next. */
    uint32_t low = (uint32_t)query;
    if (HAS_MASKS) asm volatile("" : "+r"(low));
    query = query >> 32 << 32 | low;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        const uint64_t q = advance(query, d / 64 * ROWS * 128 + d % 64 * 2);
        const uint64_t k = advance(key, d / 64 * BLOCK_N * 128 + d % 64 * 2);
        if (d == 0) {
            wgmma_ss<0>(s, q, k);
        } else {
            wgmma_ss<1>(s, q, k);
        }
    }
    wgmma_commit();
}

/* out += p @ value. p: pairs of 16-bit probabilities, in the layout of s. */
__device__ __forceinline__ void multiply_p_v(float (&out)[HEAD_DIM / 2], const uint32_t (&p)[BLOCK_N / 4],
                                             uint64_t value)
{
#pragma unroll
    for (int j = 0; j < BLOCK_N; j += 16) wgmma_rs<1>(out, &p[j / 4], advance(value, j * 128));
    wgmma_commit();
}

} // namespace fc

#endif /* FC_HOPPER_PRODUCTS_CUH */
