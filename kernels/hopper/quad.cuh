/*
 * quad.cuh - what the four lanes of a quad, which share the rows of a wgmma result, do together.
 */
#ifndef FC_HOPPER_QUAD_CUH
#define FC_HOPPER_QUAD_CUH

#include <stdint.h>

namespace fc {

/* What the four lanes of a quad hold of a row, joined. */
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/*
 * x[b] of lane t goes to element t of what lane b returns: a 4 x 4 transposition within each quad, in two
 * exchanges, first between lanes that differ in bit 1, then in bit 0.
 */
__device__ __forceinline__ uint4 quad_transpose(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3)
{
    const bool bit0 = threadIdx.x & 1, bit1 = threadIdx.x & 2;
    const uint32_t other0 = __shfl_xor_sync(0xffffffffu, bit1 ? x0 : x2, 2);
    const uint32_t other1 = __shfl_xor_sync(0xffffffffu, bit1 ? x1 : x3, 2);
    const uint32_t own0 = bit1 ? x2 : x0, own1 = bit1 ? x3 : x1;
    /* low: from lane t & 1 of the quad; high: from lane (t & 1) + 2. */
    const uint32_t low0 = bit1 ? other0 : own0, high0 = bit1 ? own0 : other0;
    const uint32_t low1 = bit1 ? other1 : own1, high1 = bit1 ? own1 : other1;
    const uint32_t other_low = __shfl_xor_sync(0xffffffffu, bit0 ? low0 : low1, 1);
    const uint32_t other_high = __shfl_xor_sync(0xffffffffu, bit0 ? high0 : high1, 1);
    const uint32_t own_low = bit0 ? low1 : low0, own_high = bit0 ? high1 : high0;
    return bit0 ? make_uint4(other_low, own_low, other_high, own_high)
                : make_uint4(own_low, other_low, own_high, other_high);
}

} // namespace fc

#endif /* FC_HOPPER_QUAD_CUH */
