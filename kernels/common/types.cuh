/*
 * types.cuh - the storage types: how each dtype of variants.def is held in memory, and its way to float32 and back.
 *
 * Arrays hold plain bits (uint16_t for the two 16-bit formats), and arithmetic is float32 everywhere, so
 * a kernel meets a dtype only where it loads or stores. bfloat16 is the upper half of a float32, which makes its
 * load a shift on every architecture.
 */
#ifndef FC_COMMON_TYPES_CUH
#define FC_COMMON_TYPES_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "kernels.h"

namespace fc {

struct float16 {
    using element = uint16_t;
    static constexpr int32_t dtype = FC_FLOAT16;
    static __device__ __forceinline__ float to_float(element x) { return __half2float(__ushort_as_half(x)); }
    static __device__ __forceinline__ element from_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct bfloat16 {
    using element = uint16_t;
    static constexpr int32_t dtype = FC_BFLOAT16;
    static __device__ __forceinline__ float to_float(element x) { return __uint_as_float((uint32_t)x << 16); }
    static __device__ __forceinline__ element from_float(float x)
    {
        return __bfloat16_as_ushort(__float2bfloat16_rn(x));
    }
};

struct float32 {
    using element = float;
    static constexpr int32_t dtype = FC_FLOAT32;
    static __device__ __forceinline__ float to_float(element x) { return x; }
    static __device__ __forceinline__ element from_float(float x) { return x; }
};

/* Masks only: one byte, zero or not. */
struct boolean {
    using element = uint8_t;
    static constexpr int32_t dtype = FC_BOOL;
    static __device__ __forceinline__ float to_float(element x) { return x; }
};

/* Four neighbours, moved by one instruction of 8 or 16 bytes. */
template <class T> struct alignas(4 * sizeof(typename T::element)) four {
    typename T::element x[4];
};

} // namespace fc

#endif /* FC_COMMON_TYPES_CUH */
