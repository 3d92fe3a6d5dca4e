/*
 * attention.c - fc_attention_*, forward and backward: check -> plan -> run. The only file that joins the rooms.
 */
#include <inttypes.h>
#include <string.h>

#include "cpu/backward.h"
#include "cpu/cpu.h"
#include "internal.h"

static fc_status find_device(const fc_attention_problem *problem, const fc_device *given, fc_device *device)
{
    if (given != NULL) return fc_copy_struct("fc_device", given, device, sizeof *device, sizeof *device);
    device->struct_size = sizeof *device;
    return fc_device_query(problem->device_type, problem->device_id, device);
}

static fc_status check_and_plan(const fc_attention_problem *given, bool need_data, const fc_device *given_device,
                                fc_attention_problem *problem, fc_forward_args *args, fc_device *device,
                                fc_launch *launch)
{
    fc_status status = fc_check(given, need_data, problem, args);
    if (status != FC_OK) return status;
    if ((status = find_device(problem, given_device, device)) != FC_OK) return status;
    int32_t preferred = fc_tuned_find(problem, args, device);
    if ((status = fc_plan_forward(problem, args, device, preferred, launch)) != FC_OK) return status;
    launch->plan.tuned = launch->plan.kernel == preferred; /* it need not serve this very problem */
    return FC_OK;
}

static fc_status check_plan_struct(const fc_plan *plan)
{
    if (plan == NULL) return fc_fail(FC_INVALID, "fc_plan is NULL");
    if (plan->struct_size >= sizeof *plan) return FC_OK;
    return fc_fail(FC_INVALID, "fc_plan.struct_size is %" PRIu64 "; set it to sizeof(fc_plan), at least %zu",
                   plan->struct_size, sizeof *plan);
}

/* A newer caller's tail stays as it is. */
static void give_plan(fc_plan *plan, const fc_plan *made)
{
    uint64_t struct_size = plan->struct_size;
    memcpy(plan, made, sizeof *made);
    plan->struct_size = struct_size;
}

static fc_status check_workspace(const void *workspace, uint64_t bytes, uint64_t needed, int32_t device_type,
                                 const char *who_tells)
{
    if (needed == 0) return FC_OK;
    if (workspace == NULL || bytes < needed)
        return fc_fail(FC_INVALID, "workspace has %" PRIu64 " bytes; this problem needs %" PRIu64 " (%s tells)",
                       workspace == NULL ? 0 : bytes, needed, who_tells);
    bool is_cpu = device_type == FC_CPU;
    int alignment = is_cpu ? 64 : 256;
    if ((uintptr_t)workspace % (uintptr_t)alignment == 0) return FC_OK;
    return fc_fail(FC_INVALID, "workspace is %p; on %s it must be aligned to %d bytes (fc_malloc's is)", workspace,
                   is_cpu ? "the CPU" : "a GPU", alignment);
}

fc_status fc_attention_plan(const fc_attention_problem *given, const fc_device *given_device, fc_plan *plan)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_launch made;
    fc_status status = check_plan_struct(plan);
    if (status != FC_OK) return status;
    status = check_and_plan(given, false, given_device, &problem, &args, &device, &made);
    if (status == FC_OK) give_plan(plan, &made.plan);
    return status;
}

fc_status fc_attention_class(const fc_attention_problem *given, uint64_t *shape_class, char *words, size_t size)
{
    fc_attention_problem problem;
    fc_forward_args args;
    if (shape_class == NULL) return fc_fail(FC_INVALID, "shape_class is NULL");
    fc_status status = fc_check(given, false, &problem, &args);
    if (status != FC_OK) return status;
    *shape_class = fc_class_of(&args);
    if (words != NULL) fc_class_describe(*shape_class, words, size);
    return FC_OK;
}

fc_status fc_attention_candidates(const fc_attention_problem *given, const fc_device *given_device, fc_plan *plans,
                                  int32_t capacity, int32_t *count)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    if (count == NULL || capacity < 0 || (plans == NULL && capacity > 0))
        return fc_fail(FC_INVALID, "count is NULL, capacity is %" PRId32 ", or plans is NULL with room for some",
                       capacity);
    for (int32_t i = 0; i < capacity; i++) {
        fc_status status = check_plan_struct(&plans[i]);
        if (status != FC_OK) return status;
    }
    fc_status status = fc_check(given, false, &problem, &args);
    if (status == FC_OK) status = find_device(&problem, given_device, &device);
    fc_launch made;
    if (status == FC_OK) status = fc_plan_forward(&problem, &args, &device, -1, &made);
    if (status != FC_OK) return status;
    int32_t chosen = made.plan.kernel, found = 1;
    if (capacity > 0) give_plan(&plans[0], &made.plan);
    for (int32_t i = 0; i < fc_num_kernels; i++) {
        if (i == chosen || !fc_kernel_is_usable(i, &problem, &args, &device)) continue;
        status = fc_plan_forward(&problem, &args, &device, i, &made);
        if (status != FC_OK) return status;
        if (found < capacity) give_plan(&plans[found], &made.plan);
        found++;
    }
    *count = found;
    return FC_OK;
}

int fc_plan_describe(const fc_attention_problem *given, const fc_device *given_device, const fc_plan *given_plan,
                     char *buffer, size_t size)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_launch launch;
    fc_plan *plan = &launch.plan;
    fc_status status = check_and_plan(given, false, given_device, &problem, &args, &device, &launch);
    if (status == FC_OK && given_plan != NULL)
        status = fc_copy_struct("fc_plan", given_plan, plan, sizeof *plan, sizeof *plan);
    if (status == FC_OK && fc_kernel_name(plan->kernel) == NULL)
        status = fc_fail(FC_INVALID, "fc_plan.kernel is %" PRId32 "; allowed: 0 to %" PRId32, plan->kernel,
                         fc_kernel_count() - 1);
    if (status != FC_OK) {
        if (size > 0) buffer[0] = '\0';
        return 0;
    }
    return fc_describe(&problem, &args, &device, plan, buffer, size);
}

static fc_status run_cpu(const fc_forward_args *args, const fc_plan *plan)
{
    switch (fc_kernels[plan->kernel].arch) {
#if defined(__x86_64__)
    case 2:
        return fc_cpu_forward_avx512(args, plan);
    case 1:
        return fc_cpu_forward_avx2(args, plan);
#endif
    default:
        return fc_cpu_forward_baseline(args, plan);
    }
}

static fc_status run_cpu_backward(const fc_backward_args *args, const fc_plan *plan, void *workspace)
{
    switch (fc_kernels[plan->kernel].arch) {
#if defined(__x86_64__)
    case 2:
        return fc_cpu_backward_avx512(args, plan, workspace);
    case 1:
        return fc_cpu_backward_avx2(args, plan, workspace);
#endif
    default:
        return fc_cpu_backward_baseline(args, plan, workspace);
    }
}

static fc_status run_cuda(const fc_attention_problem *problem, const fc_forward_args *args, const fc_launch *launch,
                          void *workspace, void *stream)
{
    int32_t previous;
    fc_status status = fc_device_enter(problem->device_id, &previous);
    if (status != FC_OK) return status;
    int error = fc_kernels[launch->plan.kernel].launcher(args, launch, workspace, stream);
    fc_device_leave(problem->device_id, previous);
    return fc_cuda_fail(error, "launching an attention kernel");
}

static fc_status run_cuda_backward(int32_t device_id, const fc_backward_args *args, const fc_plan *plan,
                                   void *workspace, void *stream)
{
    int32_t previous;
    fc_status status = fc_device_enter(device_id, &previous);
    if (status != FC_OK) return status;
    int error = fc_backward_launcher_of(plan->kernel)(args, plan, workspace, stream);
    fc_device_leave(device_id, previous);
    return fc_cuda_fail(error, "launching a backward kernel");
}

static fc_status run(const fc_attention_problem *problem, const fc_forward_args *args, const fc_launch *launch,
                     void *workspace, uint64_t workspace_bytes, void *stream)
{
    const fc_plan *plan = &launch->plan;
    fc_status status =
        check_workspace(workspace, workspace_bytes, plan->workspace_bytes, problem->device_type, "fc_attention_plan");
    if (status != FC_OK) return status;
    if (plan->num_tiles == 0) return FC_OK; /* no rows: nothing to write */
    if (problem->device_type == FC_CPU) return run_cpu(args, plan);
    return run_cuda(problem, args, launch, workspace, stream);
}

fc_status fc_attention_forward(const fc_attention_problem *given, void *workspace, uint64_t workspace_bytes,
                               void *stream)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_launch launch;
    fc_status status = check_and_plan(given, true, NULL, &problem, &args, &device, &launch);
    return status == FC_OK ? run(&problem, &args, &launch, workspace, workspace_bytes, stream) : status;
}

/* Of the caller's plan only the choice is taken; what follows from it is cheap to find, and then sure to fit. */
fc_status fc_attention_run(const fc_attention_problem *given, const fc_plan *given_plan, void *workspace,
                           uint64_t workspace_bytes, void *stream)
{
    fc_attention_problem problem;
    fc_forward_args args;
    fc_device device;
    fc_launch launch;
    fc_status status = check_plan_struct(given_plan);
    if (status == FC_OK) status = fc_check(given, true, &problem, &args);
    if (status == FC_OK) status = find_device(&problem, NULL, &device);
    if (status != FC_OK) return status;
    const char *name = fc_kernel_name(given_plan->kernel);
    if (name != NULL) status = fc_plan_forward(&problem, &args, &device, given_plan->kernel, &launch);
    if (name == NULL || status != FC_OK || launch.plan.kernel != given_plan->kernel)
        return fc_fail(FC_INVALID,
                       "fc_plan.kernel is %" PRId32 " (%s), which does not serve this problem; ask "
                       "fc_attention_plan for a plan of it",
                       given_plan->kernel, name == NULL ? "none" : name);
    return run(&problem, &args, &launch, workspace, workspace_bytes, stream);
}

static fc_status check_and_plan_backward(const fc_backward_problem *given, bool need_data,
                                         const fc_device *given_device, fc_attention_problem *forward,
                                         fc_backward_args *args, fc_plan *plan)
{
    fc_backward_problem problem;
    fc_device device;
    fc_status status = fc_check_backward(given, need_data, &problem, forward, args);
    if (status != FC_OK) return status;
    if ((status = find_device(forward, given_device, &device)) != FC_OK) return status;
    return fc_plan_backward(&problem, forward, args, &device, plan);
}

fc_status fc_attention_backward_plan(const fc_backward_problem *given, const fc_device *given_device, fc_plan *plan)
{
    fc_attention_problem forward;
    fc_backward_args args;
    fc_plan made;
    fc_status status = check_plan_struct(plan);
    if (status != FC_OK) return status;
    status = check_and_plan_backward(given, false, given_device, &forward, &args, &made);
    if (status == FC_OK) give_plan(plan, &made);
    return status;
}

fc_status fc_attention_backward(const fc_backward_problem *given, void *workspace, uint64_t workspace_bytes,
                                void *stream)
{
    fc_attention_problem forward;
    fc_backward_args args;
    fc_plan plan;
    fc_status status = check_and_plan_backward(given, true, NULL, &forward, &args, &plan);
    if (status != FC_OK) return status;
    status = check_workspace(workspace, workspace_bytes, plan.workspace_bytes, forward.device_type,
                             "fc_attention_backward_plan");
    if (status != FC_OK) return status;
    if (forward.device_type == FC_CPU) return run_cpu_backward(&args, &plan, workspace);
    if (plan.num_tiles == 0) return FC_OK; /* no gradient has an element */
    return run_cuda_backward(forward.device_id, &args, &plan, workspace, stream);
}
