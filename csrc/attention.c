/*
 * attention.c - fc_attention_*: check -> plan -> run. The only file that joins the rooms.
 */
#include <inttypes.h>
#include <string.h>

#include "cpu/cpu.h"
#include "internal.h"

static fc_status check_and_plan(const fc_attention_problem *given, bool need_data, const fc_device *given_device,
                                fc_attention_problem *problem, fc_forward_args *args, fc_device *device, fc_plan *plan)
{
    fc_status status = fc_check(given, need_data, problem, args);
    if (status != FC_OK) return status;
    if (given_device != NULL) {
        status = fc_copy_struct("fc_device", given_device, device, sizeof *device, sizeof *device);
    } else {
        device->struct_size = sizeof *device;
        status = fc_device_query(problem->device_type, problem->device_id, device);
    }
    if (status != FC_OK) return status;
    return fc_plan_forward(problem, args, device, plan);
}

fc_status fc_attention_plan(const fc_attention_problem *given, const fc_device *given_device, fc_plan *plan)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_plan made;
    if (plan == NULL) return fc_fail(FC_INVALID, "fc_plan is NULL");
    if (plan->struct_size < sizeof made)
        return fc_fail(FC_INVALID, "fc_plan.struct_size is %" PRIu64 "; set it to sizeof(fc_plan), at least %zu",
                       plan->struct_size, sizeof made);
    fc_status status = check_and_plan(given, false, given_device, &problem, &args, &device, &made);
    if (status != FC_OK) return status;
    made.struct_size = plan->struct_size; /* a newer caller's tail stays as it is */
    memcpy(plan, &made, sizeof made);
    return FC_OK;
}

int fc_plan_describe(const fc_attention_problem *given, const fc_device *given_device, const fc_plan *given_plan,
                     char *buffer, size_t size)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_plan plan;
    fc_status status = check_and_plan(given, false, given_device, &problem, &args, &device, &plan);
    if (status == FC_OK && given_plan != NULL)
        status = fc_copy_struct("fc_plan", given_plan, &plan, sizeof plan, sizeof plan);
    if (status == FC_OK && fc_kernel_name(plan.kernel) == NULL)
        status = fc_fail(FC_INVALID, "fc_plan.kernel is %" PRId32 "; allowed: 0 to %" PRId32, plan.kernel,
                         fc_kernel_count() - 1);
    if (status != FC_OK) {
        if (size > 0) buffer[0] = '\0';
        return 0;
    }
    return fc_describe(&problem, &args, &device, &plan, buffer, size);
}

static fc_status run_cpu(const fc_forward_args *args, const fc_plan *plan)
{
    switch (fc_kernels[plan->kernel].arch[0]) {
#if defined(__x86_64__)
    case '2':
        return fc_cpu_forward_avx512(args, plan);
    case '1':
        return fc_cpu_forward_avx2(args, plan);
#endif
    default:
        return fc_cpu_forward_baseline(args, plan);
    }
}

static fc_status run_cuda(const fc_attention_problem *problem, const fc_forward_args *args, const fc_plan *plan,
                          void *workspace, void *stream)
{
    int32_t previous;
    fc_status status = fc_device_enter(problem->device_id, &previous);
    if (status != FC_OK) return status;
    int error = fc_kernels[plan->kernel].launcher(args, plan, workspace, stream);
    fc_device_leave(problem->device_id, previous);
    return fc_cuda_fail(error, "launching an attention kernel");
}

fc_status fc_attention_forward(const fc_attention_problem *given, void *workspace, uint64_t workspace_bytes,
                               void *stream)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_plan plan;
    fc_status status = check_and_plan(given, true, NULL, &problem, &args, &device, &plan);
    if (status != FC_OK) return status;
    if (workspace_bytes < plan.workspace_bytes || (workspace == NULL && plan.workspace_bytes > 0))
        return fc_fail(FC_INVALID,
                       "workspace has %" PRIu64 " bytes; this problem needs %" PRIu64 " (fc_attention_plan tells)",
                       workspace == NULL ? 0 : workspace_bytes, plan.workspace_bytes);
    if (plan.grid == 0) return FC_OK; /* no rows: nothing to write */
    if (problem.device_type == FC_CPU) return run_cpu(&args, &plan);
    return run_cuda(&problem, &args, &plan, workspace, stream);
}
