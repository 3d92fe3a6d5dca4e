/* cuda_bf16.h - in place of the CUDA Toolkit's: bfloat16 is the upper half of a float. */
#ifndef FC_EMULATOR_BF16_H
#define FC_EMULATOR_BF16_H

#include "emulator.h"

struct __nv_bfloat16 {
    uint16_t bits;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x)
{
    return x.bits;
}
inline float __uint_as_float(uint32_t x)
{
    float value;
    memcpy(&value, &x, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {(uint16_t)(bits >> 16 | 0x40)};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)}; /* to nearest, ties to even */
}

#endif /* FC_EMULATOR_BF16_H */
