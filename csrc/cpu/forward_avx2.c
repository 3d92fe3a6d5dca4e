/*
 * forward_avx2.c - the forward kernel for AVX2, FMA and F16C: 16 registers of 32 bytes hold 2 x 6 accumulators, 2
 * vectors of rows and a scalar.
 */
#include "cpu.h"
#if defined(__x86_64__)

#define FC_CPU_VECTOR_BYTES  32
#define FC_CPU_PANEL_VECTORS 2
#define FC_CPU_TEMPLATE      "forward_template.h"
#include "both_reals.h"

fc_status fc_cpu_forward_avx2(const fc_forward_args *args, const fc_plan *plan)
{
    return args->query.dtype == FC_FLOAT64 ? forward_double(args, plan) : forward_float(args, plan);
}

#endif /* __x86_64__ */
