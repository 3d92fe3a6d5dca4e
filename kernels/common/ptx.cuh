/*
 * ptx.cuh - one PTX instruction per function, under the instruction's name.
 */
#ifndef FC_COMMON_PTX_CUH
#define FC_COMMON_PTX_CUH

/* ex2.approx.ftz.f32 d, a;  2^a within 2 ulp, the same unit and error as exp2f. A result under 2^-126 becomes 0;
 * -inf gives 0, NaN gives NaN. */
static __device__ __forceinline__ float ex2_approx_ftz(float a)
{
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

#endif /* FC_COMMON_PTX_CUH */
