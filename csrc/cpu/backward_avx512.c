/*
 * backward_avx512.c - the backward kernel for AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes hold 4 x 6
 * accumulators, 4 vectors of rows and a scalar.
 */
#include "backward.h"
#if defined(__x86_64__)

#define FC_CPU_VECTOR_BYTES  64
#define FC_CPU_PANEL_VECTORS 4
#define FC_CPU_TEMPLATE      "backward_template.h"
#include "both_reals.h"

fc_status fc_cpu_backward_avx512(const fc_backward_args *args, const fc_plan *plan, void *workspace)
{
    return args->forward.query.dtype == FC_FLOAT64 ? backward_double(args, plan, workspace)
                                                   : backward_float(args, plan, workspace);
}

#endif /* __x86_64__ */
