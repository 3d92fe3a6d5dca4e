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

/* The registers of d as the assembler counts and as the compiler binds them, eight at a time. */
#define FC_D8    "%0, %1, %2, %3, %4, %5, %6, %7"
#define FC_D16   FC_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FC_D24   FC_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FC_D32   FC_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FC_D40   FC_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FC_D48   FC_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FC_D56   FC_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FC_D64   FC_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FC_D72   FC_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FC_D80   FC_D72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FC_D88   FC_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FC_D96   FC_D88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FC_D104  FC_D96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FC_D112  FC_D104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FC_D120  FC_D112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FC_D128  FC_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FC_BIND8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FC_BIND16                                                                                                      \
    FC_BIND8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FC_BIND24                                                                                                      \
    FC_BIND16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FC_BIND32                                                                                                      \
    FC_BIND24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FC_BIND40                                                                                                      \
    FC_BIND32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FC_BIND48                                                                                                      \
    FC_BIND40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FC_BIND56                                                                                                      \
    FC_BIND48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FC_BIND64                                                                                                      \
    FC_BIND56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FC_BIND72                                                                                                      \
    FC_BIND64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FC_BIND80                                                                                                      \
    FC_BIND72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FC_BIND88                                                                                                      \
    FC_BIND80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FC_BIND96                                                                                                      \
    FC_BIND88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FC_BIND104                                                                                                     \
    FC_BIND96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),           \
        "+f"(d[103])
#define FC_BIND112                                                                                                     \
    FC_BIND104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]),      \
        "+f"(d[111])
#define FC_BIND120                                                                                                     \
    FC_BIND112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]),      \
        "+f"(d[119])
#define FC_BIND128                                                                                                     \
    FC_BIND120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]),      \
        "+f"(d[127])

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
                     : FC_BIND##D                                                                                      \
                     : "l"(a), "l"(b), "n"(ACCUMULATE)                                                                 \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    template <int ACCUMULATE> __device__ __forceinline__ void wgmma_rs(float(&d)[D], const uint32_t *a, uint64_t b)    \
    {                                                                                                                  \
        asm volatile(FC_WGMMA_NAME(N) "{" FC_D##D "}, {%" #C0 ", %" #C1 ", %" #C2 ", %" #C3 "}, %" #C4 ", %" #C5       \
                                                  ", 1, 1, 1;"                                                         \
                     : FC_BIND##D                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACCUMULATE)                             \
                     : "memory");                                                                                      \
    }

/* Tiles of 32, 64 and 128 keys; head_dims of 64, 128 and 256. */
FC_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
FC_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
FC_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
FC_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

} // namespace fc

#endif /* FC_HOPPER_WGMMA_CUH */
