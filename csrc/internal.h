/*
 * internal.h - what the files of the C core say to each other. Nothing here is exported.
 *
 * The way of a call: attention.c -> check.c (is it right?) -> tuned.c (is a choice known?) -> plan.c (what will run?)
 * -> a CPU kernel or a CUDA launcher; check_backward.c and plan_backward.c for the backward. error.c holds the words,
 * device.c the facts, measure.c the clock.
 */
#ifndef FC_INTERNAL_H
#define FC_INTERNAL_H

#include <stdbool.h>

#include "kernels.h"

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#define FC_PRINTF(index, first) __attribute__((format(printf, index, first)))
#else
#define FC_PRINTF(index, first)
#endif

/* n / by, rounded up; of any n that is not negative. */
static inline int64_t fc_divide_up(int64_t n, int64_t by)
{
    return n / by + (n % by != 0);
}

/* Stirs one more fact into 64 bits that stand for many. */
static inline uint64_t fc_mix(uint64_t mixed, uint64_t fact)
{
    mixed = (mixed ^ fact) * 0x9e3779b97f4a7c15u; /* 2^64 / the golden ratio */
    return mixed ^ mixed >> 32;
}

/* error.c: stores the words for fc_last_error and returns the status, so that callers can write
 * `return fc_fail(FC_INVALID, "...")`. */
fc_status fc_fail(fc_status status, const char *format, ...) FC_PRINTF(2, 3);
const char *fc_dtype_name(int32_t dtype); /* "float16"; "unknown" outside the enum */

/* check.c: applies every rule. On FC_OK, *problem is a full-size copy of *given with defaults filled
 * in, and *args is it resolved for a kernel. */
fc_status fc_check(const fc_attention_problem *given, bool need_data, fc_attention_problem *problem,
                   fc_forward_args *args);
/* The rules that both directions share. A tensor of this shape: its dtype is known to be right, its offsets must fit,
 * its data be there and aligned; an output must not overlap itself. */
fc_status fc_check_tensor(const char *name, const fc_tensor *tensor, const int64_t shape[4], bool need_data);
fc_status fc_check_output(const char *name, const fc_tensor *tensor, const int64_t shape[4], bool need_data);
fc_status fc_check_blocks(int32_t block_m, int32_t block_n);
/* Copies a public struct that begins with its size into one of ours, per the growth rule of flashcore.h. */
fc_status fc_copy_struct(const char *name, const void *given, void *ours, uint64_t our_size, uint64_t least_size);

/* check_backward.c: the same for a backward problem; *forward is the full-size copy of given->forward. */
fc_status fc_check_backward(const fc_backward_problem *given, bool need_data, fc_backward_problem *problem,
                            fc_attention_problem *forward, fc_backward_args *args);

/* plan.c: pure. */
enum fc_family { fc_family_cpu, fc_family_portable, fc_family_hopper, fc_family_hopper_short };
enum fc_mask_class { fc_mask_any, fc_mask_full, fc_mask_band, fc_mask_unbiased, fc_mask_biased, fc_mask_general };
/* The dtype column of variants.def, for the tables of both directions. */
enum { dtype_float16 = FC_FLOAT16, dtype_bfloat16 = FC_BFLOAT16, dtype_float32 = FC_FLOAT32 };
typedef struct fc_kernel {
    const char *name;             /* "portable_float16_d64_any_64x64", "cpu_avx2" */
    const char *family;           /* "portable", "cpu" */
    fc_forward_launcher launcher; /* CUDA; NULL for CPU kernels */
    int32_t device_type;
    int32_t dtype;    /* FC_NONE: every dtype */
    int32_t head_dim; /* the largest it serves */
    int32_t block_m, block_n, threads;
    int32_t arch; /* CUDA: least compute capability, 75; FC_EXACTLY + 90: that one alone; CPU: least isa */
    enum fc_family family_id;
    enum fc_mask_class mask;
} fc_kernel;
#define FC_EXACTLY 1000
extern const fc_kernel fc_kernels[];
extern const int32_t fc_num_kernels;
/* preferred: a kernel to take where it is usable, before any other; -1: none. */
fc_status fc_plan_forward(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device,
                          int32_t preferred, fc_launch *launch);
/* Could this kernel run this problem on this device? */
bool fc_kernel_is_usable(int32_t kernel, const fc_attention_problem *problem, const fc_forward_args *args,
                         const fc_device *device);
/* Are the device's facts of the kind that the problem's arrays are on? */
fc_status fc_check_device_type(const fc_device *device, int32_t device_type);
/* Does this device run the kernel? Is it what `forced` (NULL: anything) names? */
bool fc_kernel_serves_device(const fc_kernel *kernel, const fc_device *device);
bool fc_kernel_is_named(const fc_kernel *kernel, const char *forced);
/* No kernel, or what else of this build, runs on this GPU. */
fc_status fc_refuse_device(const fc_device *device, const char *what);
/* Adds an item to a list in words, once; a full buffer keeps what it has. */
void fc_append(char *list, size_t size, const char *item);
/* Threads worth having for `tasks` tasks of a CPU problem. */
int32_t fc_cpu_threads(const fc_attention_problem *p, const fc_forward_args *args, const fc_device *device,
                       int64_t tasks);
/* Of a plan's CPU threads, how many are worth waking if they sleep; the others help if they are awake. */
int32_t fc_cpu_threads_to_wake(const fc_forward_args *args, const fc_plan *plan);
int fc_describe(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device,
                const fc_plan *plan, char *buffer, size_t size);

/* plan_hopper.c */
bool fc_hopper_reads(const fc_forward_args *args);
/* Words for it, to stand behind a sentence; "" where it does. */
const char *fc_hopper_reads_what(const fc_forward_args *args);
/* Sets how the tiles of a plan that has any are dealt to how many blocks. Returns an estimate in cycles, to compare
 * with that of another kernel for the same problem. */
double fc_hopper_plan_blocks(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device,
                             fc_launch *launch);
/* Keys that a tile of rows sees, on the average (the result) and at most, by eight of many tiles. */
double fc_hopper_mean_keys(const fc_forward_args *args, int64_t block_m, int64_t row_tiles, double *most);
double fc_hopper_weight(const fc_kernel *kernel); /* of a row and key of this head_dim; 1: of 64 */
/* Heads that share keys follow each other: for where all tiles cost the same. */
void fc_hopper_group_by_keys(const fc_forward_args *args, fc_launch *launch);

/* plan_hopper_short.c: the same, for kernels that keep a head's keys on chip; and blocks_per_sm, and num_splits, which
 * is `splits`, or where that is 0 chosen. */
bool fc_hopper_short_serves(const fc_forward_args *args, const fc_kernel *kernel);
double fc_hopper_short_plan_blocks(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device,
                                   int64_t splits, fc_launch *launch);

/* tuned.c */
uint64_t fc_class_of(const fc_forward_args *args);
int fc_class_describe(uint64_t shape_class, char *buffer, size_t size);
/* The kernel that was tuned for a problem which leaves the choice open; -1: none. */
int32_t fc_tuned_find(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device);

/* plan_backward.c: pure. */
fc_status fc_plan_backward(const fc_backward_problem *problem, const fc_attention_problem *forward,
                           const fc_backward_args *args, const fc_device *device, fc_plan *plan);
/* Of a planned CUDA kernel. */
fc_backward_launcher fc_backward_launcher_of(int32_t kernel);

/* device.c */
fc_status fc_device_enter(int32_t device_id, int32_t *previous); /* makes a CUDA device current */
void fc_device_leave(int32_t device_id, int32_t previous);
fc_status fc_cuda_fail(int error, const char *doing); /* FC_OK for 0, else an fc_fail that names the error */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif /* FC_INTERNAL_H */
