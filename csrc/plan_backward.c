/*
 * plan_backward.c - plan.c for the backward: problem + device facts -> kernel, tiles, workspace. As pure.
 *
 * A CPU row of plan.c's table is an instruction set, and serves both directions. CUDA rows are forward kernels.
 */
#include <inttypes.h>
#include <string.h>

#include "cpu/backward.h"
#include "internal.h"

/* Says which condition failed first, and what is there. */
static fc_status refuse(const fc_backward_problem *problem, const fc_device *device)
{
    char there[1024] = "";
    bool is_named = false;
    if (device->type != FC_CPU)
        return fc_fail(FC_UNSUPPORTED, "this build has no backward kernel for GPUs; move the arrays to the CPU, where "
                                       "every dtype and option is served");
    for (int32_t i = 0; i < fc_num_kernels; i++) {
        if (!fc_kernel_runs_on(&fc_kernels[i], device)) continue;
        is_named = is_named || fc_kernel_is_named(&fc_kernels[i], problem->kernel);
        fc_append(there, sizeof there, fc_kernels[i].name);
    }
    if (!is_named)
        return fc_fail(FC_INVALID,
                       "kernel '%s' is forced, but the CPU has no such backward kernel or family here; there are: %s",
                       problem->kernel, there);
    return fc_fail(FC_INVALID,
                   "block_m=%" PRId32 ", block_n=%" PRId32 ": no such tile for this problem's backward on the CPU; "
                   "there are (block_m, block_n): (%d, %d); 0 lets the library choose",
                   problem->block_m, problem->block_n, FC_CPU_BACKWARD_BLOCK_M, FC_CPU_BACKWARD_BLOCK_N);
}

static bool serves(const fc_kernel *kernel, const fc_backward_problem *problem, const fc_device *device)
{
    return device->type == FC_CPU && fc_kernel_runs_on(kernel, device) && fc_kernel_is_named(kernel, problem->kernel) &&
           (problem->block_m == 0 || problem->block_m == FC_CPU_BACKWARD_BLOCK_M) &&
           (problem->block_n == 0 || problem->block_n == FC_CPU_BACKWARD_BLOCK_N);
}

fc_status fc_plan_backward(const fc_backward_problem *problem, const fc_attention_problem *forward,
                           const fc_backward_args *args, const fc_device *device, fc_plan *plan)
{
    if (device->type != forward->device_type)
        return fc_fail(FC_INVALID, "the problem is for device_type %d and the device given is of type %d",
                       forward->device_type, device->type);
    int32_t chosen = 0;
    while (chosen < fc_num_kernels && !serves(&fc_kernels[chosen], problem, device)) chosen++;
    if (chosen == fc_num_kernels) return refuse(problem, device);

    memset(plan, 0, sizeof *plan);
    plan->struct_size = sizeof *plan;
    plan->kernel = chosen;
    plan->block_m = FC_CPU_BACKWARD_BLOCK_M;
    plan->block_n = FC_CPU_BACKWARD_BLOCK_N;
    plan->num_splits = 1;
    plan->grid = fc_cpu_backward_tasks(args).total;
    plan->workspace_bytes = fc_cpu_backward_layout(args).bytes;
    plan->num_threads = fc_cpu_threads(forward, &args->forward, device, plan->grid);
    return FC_OK;
}
