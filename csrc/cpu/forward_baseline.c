/*
 * forward_baseline.c - the forward kernel for any machine: 16-byte vectors, which are SSE2 on x86-64 (16 registers) and
 * NEON on aarch64 (32), and plain C where there is neither.
 */
#include "cpu.h"

#define FC_CPU_VECTOR_BYTES  16
#define FC_CPU_PANEL_VECTORS 2
#define FC_CPU_TEMPLATE      "forward_template.h"
#include "both_reals.h"

fc_status fc_cpu_forward_baseline(const fc_forward_args *args, const fc_plan *plan)
{
    return args->query.dtype == FC_FLOAT64 ? forward_double(args, plan) : forward_float(args, plan);
}
