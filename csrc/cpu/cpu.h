/*
 * cpu.h - the CPU kernels as the C core sees them.
 *
 * forward_template.h is one algorithm on vectors of any length (simd.h); forward_baseline.c, forward_avx2.c and
 * forward_avx512.c compile it for one instruction set each; backward.h is the same for the backward. pool.c runs tasks
 * on threads, isa.c knows the machine.
 */
#ifndef FC_CPU_H
#define FC_CPU_H

#include <stdatomic.h>

#include "internal.h"

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

/* Query rows and keys per tile of every CPU kernel. A row is one query of one query head; the heads that share a
 * key/value head share its tiles, so a call has batch * num_heads_kv * ceil(seqlen_q * num_heads_q / num_heads_kv /
 * FC_CPU_BLOCK_M) tasks. 64 rows are four AVX-512 registers of float32; 64 to 256 keys measured alike. */
#define FC_CPU_BLOCK_M 64
#define FC_CPU_BLOCK_N 128

/* isa.c: what this processor has, 0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512; and how many threads
 * OMP_NUM_THREADS or else the affinity mask gives (never 0). */
int32_t fc_cpu_isa(void);
int32_t fc_cpu_num_threads(void);

/* pool.c: runs task(context, index) for index 0 .. num_tasks - 1, on the caller and up to num_threads - 1 workers, and
 * returns when all are done. Of the workers that sleep, num_to_wake - 1 are woken, and all where calls come so fast
 * that they will be awake for the next one. Concurrent callers and forked children are served (a busy pool makes the
 * caller do its own work). Never fails: fewer threads than asked for is slower, not an error. */
void fc_cpu_run(void (*task)(void *context, int64_t index), void *context, int64_t num_tasks, int32_t num_threads,
                int32_t num_to_wake);
/* Returns when *counter is `value`, or *given_up is set: for a task that needs what an earlier task will have done.
 * Those are drawn in order, so the earlier one is done or under way. */
void fc_cpu_wait_for(const atomic_int *counter, int value, const atomic_bool *given_up);
/* Scratch of this thread, at least `bytes`, 64-byte aligned, reused by later calls and freed with the
 * thread; NULL when out of memory. */
void *fc_cpu_scratch(uint64_t bytes);

/* The kernels: FC_OK or FC_OUT_OF_MEMORY (with words). Of the plan they read grid and num_threads. The AVX kernels
 * exist only on x86-64; each must only be called where fc_cpu_isa() says so. */
fc_status fc_cpu_forward_baseline(const fc_forward_args *args, const fc_plan *plan);
fc_status fc_cpu_forward_avx2(const fc_forward_args *args, const fc_plan *plan);
fc_status fc_cpu_forward_avx512(const fc_forward_args *args, const fc_plan *plan);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif /* FC_CPU_H */
