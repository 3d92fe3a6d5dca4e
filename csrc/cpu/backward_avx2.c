/*
 * backward_avx2.c - the backward kernel for AVX2, FMA and F16C: 16 registers of 32 bytes hold 2 x 6 accumulators, 2
 * vectors of rows and a scalar.
 */
#include "backward.h"
#if defined(__x86_64__)

#define FC_CPU_VECTOR_BYTES  32
#define FC_CPU_PANEL_VECTORS 2
#define FC_CPU_TEMPLATE      "backward_template.h"
#include "both_reals.h"

fc_status fc_cpu_backward_avx2(const fc_backward_args *args, const fc_plan *plan, void *workspace)
{
    return args->forward.query.dtype == FC_FLOAT64 ? backward_double(args, plan, workspace)
                                                   : backward_float(args, plan, workspace);
}

#endif /* __x86_64__ */
