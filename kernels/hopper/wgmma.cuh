/*
 * wgmma.cuh - the tensor cores of sm_90a: d [64, N] += a [64, 16] @ b [16, N], issued by one warpgroup.
 *
 * N is read off d, of which a thread holds N / 2 numbers. With warp w of the warpgroup, g = lane / 4 and
 * t = lane % 4, d[4 i + e] is row 16 w + g + 8 (e / 2), column 8 i + 2 t + e % 2. An `a` in registers has the
 * same layout in 16-bit pairs, so that two column groups of a finished d are the next product's `a`.
 *
 * An operand in shared memory is named by a descriptor. Every tile here lies as the copy engine's 128-byte
 * swizzle leaves it: slabs of 64 columns, a slab's rows of 128 bytes one after the other, its base
 * aligned to 1024 bytes. One step of 16 along a row is 32 bytes further, one of 16 rows 2048.
 *
 * The product is asynchronous. Between wgmma_fence and the wgmma_wait that covers it no thread may touch d or the
 * registers of a; hold() tells the compiler so.
 */
#ifndef FC_HOPPER_WGMMA_CUH
#define FC_HOPPER_WGMMA_CUH

#include <stdint.h>

#include "common/variant.h"

namespace fc {

/* Earlier register and shared-memory accesses of the warpgroup come before its next products. */
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most PENDING committed groups are unfinished. */
template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Pins registers that a product reads or writes behind the compiler's back to this point of the program. */
template <int COUNT> __device__ __forceinline__ void hold(float (&x)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int COUNT> __device__ __forceinline__ void hold(uint32_t (&x)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(x[i])::"memory");
}

/* Descriptor of a tile whose slabs are slab_bytes apart (which only transposed operands ask for). */
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t smem, uint32_t slab_bytes)
{
    const uint64_t swizzle_128 = (uint64_t)1 << 62;
    const uint64_t eight_rows = (uint64_t)(1024 >> 4) << 32;
    return swizzle_128 | eight_rows | (uint64_t)(slab_bytes >> 4) << 16 | (smem & 0x3ffff) >> 4;
}
/* The same tile, `bytes` further on. */
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes)
{
    return descriptor + (bytes >> 4);
}

/* d's registers as the assembler counts them: FC_TEN(1) is %10 to %19, FC_TEN() %0 to %9. */
#define FC_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FC_D30    FC_TEN() ", " FC_TEN(1) ", " FC_TEN(2)
#define FC_D60    FC_D30 ", " FC_TEN(3) ", " FC_TEN(4) ", " FC_TEN(5)
#define FC_D90    FC_D60 ", " FC_TEN(6) ", " FC_TEN(7) ", " FC_TEN(8)
#define FC_D120   FC_D90 ", " FC_TEN(9) ", " FC_TEN(10) ", " FC_TEN(11)
#define FC_D32    FC_D30 ", %30, %31"
#define FC_D64    FC_D60 ", %60, %61, %62, %63"
#define FC_D128   FC_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"
/* And as the compiler binds them. */
#define FC_BIND4(i)   "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FC_BIND16(i)  FC_BIND4(i), FC_BIND4(i + 4), FC_BIND4(i + 8), FC_BIND4(i + 12)
#define FC_BIND32(i)  FC_BIND16(i), FC_BIND16(i + 16)
#define FC_BIND64(i)  FC_BIND32(i), FC_BIND32(i + 32)
#define FC_BIND128(i) FC_BIND64(i), FC_BIND64(i + 64)

#define FC_PTX_float16              "f16"
#define FC_PTX_bfloat16             "bf16"
#define FC_PTX_TYPE_EXPANDED(dtype) FC_PTX_##dtype
#define FC_PTX_TYPE(dtype)          FC_PTX_TYPE_EXPANDED(dtype)
#define FC_WGMMA_NAME(N)                                                                                               \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FC_PTX_TYPE(FC_DTYPE) "." FC_PTX_TYPE(FC_DTYPE) " "

/*
 * For one N and its D = N / 2 registers, both with d = a @ b where ACCUMULATE is 0:
 * wgmma_ss(d, a, b): a and b in shared memory, the rows of both along K;
 * wgmma_rs(d, a, b): a in registers, the rows of b along N.
 * C0 to C5 are the numbers after d's registers. The trailing immediates are: accumulate, +a, +b, a as it is, b as it
 * is (0) or transposed (1).
 */
#define FC_WGMMA(N, D, C0, C1, C2, C3, C4, C5)                                                                         \
    template <int ACCUMULATE> __device__ __forceinline__ void wgmma_ss(float(&d)[D], uint64_t a, uint64_t b)           \
    {                                                                                                                  \
        asm volatile(FC_WGMMA_NAME(N) "{" FC_D##D "}, %" #C0 ", %" #C1 ", %" #C2 ", 1, 1, 0, 0;"                       \
                     : FC_BIND##D(0)                                                                                   \
                     : "l"(a), "l"(b), "n"(ACCUMULATE)                                                                 \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    template <int ACCUMULATE> __device__ __forceinline__ void wgmma_rs(float(&d)[D], const uint32_t *a, uint64_t b)    \
    {                                                                                                                  \
        asm volatile(FC_WGMMA_NAME(N) "{" FC_D##D "}, {%" #C0 ", %" #C1 ", %" #C2 ", %" #C3 "}, %" #C4 ", %" #C5       \
                                                  ", 1, 1, 1;"                                                         \
                     : FC_BIND##D(0)                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACCUMULATE)                             \
                     : "memory");                                                                                      \
    }

/* Tiles of 64 and 128 keys; head_dims of 64, 128 and 256. */
FC_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
FC_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
FC_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

} // namespace fc

#endif /* FC_HOPPER_WGMMA_CUH */
