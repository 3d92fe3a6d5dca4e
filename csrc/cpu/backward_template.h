/*
 * backward_template.h - the gradients of attention on the CPU, tile by tile, for one element type and vector width.
 *
 * Three passes over the pool:
 *
 *   prepare_rows         delta, and what turns scores into probabilities, row by row; dq cleared
 *   differentiate_keys   backward_tile.h for each block of keys and each tile of rows that sees it: dk, dv, dbias, dq
 *   store_dq             only where dq itself could not hold the sums
 *
 * The trick: five products, not seven, and yet the same bits on any number of threads. Blocks of keys are spread over
 * the threads, and all of them add to dq; a ticket per tile of rows lets them do so in the order of the keys. Tasks are
 * drawn in that order too, so the one that is waited for is done or under way.
 *
 * Included once per element type, with the parameters of simd.h and matrix.h. It defines the function backward_float or
 * backward_double.
 */
#include "backward.h"
#include "matrix.h"

#include "backward_tile.h"

#ifndef FC_CPU_BACKWARD_TEMPLATE_H
#define FC_CPU_BACKWARD_TEMPLATE_H

#define dot                 FC_CPU_NAME(dot)
#define is_coarse           FC_CPU_NAME(is_coarse)
#define count_again         FC_CPU_NAME(count_again)
#define sum_exp             FC_CPU_NAME(sum_exp)
#define prepare_row         FC_CPU_NAME(prepare_row)
#define prepare_rows        FC_CPU_NAME(prepare_rows)
#define sum_sinks           FC_CPU_NAME(sum_sinks)
#define dq_row              FC_CPU_NAME(dq_row)
#define add_to_keys         FC_CPU_NAME(add_to_keys)
#define add_to_dq           FC_CPU_NAME(add_to_dq)
#define add_to_dbias        FC_CPU_NAME(add_to_dbias)
#define differentiate_tile  FC_CPU_NAME(differentiate_tile)
#define differentiate_block FC_CPU_NAME(differentiate_block)
#define differentiate_keys  FC_CPU_NAME(differentiate_keys)
#define store_keys          FC_CPU_NAME(store_keys)
#define visit_bias_sums     FC_CPU_NAME(visit_bias_sums)
#define store_dq            FC_CPU_NAME(store_dq)
#define backward            FC_CPU_NAME(backward)

/* A tile of rows by its number: all tiles of head 0, then head 1, ..., batch by batch. */
struct row_tile {
    int64_t batch, head, first_row, rows, index; /* the last: of its first row, among all rows */
};

static struct row_tile find_row_tile(const struct backward_job *job, int64_t number)
{
    const fc_forward_args *args = &job->args->forward;
    int64_t head = number / job->layout.row_tiles, first_row = number % job->layout.row_tiles * BLOCK_M;
    int64_t left = args->seqlen_q - first_row;
    return (struct row_tile){
        .batch = head / args->num_heads_q,
        .head = head % args->num_heads_q,
        .first_row = first_row,
        .rows = left < BLOCK_M ? left : BLOCK_M,
        .index = head * args->seqlen_q + first_row,
    };
}

/* Keys *begin .. *end - 1 are those that the band shows to some of these rows. */
static void find_band(const fc_forward_args *args, int64_t first_row, int64_t rows, int64_t *begin, int64_t *end)
{
    *begin = clamp(first_row + args->band_left, 0, args->seqlen_k);
    *end = clamp(first_row + rows - 1 + args->band_right + 1, *begin, args->seqlen_k);
}

/* What a task owns along one dimension. */
struct range {
    int64_t begin, end;
};

#endif /* FC_CPU_BACKWARD_TEMPLATE_H */

static real dot(const real *a, const real *b, int64_t count)
{
    vec sums = {0};
    real sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += load(a + i) * load(b + i);
    for (; i < count; i++) sum += a[i] * b[i];
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}

/* Adds one row's exp(score) over the keys of a run to an online softmax. */
static void sum_exp(const block *t, const struct run *run, int64_t row, real *max, real *sum)
{
    real *score = t->score + row * BLOCK_N, old_max = *max;
    int64_t first, last;
    visible_keys(t, row, &first, &last);
    for (int64_t key = run->begin / LANES * LANES; key < run->end; key += LANES) {
        vec slope = {0}, s = finish_score(t, load(score + key), row, key, first, last, &slope);
        store(score + key, s);
        for (int lane = 0; lane < LANES; lane++) *max = s[lane] > *max ? s[lane] : *max;
    }
    if (*max == (real)-INFINITY) return;
    vec sums = {0};
    for (int64_t key = run->begin / LANES * LANES; key < run->end; key += LANES)
        sums += exp_lanes(load(score + key) - *max);
    *sum *= exp_lanes(broadcast(old_max - *max))[0];
    for (int lane = 0; lane < LANES; lane++) *sum += sums[lane];
}

/* lse is a sum of two numbers, max + log(sum), and where the first is large the second is lost in rounding: under a
 * mask of finfo.min, exp(score - lse) is 1 for each of n equal keys and not 1/n. Up to 1024 an lse is rounded by 2^-15
 * (2^-44) at most, and so is p, relatively; above it both numbers are found again: p = exp(score - max) / sum. */
static bool is_coarse(real lse)
{
    return lse < -1024 || (lse > 1024 && lse < (real)INFINITY);
}

static void count_again(block *t, const struct row_tile *tile, real *base, real *inverse)
{
    const fc_forward_args *args = t->args;
    const fc_tensor *sinks = &args->sinks;
    real max[BLOCK_M], sum[BLOCK_M];
    bool again[BLOCK_M];
    for (int64_t row = 0; row < tile->rows; row++) {
        again[row] = is_coarse(base[row]);
        max[row] = (real)-INFINITY;
        if (sinks->dtype != FC_NONE)
            load_row(&max[row], element(sinks, tile->batch, tile->head, 0), sinks->dtype, 0, 1);
        sum[row] = max[row] == (real)-INFINITY ? 0 : 1;
    }
    int64_t begin, end;
    find_band(args, tile->first_row, tile->rows, &begin, &end);
    for (begin = begin / BLOCK_N * BLOCK_N; begin < end; begin += BLOCK_N) {
        struct run runs[GRANULES];
        take_keys(t, tile->batch, tile->head / t->job->group, begin);
        take_rows(t, tile->head, tile->first_row);
        int num_runs = find_runs(t, runs);
        t->query = load_lines(&args->query, element(&args->query, tile->batch, tile->head, tile->first_row), tile->rows,
                              args->head_dim, t->base, t->query_copy, &t->query_stride);
        for (int i = 0; i < num_runs; i++) {
            multiply_keys(&runs[i], t->key_lanes, t->query, t->query_stride, args->head_dim, t->score);
            for (int64_t row = runs[i].row; row < runs[i].row + runs[i].rows; row++)
                if (again[row]) sum_exp(t, &runs[i], row, &max[row], &sum[row]);
        }
    }
    for (int64_t row = 0; row < tile->rows; row++) {
        if (!again[row] || sum[row] == 0) continue;
        base[row] = max[row];
        inverse[row] = 1 / sum[row];
    }
}

/* delta of one row, which is 0 for a dark one whatever its dout holds. */
static void prepare_row(const block *t, const struct row_tile *tile, int64_t row, real *delta, real *base,
                        real *inverse)
{
    const fc_backward_args *args = t->job->args;
    const fc_tensor *out = &args->forward.out, *dout = &args->dout, *lse = &args->forward.lse, *dlse = &args->dlse;
    int64_t head_dim_v = args->forward.head_dim_v, position = tile->first_row + row;
    real given = 0;
    load_row(base, element(lse, tile->batch, tile->head, position), lse->dtype, 0, 1);
    *delta = 0;
    *inverse = *base == (real)-INFINITY ? 0 : 1;
    if (*base == (real)-INFINITY) {
        *base = (real)INFINITY; /* of which exp(score - base) is 0 */
        return;
    }
    if (*base == (real)INFINITY) *base = (real)NAN;
    if (dlse->dtype != FC_NONE) load_row(&given, element(dlse, tile->batch, tile->head, position), dlse->dtype, 0, 1);
    const real *a = read_row(out, element(out, tile->batch, tile->head, position), head_dim_v, t->staging);
    const real *b =
        read_row(dout, element(dout, tile->batch, tile->head, position), head_dim_v, t->staging + t->staging_stride);
    *delta = dot(a, b, head_dim_v) - given;
}

/* Where the sums of dq's rows begin. *stride: from row to row. */
static real *dq_row(const struct backward_job *job, const struct row_tile *tile, int64_t *stride)
{
    const fc_tensor *dq = &job->args->dq;
    if (job->layout.dq_in_place) {
        *stride = dq->strides[2];
        return (real *)element(dq, tile->batch, tile->head, tile->first_row);
    }
    *stride = job->layout.dq_width;
    return (real *)(job->workspace + job->layout.dq_sums) + tile->index * *stride;
}

static void prepare_rows(void *context, int64_t number)
{
    struct backward_job *job = context;
    const fc_backward_args *args = job->args;
    struct row_tile tile = find_row_tile(job, number);
    real *delta = (real *)(job->workspace + job->layout.delta) + tile.index;
    real *base = (real *)(job->workspace + job->layout.base) + tile.index;
    real *inverse = (real *)(job->workspace + job->layout.inverse) + tile.index;
    bool again = false;
    block t;
    if (!find_room(&t, job)) {
        atomic_store(&job->out_of_memory, true);
        return;
    }
    for (int64_t row = 0; row < tile.rows; row++) {
        prepare_row(&t, &tile, row, &delta[row], &base[row], &inverse[row]);
        again = again || is_coarse(base[row]);
    }
    if (again) count_again(&t, &tile, base, inverse);

    if (args->dq.dtype != FC_NONE) {
        int64_t stride;
        real *dq = dq_row(job, &tile, &stride);
        for (int64_t row = 0; row < tile.rows; row++)
            memset(dq + row * stride, 0, (size_t)args->forward.head_dim * sizeof(real));
        atomic_init((atomic_int *)(job->workspace + job->layout.tickets) + number, 0);
    }
    if (args->dsinks.dtype != FC_NONE) {
        const fc_tensor *sinks = &args->forward.sinks;
        real sink;
        double sum = 0;
        load_row(&sink, element(sinks, tile.batch, tile.head, 0), sinks->dtype, 0, 1);
        for (int64_t row = 0; row < tile.rows; row++)
            sum -= exp((double)sink - (double)base[row]) * (double)inverse[row] * (double)delta[row];
        ((double *)(job->workspace + job->layout.sink_sums))[number] = sum;
    }
}

/* dsinks from the parts of it that prepare_rows left, batch by batch and head by head. */
static void sum_sinks(const struct backward_job *job)
{
    const fc_tensor *dsinks = &job->args->dsinks;
    const double *parts = (const double *)(job->workspace + job->layout.sink_sums);
    int64_t batch = job->args->forward.batch, heads = job->args->forward.num_heads_q, tiles = job->layout.row_tiles;
    bool sums_batch = dsinks->strides[0] == 0, sums_heads = dsinks->strides[1] == 0; /* one element, of all of it */
    for (int64_t b = 0; b < (sums_batch ? 1 : batch); b++)
        for (int64_t h = 0; h < (sums_heads ? 1 : heads); h++) {
            struct range in_batch = sums_batch ? (struct range){0, batch} : (struct range){b, b + 1};
            struct range in_heads = sums_heads ? (struct range){0, heads} : (struct range){h, h + 1};
            double sum = 0;
            for (int64_t i = in_batch.begin; i < in_batch.end; i++)
                for (int64_t part = (i * heads + in_heads.begin) * tiles; part < (i * heads + in_heads.end) * tiles;
                     part++)
                    sum += parts[part];
            real rounded = (real)sum;
            store_row(element(dsinks, b, h, 0), dsinks->dtype, 1, &rounded, 1);
        }
}

/* dv and dk += what a run gives. */
static void add_to_keys(block *t, const struct run *run)
{
    const fc_backward_args *args = t->job->args;
    int64_t keys = run->end - run->begin, place = run->row * BLOCK_N + run->begin;
    if (args->dv.dtype != FC_NONE)
        multiply(t->value_width / LANES, keys, t->dout + run->row * t->dout_stride, t->dout_stride, t->score + place,
                 BLOCK_N, 1, run->rows, t->dv + run->begin * t->value_width, t->value_width, true);
    if (args->dk.dtype != FC_NONE)
        multiply(t->head_width / LANES, keys, t->query + run->row * t->query_stride, t->query_stride,
                 t->gradient + place, BLOCK_N, 1, run->rows, t->dk + run->begin * t->head_width, t->head_width, true);
}

/* dq += what a tile gives, after all earlier keys have added theirs. */
static void add_to_dq(const block *t, const struct row_tile *tile, const struct run *runs, int num_runs, int turn)
{
    const struct backward_job *job = t->job;
    int64_t number =
        (tile->batch * t->args->num_heads_q + tile->head) * job->layout.row_tiles + tile->first_row / BLOCK_M;
    atomic_int *ticket = (atomic_int *)(job->workspace + job->layout.tickets) + number;
    int64_t stride;
    real *dq = dq_row(job, tile, &stride);
    fc_cpu_wait_for(ticket, turn, &job->out_of_memory);
    for (int i = 0; i < num_runs; i++) {
        const struct run *run = &runs[i];
        int64_t keys = run->end - run->begin;
        multiply(t->head_width / LANES, run->rows, t->key + run->begin * t->key_stride, t->key_stride,
                 t->gradient + run->row * BLOCK_N + run->begin, 1, BLOCK_N, keys, dq + run->row * stride, stride, true);
    }
    for (int64_t row = 0; row < t->rows; row++) /* of a key that its neighbours see a dark row may have 0 * NaN */
        if (t->base[row] == (real)INFINITY) memset(dq + row * stride, 0, (size_t)t->args->head_dim * sizeof(real));
    atomic_store(ticket, turn + 1);
}

/* A tile of t->bias to dbias, or to its sums: rows, then keys, are added up first where they are one element. */
static void add_to_dbias(const block *t, bool sums)
{
    const fc_backward_args *args = t->job->args;
    const fc_tensor *dbias = &args->dbias;
    if (!sums) {
        for (int64_t row = 0; row < t->rows; row++) {
            char *to = element(dbias, t->batch, t->head, t->first_row + row);
            store_row(to + t->first_key * dbias->strides[3] * element_bytes(dbias->dtype), dbias->dtype,
                      dbias->strides[3], t->bias + row * BLOCK_N, t->keys);
        }
        return;
    }
    const int64_t *strides = t->job->layout.bias_strides;
    int64_t rows = t->rows;
    real *to = (real *)(t->job->workspace + t->job->layout.bias_sums);
    to += t->batch * strides[0] + t->head * strides[1] + t->first_row * strides[2] + t->first_key * strides[3];
    for (; rows > 1 && fc_cpu_sums_bias_over(args, 2); rows--)
        for (int64_t key = 0; key < BLOCK_N; key++) t->bias[key] += t->bias[(rows - 1) * BLOCK_N + key];
    for (int64_t row = 0; row < rows; row++, to += strides[2]) {
        real *from = t->bias + row * BLOCK_N;
        int64_t keys = t->keys;
        for (; keys > 1 && fc_cpu_sums_bias_over(args, 3); keys--) from[0] += from[keys - 1];
        for (int64_t key = 0; key < keys; key++) to[key] += from[key];
    }
}

/* All that one tile gives. `turn`: how many blocks of keys have their turn at these rows before this one. */
static void differentiate_tile(block *t, const struct row_tile *tile, int turn)
{
    const fc_backward_args *args = t->job->args;
    const fc_tensor *query = &t->args->query, *dout = &args->dout;
    struct run runs[GRANULES];
    take_rows(t, tile->head, tile->first_row);
    int num_runs = find_runs(t, runs);
    if (num_runs > 0) {
        t->query = load_lines(query, element(query, tile->batch, tile->head, tile->first_row), t->rows,
                              t->args->head_dim, t->base, t->query_copy, &t->query_stride);
        t->dout = load_lines(dout, element(dout, tile->batch, tile->head, tile->first_row), t->rows,
                             t->args->head_dim_v, t->base, t->dout_copy, &t->dout_stride);
    }
    for (int i = 0; i < num_runs; i++) {
        multiply_keys(&runs[i], t->key_lanes, t->query, t->query_stride, t->args->head_dim, t->score);
        multiply_keys(&runs[i], t->value_lanes, t->dout, t->dout_stride, t->args->head_dim_v, t->gradient);
        differentiate_run(t, &runs[i]);
        add_to_keys(t, &runs[i]);
    }
    if (args->dq.dtype != FC_NONE) add_to_dq(t, tile, runs, num_runs, turn);
}

static void store_keys(const block *t, const fc_tensor *gradient, const real *from, int64_t from_stride, int64_t width)
{
    if (gradient->dtype == FC_NONE) return;
    for (int64_t key = 0; key < t->keys; key++)
        store_row(element(gradient, t->batch, t->head_kv, t->first_key + key), gradient->dtype, gradient->strides[3],
                  from + key * from_stride, width);
}

/* One block of keys against every row of the heads that share it. */
static void differentiate_block(block *t, int64_t batch, int64_t head_kv, int64_t first_key)
{
    const struct backward_job *job = t->job;
    const fc_backward_args *args = job->args;
    bool bias_sums = fc_cpu_sums_bias(args);
    take_keys(t, batch, head_kv, first_key);
    transpose_keys(t, &t->args->value, t->args->head_dim_v, 1, t->value_lanes);
    memset(t->dk, 0, (size_t)(t->keys * t->head_width) * sizeof(real));
    memset(t->dv, 0, (size_t)(t->keys * t->value_width) * sizeof(real));

    for (int64_t number = 0; number < job->group * job->layout.row_tiles; number++) {
        int64_t head = batch * t->args->num_heads_q + head_kv * job->group, begin, end;
        struct row_tile tile = find_row_tile(job, head * job->layout.row_tiles + number);
        find_band(t->args, tile.first_row, tile.rows, &begin, &end);
        bool seen = begin < end && first_key / BLOCK_N >= begin / BLOCK_N && first_key < end;
        if (t->bias && (seen || !bias_sums)) memset(t->bias, 0, BLOCK_M * BLOCK_N * sizeof(real));
        if (seen)
            differentiate_tile(t, &tile, (int)(first_key / BLOCK_N - begin / BLOCK_N));
        else
            take_rows(t, tile.head, tile.first_row);
        if (t->bias && (seen || !bias_sums)) add_to_dbias(t, bias_sums);
    }
    store_keys(t, &args->dk, t->dk, t->head_width, t->args->head_dim);
    store_keys(t, &args->dv, t->dv, t->value_width, t->args->head_dim_v);
}

/* What a task owns of dbias' sums: cleared before its keys, stored after them. */
static void visit_bias_sums(const struct backward_job *job, struct range batch, struct range heads, struct range keys,
                            bool clear)
{
    const fc_tensor *dbias = &job->args->dbias;
    const int64_t *strides = job->layout.bias_strides;
    struct range rows = {0, job->args->forward.seqlen_q}, one = {0, 1};
    if (fc_cpu_sums_bias_over(job->args, 0)) batch = one;
    if (fc_cpu_sums_bias_over(job->args, 1)) heads = one;
    if (fc_cpu_sums_bias_over(job->args, 2)) rows = one;
    if (fc_cpu_sums_bias_over(job->args, 3)) keys = one;
    for (int64_t b = batch.begin; b < batch.end; b++)
        for (int64_t h = heads.begin; h < heads.end; h++)
            for (int64_t row = rows.begin; row < rows.end; row++) {
                real *sums = (real *)(job->workspace + job->layout.bias_sums);
                sums += b * strides[0] + h * strides[1] + row * strides[2] + keys.begin * strides[3];
                int64_t column = keys.begin * dbias->strides[3] * element_bytes(dbias->dtype);
                if (clear)
                    memset(sums, 0, (size_t)(keys.end - keys.begin) * sizeof(real));
                else
                    store_row(element(dbias, b, h, row) + column, dbias->dtype, dbias->strides[3], sums,
                              keys.end - keys.begin);
            }
}

/* Tasks are numbered batch fastest, then heads, then blocks of keys: those that add to the same dq are far apart, and
 * under a causal mask the longest come first. */
static void differentiate_keys(void *context, int64_t number)
{
    struct backward_job *job = context;
    const fc_forward_args *args = &job->args->forward;
    const fc_cpu_tasks *tasks = &job->tasks;
    bool sums = fc_cpu_sums_bias(job->args);
    int64_t b = number % tasks->batch, h = number / tasks->batch % tasks->heads_kv;
    int64_t first_key = number / tasks->batch / tasks->heads_kv * BLOCK_N;
    struct range batch = {b, b + 1}, heads = {h, h + 1}, keys = {first_key, first_key + BLOCK_N};
    if (fc_cpu_sums_bias_over(job->args, 0)) batch = (struct range){0, args->batch};
    if (fc_cpu_sums_bias_over(job->args, 1)) heads = (struct range){0, args->num_heads_kv};
    if (fc_cpu_sums_bias_over(job->args, 3)) keys = (struct range){0, args->seqlen_k};
    if (keys.end > args->seqlen_k) keys.end = args->seqlen_k;
    struct range heads_q = {heads.begin * job->group, heads.end * job->group};
    block t;
    if (!find_room(&t, job)) {
        atomic_store(&job->out_of_memory, true);
        return;
    }
    if (sums) visit_bias_sums(job, batch, heads_q, keys, true);
    for (b = batch.begin; b < batch.end; b++)
        for (h = heads.begin; h < heads.end; h++)
            for (first_key = keys.begin; first_key < keys.end; first_key += BLOCK_N)
                differentiate_block(&t, b, h, first_key);
    if (sums) visit_bias_sums(job, batch, heads_q, keys, false);
}

static void store_dq(void *context, int64_t number)
{
    const struct backward_job *job = context;
    const fc_tensor *dq = &job->args->dq;
    struct row_tile tile = find_row_tile(job, number);
    int64_t stride;
    const real *from = dq_row(job, &tile, &stride);
    for (int64_t row = 0; row < tile.rows; row++)
        store_row(element(dq, tile.batch, tile.head, tile.first_row + row), dq->dtype, dq->strides[3],
                  from + row * stride, job->args->forward.head_dim);
}

static fc_status backward(const fc_backward_args *args, const fc_plan *plan, void *workspace)
{
    const fc_forward_args *forward = &args->forward;
    struct backward_job job = {
        .args = args,
        .tasks = fc_cpu_backward_tasks(args),
        .layout = fc_cpu_backward_layout(args),
        .workspace = workspace,
        .group = forward->num_heads_kv == 0 ? 0 : forward->num_heads_q / forward->num_heads_kv,
    };
    int64_t row_tiles = forward->batch * forward->num_heads_q * job.layout.row_tiles;
    int32_t threads = plan->num_threads, to_wake = fc_cpu_threads_to_wake(forward, plan);
    fc_cpu_run(prepare_rows, &job, row_tiles, threads, to_wake);
    if (!atomic_load(&job.out_of_memory)) {
        if (args->dsinks.dtype != FC_NONE) sum_sinks(&job);
        fc_cpu_run(differentiate_keys, &job, job.tasks.total, threads, to_wake);
        if (args->dq.dtype != FC_NONE && !job.layout.dq_in_place)
            fc_cpu_run(store_dq, &job, row_tiles, threads, to_wake);
    }
    if (atomic_load(&job.out_of_memory))
        return fc_fail(FC_OUT_OF_MEMORY,
                       "no memory for the CPU kernel's scratch (under 2 MiB a thread): free some, or lower num_threads "
                       "(now %d)",
                       (int)plan->num_threads);
    return FC_OK;
}
