/*
 * plan.c - everything that is a choice, and nothing else decides: problem + device facts -> plan.
 *
 * Pure: it reads no clock, no environment and no device; facts come in as a struct, so every decision is
 * tested without a GPU. A kernel is a row of the table below (CUDA rows come from kernels/variants.def). Of Hopper's
 * rows that serve the problem, the one with the least estimated time is taken; else the first that serves, so faster
 * families stand before slower ones.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "internal.h"

#ifndef FC_CUDA_ARCHS
#define FC_CUDA_ARCHS "" /* setup.py gives "80 90a 75+PTX", say */
#endif

#define CPU_KERNEL(name, isa)                                                                                          \
    {"cpu_" name, "cpu", NULL, FC_CPU, FC_NONE, 256, FC_CPU_BLOCK_M, FC_CPU_BLOCK_N, 0, isa, fc_family_cpu, fc_mask_any}

/* Lets the table below turn the arch column of variants.def into a number; internal.h has the others. */
enum { arch_75 = 75, arch_90a = FC_EXACTLY + 90 };

const fc_kernel fc_kernels[] = {
#if defined(__x86_64__)
    CPU_KERNEL("avx512", 2),
    CPU_KERNEL("avx2", 1),
#endif
    CPU_KERNEL("baseline", 0),
#ifdef FC_WITH_CUDA
#define FC_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                                     \
    FC_IF_BUILT_##arch({#family "_" #dtype "_d" #head_dim "_" #mask "_" #block_m "x" #block_n, #family,                \
                        fc_##family##_forward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n, FC_CUDA,         \
                        dtype_##dtype, head_dim, block_m, block_n, threads, arch_##arch, fc_family_##family,           \
                        fc_mask_##mask}, )
#include "variants.def"
#endif
};
const int32_t fc_num_kernels = sizeof fc_kernels / sizeof fc_kernels[0];

int32_t fc_kernel_count(void)
{
    return fc_num_kernels;
}

const char *fc_kernel_name(int32_t kernel)
{
    return kernel >= 0 && kernel < fc_num_kernels ? fc_kernels[kernel].name : NULL;
}

const char *fc_kernel_family(int32_t kernel)
{
    return kernel >= 0 && kernel < fc_num_kernels ? fc_kernels[kernel].family : NULL;
}

const char *fc_cuda_archs(void)
{
    return FC_CUDA_ARCHS;
}

/* Which masks a problem needs: full, band (causal, window), unbiased (a bool mask, which leaves scores as they are),
 * biased (a float mask is all that changes them), or general for everything else. All but the last compare scores
 * before they scale them, which a scale of zero or below would turn round. */
static enum fc_mask_class mask_class(const fc_forward_args *args)
{
    if (args->softcap != 0 || args->alibi_slopes.dtype != FC_NONE || !((float)args->scale > 0)) return fc_mask_general;
    if (args->attn_mask.dtype != FC_NONE) return args->attn_mask.dtype == FC_BOOL ? fc_mask_unbiased : fc_mask_biased;
    return fc_is_open_left(args) && fc_is_open_right(args) ? fc_mask_full : fc_mask_band;
}

static const char *mask_name(const fc_forward_args *args)
{
    static const char *const names[] = {"any", "full", "band", "unbiased", "biased", "general"};
    return names[mask_class(args)];
}

/* Is there code in this build that a device of this capability can run for a row of this arch? */
static bool is_built_for(int32_t arch, int32_t capability)
{
    bool exact = arch >= FC_EXACTLY;
    int32_t row = exact ? arch - FC_EXACTLY : arch;
    if (exact && row != capability) return false;
    for (const char *at = FC_CUDA_ARCHS; *at != '\0';) { /* by hand: strtol took a seventh of a plan's time */
        int32_t built = 0;
        for (; *at >= '0' && *at <= '9'; at++) built = 10 * built + (*at - '0');
        bool exactly = *at == 'a', ptx = *at == '+'; /* PTX the driver compiles for any later device */
        while (*at != '\0' && *at++ != ' ') continue;
        bool same_major = built / 10 == capability / 10;
        if (exactly || exact) {
            if (exactly && built == capability && (exact ? built == row : built >= row)) return true;
        } else if (built >= row && built <= capability && (ptx || same_major)) {
            return true;
        }
    }
    return false;
}

fc_status fc_check_device_type(const fc_device *device, int32_t device_type)
{
    if (device->type == device_type) return FC_OK;
    return fc_fail(FC_INVALID, "the problem is for device_type %d and the device given is of type %d", device_type,
                   device->type);
}

bool fc_kernel_is_named(const fc_kernel *kernel, const char *forced)
{
    return forced == NULL || strcmp(forced, kernel->name) == 0 || strcmp(forced, kernel->family) == 0;
}

bool fc_kernel_serves_device(const fc_kernel *kernel, const fc_device *device)
{
    if (kernel->device_type != device->type) return false;
    return device->type == FC_CPU ? device->isa >= kernel->arch
                                  : is_built_for(kernel->arch, device->compute_capability);
}

int32_t fc_kernel_runs_on(int32_t kernel, const fc_device *given)
{
    fc_device device;
    if (kernel < 0 || kernel >= fc_num_kernels ||
        fc_copy_struct("fc_device", given, &device, sizeof device, sizeof device) != FC_OK)
        return 0;
    return fc_kernel_serves_device(&fc_kernels[kernel], &device);
}

/* A CUDA tile is block_m rows of one query head. A CPU tile's rows are (position, query head) pairs of one key and
 * value head, so that a group of heads shares its keys. */
static int64_t num_tiles(const fc_forward_args *args, const fc_kernel *kernel)
{
    int64_t heads = args->num_heads_q, rows = args->seqlen_q;
    if (args->batch == 0 || heads == 0 || rows == 0) return 0; /* the other sizes may then be anything */
    if (kernel->device_type == FC_CPU) {
        rows *= heads / args->num_heads_kv;
        heads = args->num_heads_kv;
    }
    return args->batch * heads * fc_divide_up(rows, kernel->block_m);
}

static bool is_of_hopper(const fc_kernel *kernel)
{
    return kernel->family_id == fc_family_hopper || kernel->family_id == fc_family_hopper_short;
}

/* What a problem asks of any kernel, found once for all of them. */
struct needs {
    enum fc_mask_class mask;
    bool hopper_reads;
};

static struct needs needs_of(const fc_forward_args *args)
{
    return (struct needs){mask_class(args), fc_hopper_reads(args)};
}

static bool serves(const fc_kernel *kernel, const fc_attention_problem *p, const fc_forward_args *args,
                   const struct needs *needs)
{
    if (kernel->dtype != FC_NONE && kernel->dtype != args->query.dtype) return false;
    if (args->head_dim > kernel->head_dim || args->head_dim_v > kernel->head_dim) return false;
    if (p->block_m != 0 && p->block_m != kernel->block_m) return false;
    if (p->block_n != 0 && p->block_n != kernel->block_n) return false;
    if (kernel->mask != fc_mask_any && kernel->mask != needs->mask) return false;
    if (!is_of_hopper(kernel)) return true;
    if (!needs->hopper_reads || args->keep_scale != 0 ||
        num_tiles(args, kernel) > INT32_MAX / FC_HOPPER_SHORT_MOST_SPLITS)
        return false;
    return kernel->family_id == fc_family_hopper || fc_hopper_short_serves(args, kernel);
}

void fc_append(char *list, size_t size, const char *item)
{
    size_t used = strlen(list), length = strlen(item);
    for (const char *at = list; (at = strstr(at, item)) != NULL; at++)
        if ((at == list || at[-1] == ' ') && (at[length] == ',' || at[length] == '\0')) return;
    snprintf(list + used, size - used, "%s%s", used ? ", " : "", item);
}

/* What a caller may force: on the CPU each kernel, on a GPU, where rows are many, each family. */
static void append_choice(char *list, size_t size, const fc_kernel *kernel)
{
    fc_append(list, size, kernel->device_type == FC_CPU ? kernel->name : kernel->family);
}

/* Why Hopper's kernels serve no such problem, to stand behind a sentence; "" where that is not known here. */
static const char *hopper_lacks(const fc_forward_args *args)
{
    return args->keep_scale != 0 ? "; Hopper's kernels have no dropout" : fc_hopper_reads_what(args);
}

fc_status fc_refuse_device(const fc_device *device, const char *what)
{
    return fc_fail(FC_UNSUPPORTED,
                   "no %s of this build runs on compute capability %d.%d; it was built for: %s. Rebuild with "
                   "FLASHCORE_CUDA_ARCHS=%d, or move the arrays to the CPU, where every dtype and option is served",
                   what, device->compute_capability / 10, device->compute_capability % 10,
                   FC_CUDA_ARCHS[0] ? FC_CUDA_ARCHS : "no GPU", device->compute_capability);
}

/* No row serves: says which condition failed first, and what is there. */
static fc_status refuse(const fc_attention_problem *p, const fc_forward_args *args, const fc_device *device)
{
    const char *where = device->type == FC_CPU ? "the CPU" : "this GPU";
    char there[1024] = "", named[1024] = "", tiles[1024] = "";
    bool names_hopper = false;
    struct needs needs = needs_of(args);
    fc_attention_problem any_tile = *p;
    any_tile.block_m = any_tile.block_n = 0;
    for (int32_t i = 0; i < fc_num_kernels; i++) {
        const fc_kernel *kernel = &fc_kernels[i];
        if (!fc_kernel_serves_device(kernel, device)) continue;
        append_choice(there, sizeof there, kernel);
        if (!fc_kernel_is_named(kernel, p->kernel)) continue;
        append_choice(named, sizeof named, kernel);
        names_hopper |= is_of_hopper(kernel);
        if (!serves(kernel, &any_tile, args, &needs)) continue;
        char pair[32];
        snprintf(pair, sizeof pair, "(%d, %d)", kernel->block_m, kernel->block_n);
        fc_append(tiles, sizeof tiles, pair);
    }
    if (there[0] == '\0') return fc_refuse_device(device, "kernel");
    if (named[0] == '\0')
        return fc_fail(FC_INVALID, "kernel '%s' is forced, but %s has no such kernel or family here; there are: %s",
                       p->kernel, where, there);
    if (tiles[0] == '\0')
        return fc_fail(FC_UNSUPPORTED,
                       "no kernel on %s serves %s with head_dim %" PRId64 " and head_dim_v %" PRId64
                       "; there are: %s%s%s",
                       where, fc_dtype_name(args->query.dtype), args->head_dim, args->head_dim_v, named,
                       args->query.dtype == FC_FLOAT64 ? "; float64 is served on the CPU" : "",
                       names_hopper && fc_dtype_bytes(args->query.dtype) == 2 ? hopper_lacks(args) : "");
    char asked[64] = "", block_n[32] = "";
    if (p->block_m != 0) snprintf(asked, sizeof asked, "block_m=%d", p->block_m);
    if (p->block_n != 0) snprintf(block_n, sizeof block_n, "block_n=%d", p->block_n);
    if (block_n[0]) fc_append(asked, sizeof asked, block_n);
    return fc_fail(FC_INVALID,
                   "%s: no such tile for this problem on %s; there are (block_m, block_n): %s; give one or both of a "
                   "pair, or leave them out to let the library choose",
                   asked, where, tiles);
}

/* A thread must have enough work to pay for what it costs: waking it takes some 5 to 10 us, that long at 100 GFLOP/s;
 * handing work to one that still polls for it takes under 1 us. */
#define FLOPS_TO_WAKE_CPU_THREAD 5e5
#define FLOPS_PER_CPU_THREAD     2e5

static int32_t threads_for(const fc_forward_args *args, double flops_per_thread, int32_t most)
{
    double flops = 2.0 * (double)args->batch * (double)args->num_heads_q * (double)args->seqlen_q *
                   (double)args->seqlen_k * (double)(args->head_dim + args->head_dim_v);
    double useful = flops / flops_per_thread;
    return useful >= most ? most : useful < 1 ? 1 : (int32_t)useful;
}

int32_t fc_cpu_threads_to_wake(const fc_forward_args *args, const fc_plan *plan)
{
    return threads_for(args, FLOPS_TO_WAKE_CPU_THREAD, plan->num_threads);
}

int32_t fc_cpu_threads(const fc_attention_problem *p, const fc_forward_args *args, const fc_device *device,
                       int64_t tasks)
{
    int32_t most = p->num_threads != 0 ? p->num_threads : device->num_threads;
    if (tasks < most) most = tasks < 1 ? 1 : (int32_t)tasks;
    return threads_for(args, FLOPS_PER_CPU_THREAD, most);
}

static bool is_usable(const fc_kernel *kernel, const fc_attention_problem *problem, const fc_forward_args *args,
                      const struct needs *needs, const fc_device *device)
{
    return kernel->device_type == device->type && serves(kernel, problem, args, needs) &&
           fc_kernel_serves_device(kernel, device) && fc_kernel_is_named(kernel, problem->kernel);
}

bool fc_kernel_is_usable(int32_t kernel, const fc_attention_problem *problem, const fc_forward_args *args,
                         const fc_device *device)
{
    struct needs needs = needs_of(args);
    return is_usable(&fc_kernels[kernel], problem, args, &needs, device);
}

/* The plan for one kernel, with so many splits of keys (0: choose). Returns an estimate of its time in cycles; of those
 * that have none, infinity. */
static double plan_blocks(const fc_forward_args *args, int32_t index, const fc_device *device, int32_t splits,
                          fc_launch *launch)
{
    const fc_kernel *kernel = &fc_kernels[index];
    fc_plan *plan = &launch->plan;
    memset(launch, 0, sizeof *launch);
    plan->struct_size = sizeof *plan;
    plan->kernel = index;
    plan->block_m = kernel->block_m;
    plan->block_n = kernel->block_n;
    plan->num_splits = 1;
    plan->num_tiles = num_tiles(args, kernel);
    if (device->type == FC_CPU) return INFINITY;
    /* of one grid; a block takes more in turn */
    plan->num_blocks = plan->num_tiles < INT32_MAX ? plan->num_tiles : INT32_MAX;
    if (!is_of_hopper(kernel) || plan->num_tiles == 0) return INFINITY;
    return kernel->family_id == fc_family_hopper ? fc_hopper_plan_blocks(args, kernel, device, launch)
                                                 : fc_hopper_short_plan_blocks(args, kernel, device, splits, launch);
}

/* Of all kernels that serve the problem the plan that is the fastest for `asked`, which is the problem, or one batch of
 * it; false where none does. */
static bool choose(const fc_attention_problem *problem, const fc_forward_args *args, const fc_forward_args *asked,
                   const fc_device *device, fc_launch *launch)
{
    bool has_any = false;
    double least = 0;
    struct needs needs = needs_of(args);
    for (int32_t i = 0; i < fc_num_kernels; i++) {
        const fc_kernel *kernel = &fc_kernels[i];
        if (has_any && is_of_hopper(kernel) && kernel->head_dim > fc_kernels[launch->plan.kernel].head_dim)
            continue; /* pads more */
        if (!is_usable(kernel, problem, args, &needs, device)) continue;
        fc_launch its_launch;
        double cycles = plan_blocks(asked, i, device, 0, &its_launch);
        if (!has_any || cycles < least) {
            has_any = true;
            least = cycles;
            *launch = its_launch;
        }
        if (!is_of_hopper(kernel)) break; /* the first; those behind it are slower */
    }
    return has_any;
}

fc_status fc_plan_forward(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device,
                          int32_t preferred, fc_launch *launch)
{
    fc_status status = fc_check_device_type(device, problem->device_type);
    if (status != FC_OK) return status;
    /* FC_DETERMINISTIC: the kernel and the splits that a batch of one gets. */
    const fc_forward_args *asked = args;
    fc_forward_args one;
    if ((problem->flags & FC_DETERMINISTIC) != 0 && args->batch > 1) {
        one = *args;
        one.batch = 1;
        asked = &one;
    }
    if (preferred >= 0 && fc_kernel_is_usable(preferred, problem, args, device))
        plan_blocks(asked, preferred, device, 0, launch);
    else if (!choose(problem, args, asked, device, launch))
        return refuse(problem, args, device);
    if (asked != args) plan_blocks(args, launch->plan.kernel, device, launch->plan.num_splits, launch);
    fc_plan *plan = &launch->plan;
    const fc_kernel *kernel = &fc_kernels[plan->kernel];
    plan->num_threads =
        device->type == FC_CPU ? fc_cpu_threads(problem, args, device, plan->num_tiles) : kernel->threads;

    /* The portable family is slow only where this device has a family of its own that it stands in for. */
    if (device->type == FC_CUDA && problem->kernel == NULL && plan->kernel != preferred &&
        kernel->family_id == fc_family_portable)
        for (int32_t i = 0; i < fc_num_kernels; i++)
            if (fc_kernels[i].family_id != fc_family_portable && fc_kernel_serves_device(&fc_kernels[i], device))
                plan->slow |= FC_SLOW_NO_FAST_KERNEL;
    return FC_OK;
}

static const char *isa_name(int32_t isa)
{
    return isa == 2 ? "AVX-512" : isa == 1 ? "AVX2" : "baseline instructions";
}

int fc_describe(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device,
                const fc_plan *plan, char *buffer, size_t size)
{
    const fc_kernel *kernel = &fc_kernels[plan->kernel];
    char where[96], why[512] = "";
    if (device->type == FC_CPU)
        snprintf(where, sizeof where, "the CPU with %s, %d thread%s", isa_name(device->isa), plan->num_threads,
                 plan->num_threads == 1 ? "" : "s");
    else
        snprintf(where, sizeof where, "%.60s (sm_%d)", device->name[0] ? device->name : "a GPU",
                 device->compute_capability);
    if (plan->slow & FC_SLOW_BACKWARD)
        snprintf(why, sizeof why, "gradients on GPUs come from portable kernels yet, slower than PyTorch's");
    else if (problem->kernel != NULL)
        snprintf(why, sizeof why, "'%.60s' is forced", problem->kernel);
    else if (plan->tuned)
        snprintf(why, sizeof why, "it was measured to be the fastest here (flashcore.autotune)");
    else if (plan->slow & FC_SLOW_NO_FAST_KERNEL)
        snprintf(why, sizeof why, "no faster kernel serves %s, head_dim %" PRId64 "/%" PRId64 ", %s mask here%s",
                 fc_dtype_name(args->query.dtype), args->head_dim, args->head_dim_v, mask_name(args),
                 device->compute_capability == 90 && args->query.dtype != FC_FLOAT32 ? hopper_lacks(args) : "");
    else
        snprintf(why, sizeof why, "%s serves %s, head_dim %" PRId64 "/%" PRId64 ", %s mask here",
                 is_of_hopper(kernel) ? "it is estimated the fastest that" : "it is the first that",
                 fc_dtype_name(args->query.dtype), args->head_dim, args->head_dim_v, mask_name(args));
    return snprintf(buffer, size,
                    "%s on %s: %" PRId64 " tiles of %d query rows by %d keys, %d key split%s, %" PRIu64
                    " bytes of workspace; chosen because %s.",
                    kernel->name, where, plan->num_tiles, plan->block_m, plan->block_n, plan->num_splits,
                    plan->num_splits == 1 ? "" : "s", plan->workspace_bytes, why);
}
