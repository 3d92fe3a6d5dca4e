/*
 * forward_avx512.c - the forward kernel for AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes hold 4 x 6 accumulators,
 * 4 vectors of rows and a scalar.
 */
#include "cpu.h"
#if defined(__x86_64__)

#define FC_CPU_VECTOR_BYTES  64
#define FC_CPU_PANEL_VECTORS 4
#define FC_CPU_TEMPLATE      "forward_template.h"
#include "both_reals.h"

fc_status fc_cpu_forward_avx512(const fc_forward_args *args, const fc_plan *plan)
{
    return args->query.dtype == FC_FLOAT64 ? forward_double(args, plan) : forward_float(args, plan);
}

#endif /* __x86_64__ */
