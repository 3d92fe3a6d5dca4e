/*
 * backward_tile.h - one tile of the backward: at most BLOCK_M query rows of one head against at most BLOCK_N keys.
 *
 * The trick: the lanes of scores are keys. The keys stay for many tiles of rows, so they are transposed once, and all
 * five products read query, dout and their own results where they lie:
 *
 *   S[row][key]    = sum_d    Q[row][d]   * K^T[d][key]       a scalar of Q times a vector of keys
 *   dP[row][key]   = sum_dv   dO[row][dv] * V^T[dv][key]
 *   dV[key][dv]   += sum_row  P[row][key] * dO[row][dv]       a scalar of P times a vector of columns
 *   dK[key][d]    += sum_row  dS[row][key] * Q[row][d]
 *   dQ[row][d]    += sum_key  dS[row][key] * K[key][d]
 *
 * and what belongs to a row (lse, delta, ALiBi's slope) is a scalar. Bands, dark rows and masks skip work in granules
 * of GRANULE rows: a run is granules whose rows see something of the same keys. No other key of the block is read for
 * them.
 *
 * Included by backward_template.h once per element type.
 */
#include "common/dropout.h"

#ifndef FC_CPU_BACKWARD_TILE_H
#define FC_CPU_BACKWARD_TILE_H

#define block             FC_CPU_NAME(block)
#define find_room         FC_CPU_NAME(find_room)
#define load_lines        FC_CPU_NAME(load_lines)
#define transpose_keys    FC_CPU_NAME(transpose_keys)
#define take_keys         FC_CPU_NAME(take_keys)
#define visible_keys      FC_CPU_NAME(visible_keys)
#define take_rows         FC_CPU_NAME(take_rows)
#define load_mask_row     FC_CPU_NAME(load_mask_row)
#define narrow_granule    FC_CPU_NAME(narrow_granule)
#define find_runs         FC_CPU_NAME(find_runs)
#define multiply_keys     FC_CPU_NAME(multiply_keys)
#define finish_score      FC_CPU_NAME(finish_score)
#define draw_row          FC_CPU_NAME(draw_row)
#define differentiate_row FC_CPU_NAME(differentiate_row)
#define differentiate_run FC_CPU_NAME(differentiate_run)

#define BLOCK_M FC_CPU_BACKWARD_BLOCK_M
#define BLOCK_N FC_CPU_BACKWARD_BLOCK_N
enum { GRANULE = 16, GRANULES = BLOCK_M / GRANULE };

/* What all tasks of a call share. */
struct backward_job {
    const fc_backward_args *args;
    fc_cpu_tasks tasks;
    fc_cpu_layout layout;
    char *workspace;
    int64_t group; /* query heads per key/value head */
    atomic_bool out_of_memory;
};

/* Rows of a tile, and the keys of the block from the first to the last that one of them sees. */
struct run {
    int64_t row, rows, begin, end;
};

#endif /* FC_CPU_BACKWARD_TILE_H */

/* A task's state. Buffers are in this thread's scratch; "whole" means padded to whole vectors. */
typedef struct block {
    const struct backward_job *job;
    const fc_forward_args *args;
    int64_t head_width, value_width; /* head_dim and head_dim_v, whole */

    /* The block of keys. */
    int64_t batch, head_kv, first_key, keys;
    const real *key; /* [keys][head_dim whole], key_stride apart: in place if they can be */
    int64_t key_stride;
    real *key_copy;
    real *key_lanes, *value_lanes; /* [head_dim][BLOCK_N], times the scale; [head_dim_v][BLOCK_N] */
    real *dk, *dv;                 /* [keys][head_width], [keys][value_width] */

    /* The tile of rows. */
    int64_t head, first_row, rows;
    const real *base, *inverse, *delta; /* of these rows */
    real slope;                         /* ALiBi */
    fc_random draw_key;                 /* dropout's */
    const real *query, *dout;           /* [rows][whole], *_stride apart: in place if they can be */
    int64_t query_stride, dout_stride;
    real *query_copy, *dout_copy;
    real *mask;     /* [BLOCK_M][BLOCK_N] */
    real *score;    /* [BLOCK_M][BLOCK_N]: then the probabilities */
    real *gradient; /* [BLOCK_M][BLOCK_N]: of the probabilities, then of q . k */
    real *bias;     /* [BLOCK_M][BLOCK_N]: of the scores; NULL if nobody asks */
    real *drop;     /* [BLOCK_N]: a row's factors by dropout; NULL if there is none */
    real *staging;  /* LANES rows on their way to being transposed */
    int64_t staging_stride;
} block;

/* Lays the buffers out in this thread's scratch, each on a cache line's boundary. */
static bool find_room(block *t, const struct backward_job *job)
{
    const fc_forward_args *args = &job->args->forward;
    t->job = job;
    t->args = args;
    t->head_width = round_up(args->head_dim, LANES);
    t->value_width = round_up(args->head_dim_v, LANES);
    t->staging_stride = t->head_width > t->value_width ? t->head_width : t->value_width;
    bool biased = job->args->dbias.dtype != FC_NONE, masked = args->attn_mask.dtype != FC_NONE;
    bool drops = args->keep_scale != 0;
    const struct {
        real **buffer;
        int64_t size;
    } parts[] = {
        {&t->key_copy, BLOCK_N * t->head_width},
        {&t->key_lanes, BLOCK_N * t->head_width},
        {&t->value_lanes, BLOCK_N * t->value_width},
        {&t->dk, BLOCK_N * t->head_width},
        {&t->dv, BLOCK_N * t->value_width},
        {&t->query_copy, BLOCK_M * t->head_width},
        {&t->dout_copy, BLOCK_M * t->value_width},
        {&t->mask, masked ? BLOCK_M * BLOCK_N : 0},
        {&t->score, BLOCK_M * BLOCK_N},
        {&t->gradient, BLOCK_M * BLOCK_N},
        {&t->bias, biased ? BLOCK_M * BLOCK_N : 0},
        {&t->drop, drops ? BLOCK_N : 0},
        {&t->staging, LANES * t->staging_stride},
    };
    const int num_parts = sizeof parts / sizeof parts[0];
    int64_t size = 0;
    for (int i = 0; i < num_parts; i++) size += round_up(parts[i].size, 64);
    real *next = fc_cpu_scratch((uint64_t)size * sizeof(real));
    if (!next) return false;
    for (int i = 0; i < num_parts; next += round_up(parts[i].size, 64), i++) *parts[i].buffer = next;
    if (!biased) t->bias = NULL;
    if (!drops) t->drop = NULL;
    return true;
}

/* `count` rows of a tensor from `from` as whole vectors: in place, or copied to `buffer`. A dark row (its `base` is
 * +inf; NULL: none is) becomes zeros, so that nothing in it, NaN neither, reaches a sum. */
static const real *load_lines(const fc_tensor *tensor, const char *from, int64_t count, int64_t width, const real *base,
                              real *buffer, int64_t *stride)
{
    bool dark = false;
    for (int64_t row = 0; base && row < count; row++) dark = dark || base[row] == (real)INFINITY;
    *stride = tensor->strides[2];
    if (is_in_place(tensor, width, LANES) && !dark) return (const real *)from;

    *stride = round_up(width, LANES);
    for (int64_t row = 0; row < count; row++) {
        real *to = buffer + row * *stride;
        if (base && base[row] == (real)INFINITY)
            memset(to, 0, (size_t)*stride * sizeof(real));
        else
            load_row(to, from + row * tensor->strides[2] * element_bytes(tensor->dtype), tensor->dtype,
                     tensor->strides[3], width);
    }
    return buffer;
}

/* The block's rows of key or value as columns, times a factor; lanes behind the last repeat it and mean nothing. */
static void transpose_keys(const block *t, const fc_tensor *tensor, int64_t width, real factor, real *to)
{
    for (int64_t first = 0; first < t->keys; first += LANES) {
        const real *rows[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t key = clamp(first + lane, 0, t->keys - 1);
            rows[lane] = read_row(tensor, element(tensor, t->batch, t->head_kv, t->first_key + key), width,
                                  t->staging + lane * t->staging_stride);
        }
        transpose_rows(to + first, BLOCK_N, rows, width, factor);
    }
}

static void take_keys(block *t, int64_t batch, int64_t head_kv, int64_t first_key)
{
    const fc_forward_args *args = t->args;
    t->batch = batch;
    t->head_kv = head_kv;
    t->first_key = first_key;
    t->keys = clamp(args->seqlen_k - first_key, 0, BLOCK_N);
    t->key = load_lines(&args->key, element(&args->key, batch, head_kv, first_key), t->keys, args->head_dim, NULL,
                        t->key_copy, &t->key_stride);
    real factor = (real)(args->softcap != 0 ? args->scale / args->softcap : args->scale);
    transpose_keys(t, &args->key, args->head_dim, factor, t->key_lanes);
}

/* Keys *begin .. *end - 1 of the block are those that the band shows to this row of the tile; none to a dark row. */
static void visible_keys(const block *t, int64_t row, int64_t *begin, int64_t *end)
{
    int64_t position = t->first_row + row - t->first_key;
    *begin = clamp(position + t->args->band_left, 0, t->keys);
    *end = t->base[row] == (real)INFINITY ? *begin : clamp(position + t->args->band_right + 1, *begin, t->keys);
}

static void take_rows(block *t, int64_t head, int64_t first_row)
{
    const fc_forward_args *args = t->args;
    const struct backward_job *job = t->job;
    t->head = head;
    t->first_row = first_row;
    t->rows = clamp(args->seqlen_q - first_row, 0, BLOCK_M);
    int64_t index = (t->batch * args->num_heads_q + head) * args->seqlen_q + first_row;
    t->base = (const real *)(job->workspace + job->layout.base) + index;
    t->inverse = (const real *)(job->workspace + job->layout.inverse) + index;
    t->delta = (const real *)(job->workspace + job->layout.delta) + index;
    const fc_tensor *slopes = &args->alibi_slopes;
    if (slopes->dtype != FC_NONE) load_row(&t->slope, element(slopes, t->batch, head, 0), slopes->dtype, 0, 1);
    if (t->drop) t->draw_key = fc_draw_key(args, t->batch, head);
}

/* Reads the mask of keys begin .. end - 1 and widens *first .. *last - 1 to those it leaves visible. */
static void load_mask_row(block *t, int64_t row, int64_t begin, int64_t end, int64_t *first, int64_t *last)
{
    const fc_tensor *mask = &t->args->attn_mask;
    real *values = t->mask + row * BLOCK_N;
    int64_t column = (t->first_key + begin) * mask->strides[3] * element_bytes(mask->dtype);
    load_row(values + begin, element(mask, t->batch, t->head, t->first_row + row) + column, mask->dtype,
             mask->strides[3], end - begin);
    while (begin < end && values[begin] == (real)-INFINITY) begin++;
    while (begin < end && values[end - 1] == (real)-INFINITY) end--;
    if (begin == end) return;
    if (begin < *first) *first = begin;
    if (end > *last) *last = end;
}

/* Keys *begin .. *end - 1: from the first to the last that some row of a granule sees. */
static void narrow_granule(block *t, int64_t row, int64_t *begin, int64_t *end)
{
    int64_t last_row = row + GRANULE < t->rows ? row + GRANULE : t->rows;
    *begin = BLOCK_N, *end = 0;
    for (; row < last_row; row++) {
        int64_t first, last;
        visible_keys(t, row, &first, &last);
        if (first == last) continue;
        if (t->args->attn_mask.dtype != FC_NONE) {
            load_mask_row(t, row, first, last, begin, end);
        } else {
            if (first < *begin) *begin = first;
            if (last > *end) *end = last;
        }
    }
}

static int find_runs(block *t, struct run runs[GRANULES])
{
    int count = 0;
    for (int64_t row = 0; row < t->rows; row += GRANULE) {
        int64_t begin, end, rows = clamp(t->rows - row, 0, GRANULE);
        narrow_granule(t, row, &begin, &end);
        if (begin >= end) continue;
        struct run *last = count > 0 ? &runs[count - 1] : NULL;
        if (last && last->begin == begin && last->end == end && last->row + last->rows == row)
            last->rows += rows;
        else
            runs[count++] = (struct run){row, rows, begin, end};
    }
    return count;
}

/* to[row][key] = from[row] . key, for a run's rows and whole vectors of keys around its own. */
static void multiply_keys(const struct run *run, const real *keys, const real *from, int64_t stride, int64_t depth,
                          real *to)
{
    int64_t begin = run->begin / LANES * LANES, end = round_up(run->end, LANES);
    multiply((end - begin) / LANES, run->rows, keys + begin, BLOCK_N, from + run->row * stride, 1, stride, depth,
             to + run->row * BLOCK_N + begin, BLOCK_N, false);
}

/* The rest of the formula on one vector of products, of a row with the keys from `key`; -inf where hidden. *slope is
 * the derivative of the score to the product. */
FC_INLINE vec finish_score(const block *t, vec score, int64_t row, int64_t key, int64_t first, int64_t last, vec *slope)
{
    const fc_forward_args *args = t->args;
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    if (args->softcap != 0) {
        vec capped = tanh_lanes(score);
        *slope *= 1 - capped * capped;
        score = (real)args->softcap * capped;
    }
    vec mask = args->attn_mask.dtype != FC_NONE ? load(t->mask + row * BLOCK_N + key) : (vec){0};
    if (args->attn_mask.dtype != FC_BOOL) score += mask;
    if (args->alibi_slopes.dtype != FC_NONE) {
        double from_diagonal = (double)(t->first_key + key - t->first_row - row) - (double)args->diagonal;
        vec distance = (real)from_diagonal + __builtin_convertvector(lane, vec);
        score -= t->slope * max_lanes(distance, -distance);
    }
    ivec place = lane + (int)key, visible = (place >= (int)first) & (place < (int)last);
    if (args->attn_mask.dtype == FC_BOOL) visible &= mask == 0;
    return select_lanes(visible, score, broadcast((real)-INFINITY));
}

/* What dropout multiplies a row's weights by, for the keys of a run. Blocks of keys begin where draws do. */
static void draw_row(const block *t, const struct run *run, int64_t row)
{
    _Static_assert(BLOCK_N % FC_DRAW_COLUMNS == 0, "a draw is of one block");
    const real scale = (real)t->args->keep_scale;
    const uint32_t keep_below = t->args->keep_below;
    for (int64_t key = run->begin / FC_DRAW_COLUMNS * FC_DRAW_COLUMNS; key < run->end; key += FC_DRAW_COLUMNS)
        for (int lane = 0; lane < FC_DRAW_LANES; lane++) {
            fc_random random =
                fc_draw(t->draw_key.word[0], t->draw_key.word[1], t->first_row + row, t->first_key + key, lane);
            for (int n = 0; n < FC_DRAW_WORDS; n++)
                t->drop[key + n * FC_DRAW_LANES + lane] = random.word[n] < keep_below ? scale : 0;
        }
}

/* One row of a run: from scores and gradients of the probabilities to probabilities and gradients of q . k. `plain`
 * rows see every key of the run and have no options: it is a constant at every call. */
FC_INLINE void differentiate_row(const block *t, const struct run *run, int64_t row, const bool plain)
{
    real *score = t->score + row * BLOCK_N, *gradient = t->gradient + row * BLOCK_N;
    real base = t->base[row], inverse = t->inverse[row], delta = t->delta[row];
    int64_t first, last;
    visible_keys(t, row, &first, &last);
    for (int64_t key = run->begin / LANES * LANES; key < run->end; key += LANES) {
        vec slope = broadcast((real)t->args->scale), s = load(score + key);
        if (!plain) s = finish_score(t, s, row, key, first, last, &slope);
        vec p = exp_lanes(s - base) * inverse, dp = load(gradient + key);
        if (!plain && t->drop) dp *= load(t->drop + key);
        vec ds = p * (dp - delta);
        vec dr = ds * slope;
        if (!plain) { /* what is hidden may be NaN */
            ds = select_lanes(s == (real)-INFINITY, (vec){0}, ds);
            dr = select_lanes(s == (real)-INFINITY, (vec){0}, dr);
        }
        if (!plain && t->drop) p *= load(t->drop + key);
        store(score + key, p);
        store(gradient + key, dr);
        if (!plain && t->bias) store(t->bias + row * BLOCK_N + key, ds);
    }
}

static void differentiate_run(const block *t, const struct run *run)
{
    const fc_forward_args *args = t->args;
    bool options =
        args->softcap != 0 || args->attn_mask.dtype != FC_NONE || args->alibi_slopes.dtype != FC_NONE || t->drop;
    for (int64_t row = run->row; row < run->row + run->rows; row++) {
        int64_t first, last;
        visible_keys(t, row, &first, &last);
        if (t->drop) draw_row(t, run, row);
        if (options || first > run->begin || last < run->end)
            differentiate_row(t, run, row, false);
        else
            differentiate_row(t, run, row, true);
    }
}
