/*
 * plan_backward.c - plan.c for the backward: problem + device facts -> kernel, tiles, workspace. As pure.
 *
 * A row of plan.c's table serves both directions: on the CPU it is an instruction set, on a GPU its first columns stand
 * among the backward rows of variants.def too, which have tiles of their own.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cpu/backward.h"
#include "internal.h"

/* How a kernel does the backward: that of this family, dtype, head_dim and mask. */
struct backward_half {
    enum fc_family family;
    int32_t dtype, head_dim;
    enum fc_mask_class mask;
    fc_backward_launcher launcher; /* CUDA; NULL on the CPU */
    int32_t block_m, block_n, threads;
};

static const struct backward_half halves[] = {
    {fc_family_cpu, FC_NONE, 256, fc_mask_any, NULL, FC_CPU_BACKWARD_BLOCK_M, FC_CPU_BACKWARD_BLOCK_N, 0},
#ifdef FC_WITH_CUDA
#define FC_BACKWARD_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                            \
    FC_IF_BUILT_##arch({fc_family_##family, dtype_##dtype, head_dim, fc_mask_##mask,                                   \
                        fc_##family##_backward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n, block_m,        \
                        block_n, threads}, )
#include "variants.def"
#endif
};

/* NULL where the kernel has none. */
static const struct backward_half *half_of(const fc_kernel *kernel)
{
    for (size_t i = 0; i < sizeof halves / sizeof *halves; i++) {
        const struct backward_half *half = &halves[i];
        if (half->family == kernel->family_id && half->dtype == kernel->dtype && half->head_dim == kernel->head_dim &&
            half->mask == kernel->mask)
            return half;
    }
    return NULL;
}

fc_backward_launcher fc_backward_launcher_of(int32_t kernel)
{
    return half_of(&fc_kernels[kernel])->launcher;
}

static bool serves_arrays(const fc_kernel *kernel, const fc_backward_args *args)
{
    const fc_forward_args *f = &args->forward;
    return (kernel->dtype == FC_NONE || kernel->dtype == f->query.dtype) && f->head_dim <= kernel->head_dim &&
           f->head_dim_v <= kernel->head_dim;
}

static bool has_tile(const struct backward_half *half, const fc_backward_problem *problem)
{
    return (problem->block_m == 0 || problem->block_m == half->block_m) &&
           (problem->block_n == 0 || problem->block_n == half->block_n);
}

/* Says which condition failed first, and what is there. */
static fc_status refuse(const fc_backward_problem *problem, const fc_backward_args *args, const fc_device *device)
{
    const char *where = device->type == FC_CPU ? "the CPU" : "this GPU";
    char there[1024] = "", named[1024] = "", tiles[256] = "";
    for (int32_t i = 0; i < fc_num_kernels; i++) {
        const fc_kernel *kernel = &fc_kernels[i];
        if (!fc_kernel_serves_device(kernel, device) || half_of(kernel) == NULL) continue;
        fc_append(there, sizeof there, kernel->name);
        if (!fc_kernel_is_named(kernel, problem->kernel)) continue;
        fc_append(named, sizeof named, kernel->name);
        if (!serves_arrays(kernel, args)) continue;
        char pair[32];
        snprintf(pair, sizeof pair, "(%d, %d)", half_of(kernel)->block_m, half_of(kernel)->block_n);
        fc_append(tiles, sizeof tiles, pair);
    }
    if (there[0] == '\0') return fc_refuse_device(device, "backward kernel");
    if (named[0] == '\0')
        return fc_fail(FC_INVALID,
                       "kernel '%s' is forced, but %s has no such backward kernel or family here; there are: %s",
                       problem->kernel, where, there);
    if (tiles[0] == '\0')
        return fc_fail(
            FC_UNSUPPORTED,
            "no backward kernel on %s serves %s with head_dim %" PRId64 " and head_dim_v %" PRId64 "; there are: %s%s",
            where, fc_dtype_name(args->forward.query.dtype), args->forward.head_dim, args->forward.head_dim_v, named,
            args->forward.query.dtype == FC_FLOAT64 ? "; float64 is served on the CPU" : "");
    return fc_fail(FC_INVALID,
                   "block_m=%" PRId32 ", block_n=%" PRId32 ": no such tile for this problem's backward on %s; "
                   "there are (block_m, block_n): %s; 0 lets the library choose",
                   problem->block_m, problem->block_n, where, tiles);
}

/* Tiles of rows, which come first, and of every gradient that is wanted; 0 where none is. */
static int64_t num_cuda_tiles(const fc_backward_args *args, const struct backward_half *half)
{
    const fc_forward_args *f = &args->forward;
    const fc_tensor *dbias = &args->dbias, *dsinks = &args->dsinks;
    const int64_t shape[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->seqlen_k};
    int64_t rows = f->batch * f->num_heads_q * fc_divide_up(f->seqlen_q, half->block_m), tiles = 0;
    int64_t keys = f->batch * f->num_heads_kv * fc_divide_up(f->seqlen_k, half->block_m), stored[4];
    if (args->dq.dtype != FC_NONE) tiles += rows;
    if (args->dk.dtype != FC_NONE) tiles += keys;
    if (args->dv.dtype != FC_NONE) tiles += keys;
    for (int i = 0; i < 4; i++) stored[i] = dbias->strides[i] == 0 ? 1 : shape[i];
    if (dbias->dtype != FC_NONE)
        tiles +=
            stored[0] * stored[1] * fc_divide_up(stored[2], half->block_m) * fc_divide_up(stored[3], half->block_n);
    if (dsinks->dtype != FC_NONE)
        tiles += (dsinks->strides[0] == 0 ? 1 : shape[0]) * (dsinks->strides[1] == 0 ? 1 : shape[1]);
    return tiles == 0 ? 0 : rows + tiles;
}

/* What the portable kernels keep of each row. A sum too large for any memory stays the largest number there is. */
static uint64_t cuda_workspace(const fc_forward_args *f)
{
    uint64_t bytes = FC_PORTABLE_BACKWARD_ROW_BYTES;
    const int64_t sizes[] = {f->batch, f->num_heads_q, f->seqlen_q};
    for (int i = 0; i < 3; i++)
        if (__builtin_mul_overflow(bytes, (uint64_t)sizes[i], &bytes)) bytes = UINT64_MAX;
    return bytes;
}

fc_status fc_plan_backward(const fc_backward_problem *problem, const fc_attention_problem *forward,
                           const fc_backward_args *args, const fc_device *device, fc_plan *plan)
{
    fc_status status = fc_check_device_type(device, forward->device_type);
    if (status != FC_OK) return status;
    const struct backward_half *half = NULL;
    int32_t chosen = 0;
    for (; chosen < fc_num_kernels; chosen++) {
        const fc_kernel *kernel = &fc_kernels[chosen];
        if (!serves_arrays(kernel, args) || (half = half_of(kernel)) == NULL || !has_tile(half, problem)) continue;
        if (fc_kernel_is_named(kernel, problem->kernel) && fc_kernel_serves_device(kernel, device)) break;
    }
    if (chosen == fc_num_kernels) return refuse(problem, args, device);

    memset(plan, 0, sizeof *plan);
    plan->struct_size = sizeof *plan;
    plan->kernel = chosen;
    plan->block_m = half->block_m;
    plan->block_n = half->block_n;
    plan->num_splits = 1;
    if (device->type == FC_CPU) {
        plan->num_tiles = fc_cpu_backward_tasks(args).total;
        plan->workspace_bytes = fc_cpu_backward_layout(args).bytes;
        plan->num_threads = fc_cpu_threads(forward, &args->forward, device, plan->num_tiles);
    } else {
        plan->num_tiles = num_cuda_tiles(args, half);
        /* of the largest grid; a block takes more in turn */
        plan->num_blocks = plan->num_tiles < INT32_MAX ? plan->num_tiles : INT32_MAX;
        plan->workspace_bytes = cuda_workspace(&args->forward);
        plan->num_threads = half->threads;
        plan->slow = FC_SLOW_BACKWARD;
    }
    return FC_OK;
}
