/* cuda_fp16.h - in place of the CUDA Toolkit's: float16 is the compiler's _Float16, as bits. */
#ifndef FC_EMULATOR_FP16_H
#define FC_EMULATOR_FP16_H

#include "emulator.h"

struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(uint16_t x)
{
    return {x};
}
inline uint16_t __half_as_ushort(__half x)
{
    return x.bits;
}
inline float __half2float(__half x)
{
    _Float16 value;
    memcpy(&value, &x, 2);
    return (float)value;
}
inline __half __float2half_rn(float x)
{
    const _Float16 value = (_Float16)x;
    __half half;
    memcpy(&half, &value, 2);
    return half;
}

#endif /* FC_EMULATOR_FP16_H */
