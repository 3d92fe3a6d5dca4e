/*
 * backward_baseline.c - the backward kernel for any machine: 16-byte vectors, which are SSE2 on x86-64 (16 registers)
 * and NEON on aarch64 (32), and plain C where there is neither.
 */
#include "backward.h"

#define FC_CPU_VECTOR_BYTES  16
#define FC_CPU_PANEL_VECTORS 2
#define FC_CPU_TEMPLATE      "backward_template.h"
#include "both_reals.h"

fc_status fc_cpu_backward_baseline(const fc_backward_args *args, const fc_plan *plan, void *workspace)
{
    return args->forward.query.dtype == FC_FLOAT64 ? backward_double(args, plan, workspace)
                                                   : backward_float(args, plan, workspace);
}
