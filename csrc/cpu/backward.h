/*
 * backward.h - the CPU's backward as the C core sees it: its tiles, its tasks, its workspace, its kernels.
 *
 * A task owns blocks of keys (of one key/value head and its query heads), so dk and dv are nobody else's. Every task
 * adds to dq; that each does so in the order of the keys is seen to by one ticket per tile of rows. dbias may sum
 * over batch, heads or keys: then one task walks all of what is summed.
 */
#ifndef FC_CPU_BACKWARD_H
#define FC_CPU_BACKWARD_H

#include <stdatomic.h>

#include "cpu.h"

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

/* Query rows (of one head) and keys per tile. */
#define FC_CPU_BACKWARD_BLOCK_M 64
#define FC_CPU_BACKWARD_BLOCK_N 128

/* Tasks along each dimension: its size (in blocks, for keys), or 1 where dbias sums over it. */
typedef struct fc_cpu_tasks {
    int64_t batch, heads_kv, blocks; /* the last: of keys */
    int64_t total;
} fc_cpu_tasks;
fc_cpu_tasks fc_cpu_backward_tasks(const fc_backward_args *args);

/* Does dbias sum over this dimension? Over any? */
bool fc_cpu_sums_bias_over(const fc_backward_args *args, int dim);
bool fc_cpu_sums_bias(const fc_backward_args *args);

/* Where in the workspace each array begins, in bytes; its size in all. Sums are float, double for float64. */
typedef struct fc_cpu_layout {
    uint64_t delta;     /* [batch, num_heads_q, seqlen_q]: dout . out - dlse */
    uint64_t base;      /* likewise: p = exp(score - base) * inverse */
    uint64_t inverse;   /* likewise */
    uint64_t sink_sums; /* [batch, num_heads_q, row tiles] doubles: a tile's part of dsinks */
    uint64_t tickets;   /* [batch, num_heads_q, row tiles] atomic_int: blocks of keys that have added to its dq */
    uint64_t dq_sums;   /* [batch, num_heads_q, seqlen_q, dq_width], unless dq itself can hold them */
    uint64_t bias_sums; /* dbias without gaps, where it sums */
    uint64_t bytes;
    int64_t row_tiles;       /* of one query head */
    int64_t dq_width;        /* head_dim in whole cache lines */
    bool dq_in_place;        /* dq holds the sums */
    int64_t bias_strides[4]; /* of bias_sums, 0 where summed */
} fc_cpu_layout;
fc_cpu_layout fc_cpu_backward_layout(const fc_backward_args *args);

/* The kernels, as those of the forward: FC_OK or FC_OUT_OF_MEMORY. `workspace` is 64-byte aligned. */
fc_status fc_cpu_backward_baseline(const fc_backward_args *args, const fc_plan *plan, void *workspace);
fc_status fc_cpu_backward_avx2(const fc_backward_args *args, const fc_plan *plan, void *workspace);
fc_status fc_cpu_backward_avx512(const fc_backward_args *args, const fc_plan *plan, void *workspace);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif /* FC_CPU_BACKWARD_H */
