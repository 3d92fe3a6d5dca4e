/*
 * backward_layout.c - how the CPU's backward is divided into tasks, and its workspace into arrays. Pure, and the same
 * for every instruction set and number of threads: that is why the bits are too.
 */
#include "backward.h"

enum { LINE = 64 }; /* bytes of a cache line, and of the widest vector */

bool fc_cpu_sums_bias_over(const fc_backward_args *args, int dim)
{
    const fc_forward_args *f = &args->forward;
    const int64_t shape[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->seqlen_k};
    return args->dbias.dtype != FC_NONE && args->dbias.strides[dim] == 0 && shape[dim] != 1;
}

bool fc_cpu_sums_bias(const fc_backward_args *args)
{
    for (int dim = 0; dim < 4; dim++)
        if (fc_cpu_sums_bias_over(args, dim)) return true;
    return false;
}

static int64_t saturating_product(int64_t a, int64_t b)
{
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

fc_cpu_tasks fc_cpu_backward_tasks(const fc_backward_args *args)
{
    const fc_forward_args *f = &args->forward;
    fc_cpu_tasks tasks = {
        .batch = fc_cpu_sums_bias_over(args, 0) ? 1 : f->batch,
        .heads_kv = fc_cpu_sums_bias_over(args, 1) ? 1 : f->num_heads_kv,
        .blocks = fc_cpu_sums_bias_over(args, 3) ? 1 : fc_divide_up(f->seqlen_k, FC_CPU_BACKWARD_BLOCK_N),
    };
    bool wanted = args->dq.dtype != FC_NONE || args->dk.dtype != FC_NONE || args->dv.dtype != FC_NONE ||
                  args->dbias.dtype != FC_NONE;
    if (wanted) tasks.total = saturating_product(saturating_product(tasks.batch, tasks.heads_kv), tasks.blocks);
    return tasks;
}

/* Room for `count` elements at the end; a sum too large for any memory stays the largest number there is. */
static uint64_t append(fc_cpu_layout *layout, int64_t count, int64_t element_bytes)
{
    uint64_t start = layout->bytes, bytes;
    if (__builtin_mul_overflow((uint64_t)count, (uint64_t)element_bytes, &bytes) ||
        __builtin_add_overflow(bytes, LINE - 1, &bytes) || __builtin_add_overflow(start, bytes / LINE * LINE, &bytes))
        bytes = UINT64_MAX / LINE * LINE;
    layout->bytes = bytes;
    return start;
}

fc_cpu_layout fc_cpu_backward_layout(const fc_backward_args *args)
{
    const fc_forward_args *f = &args->forward;
    int64_t real_bytes = f->query.dtype == FC_FLOAT64 ? 8 : 4;
    int64_t heads = saturating_product(f->batch, f->num_heads_q), rows = saturating_product(heads, f->seqlen_q);
    fc_cpu_layout layout = {.row_tiles = fc_divide_up(f->seqlen_q, FC_CPU_BACKWARD_BLOCK_M)};
    int64_t tiles = saturating_product(heads, layout.row_tiles);
    layout.delta = append(&layout, rows, real_bytes);
    layout.base = append(&layout, rows, real_bytes);
    layout.inverse = append(&layout, rows, real_bytes);
    if (args->dsinks.dtype != FC_NONE) layout.sink_sums = append(&layout, tiles, sizeof(double));

    layout.dq_width = fc_divide_up(f->head_dim * real_bytes, LINE) * LINE / real_bytes;
    layout.dq_in_place = args->dq.strides[3] == 1 && layout.dq_width == f->head_dim &&
                         (args->dq.dtype == FC_FLOAT32 || args->dq.dtype == FC_FLOAT64);
    if (args->dq.dtype != FC_NONE) {
        layout.tickets = append(&layout, tiles, sizeof(atomic_int));
        if (!layout.dq_in_place)
            layout.dq_sums = append(&layout, saturating_product(rows, layout.dq_width), real_bytes);
    }
    if (fc_cpu_sums_bias(args)) {
        const int64_t shape[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->seqlen_k};
        int64_t count = 1;
        for (int dim = 3; dim >= 0; dim--) {
            if (fc_cpu_sums_bias_over(args, dim)) continue;
            layout.bias_strides[dim] = count;
            count = saturating_product(count, shape[dim]);
        }
        layout.bias_sums = append(&layout, count, real_bytes);
    }
    return layout;
}
