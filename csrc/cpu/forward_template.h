/*
 * forward_template.h - exact attention on the CPU, tile by tile, for one element type and vector width.
 *
 * The trick: the vector lanes of the scores are query rows. A task owns FC_CPU_BLOCK_M rows of one key/value head and
 * keeps Q and the scores transposed, rows last; the lanes of the output are its columns:
 *
 *   S^T[key][row]    = sum_d   K[key][d] * Q^T[d][row]            a scalar of K times a vector of rows
 *   P^T[key][row]    = exp(S^T - m[row])                          maximum and sum run over keys, lane by lane
 *   O[row][dv]      += sum_key P^T[key][row] * V[key][dv]         a scalar of P^T times a vector of columns
 *
 * So K and V are read where they lie, only Q is ever transposed, and no step sums across a vector. Keys come in blocks
 * of FC_CPU_BLOCK_N with the online softmax of FlashAttention: when a row's maximum grows, what was summed under the
 * old one shrinks by exp(old - new).
 *
 * Rows of a tile are (query head of the group, position) pairs, head fastest, so that all query heads of one
 * key/value head share its blocks and a band still cuts a tile by position. A granule is GRANULE rows: the step in
 * which the edge of a band skips work.
 *
 * A tile of very few rows (decoding) would waste most lanes of the scores. There, lanes run along d instead, for the
 * same scores.
 *
 * Included once per element type, with the parameters of simd.h and matrix.h. It defines the function forward_float or
 * forward_double.
 */
#include "common/dropout.h"
#include "cpu.h"
#include "matrix.h"

#ifndef FC_CPU_FORWARD_TEMPLATE_H
#define FC_CPU_FORWARD_TEMPLATE_H

#include <stdatomic.h>

#define tile          FC_CPU_NAME(tile)
#define place_tile    FC_CPU_NAME(place_tile)
#define start_rows    FC_CPU_NAME(start_rows)
#define load_query    FC_CPU_NAME(load_query)
#define load_block    FC_CPU_NAME(load_block)
#define find_runs     FC_CPU_NAME(find_runs)
#define load_mask     FC_CPU_NAME(load_mask)
#define num_vectors   FC_CPU_NAME(num_vectors)
#define adjust_score  FC_CPU_NAME(adjust_score)
#define hide_score    FC_CPU_NAME(hide_score)
#define softmax       FC_CPU_NAME(softmax)
#define drop_granule  FC_CPU_NAME(drop_granule)
#define drop_block    FC_CPU_NAME(drop_block)
#define clear_output  FC_CPU_NAME(clear_output)
#define rescale       FC_CPU_NAME(rescale)
#define score_run     FC_CPU_NAME(score_run)
#define weigh_run     FC_CPU_NAME(weigh_run)
#define finish_scores FC_CPU_NAME(finish_scores)
#define attend_block  FC_CPU_NAME(attend_block)
#define store_output  FC_CPU_NAME(store_output)
#define find_room     FC_CPU_NAME(find_room)
#define forward_task  FC_CPU_NAME(forward_task)
#define forward       FC_CPU_NAME(forward)

#define BLOCK_M FC_CPU_BLOCK_M
#define BLOCK_N FC_CPU_BLOCK_N
enum { GRANULE = 16, GRANULES = BLOCK_M / GRANULE };

/* What all tasks of a call share. */
struct forward_job {
    const fc_forward_args *args;
    int64_t group;          /* query heads per key/value head */
    int64_t tiles_per_head; /* of one key/value head */
    atomic_bool out_of_memory;
};

/* Keys of a block that the same granules see: keys begin .. end - 1, `rows` rows from `row`. */
struct run {
    int64_t begin, end, row, rows;
};

#endif /* FC_CPU_FORWARD_TEMPLATE_H */

/* A task's state. Buffers are in this thread's scratch; [..][row] means BLOCK_M rows apart. */
typedef struct tile {
    const fc_forward_args *args;
    int64_t batch, head_kv;
    int64_t rows;                /* real rows; the lanes behind them repeat the last row's place and mean nothing */
    int64_t head[BLOCK_M];       /* query head of each row */
    int64_t position[BLOCK_M];   /* query index of each row */
    int granules;                /* that hold a real row */
    int64_t key_begin[GRANULES]; /* keys that some row of the granule sees */
    int64_t key_end[GRANULES];
    int64_t all_begin[GRANULES]; /* keys that every row of it sees */
    int64_t all_end[GRANULES];
    bool few_rows;                   /* lanes of the scores run along d */
    bool mask_is_uniform;            /* one row of the mask serves the whole tile */
    bool divide_early;               /* the probabilities by their sum, and not the output */
    bool writes_result;              /* `out` is the result's place: nothing is left to do to it */
    bool has_output;                 /* there is something in `out` to add to */
    real offset[BLOCK_M];            /* position - position[0] */
    real slope[BLOCK_M];             /* ALiBi */
    uint32_t draw_key[2][BLOCK_M];   /* dropout's */
    real max[BLOCK_M], sum[BLOCK_M]; /* of the softmax so far */
    real *query;                     /* [head_dim][row], times the scale; [row][head_dim] if few_rows */
    real *score;                     /* [BLOCK_N][row] */
    real *out;                       /* [row][out_width] */
    int64_t out_stride, out_width;   /* width: head_dim_v in whole vectors */
    real *key, *value;               /* [BLOCK_N][width, whole vectors], where they cannot be read in place */
    real *mask;                      /* [BLOCK_N][row], or [BLOCK_N] if uniform */
    const real *block_mask;          /* the part of it where the block begins */
    real *staging;                   /* LANES rows on their way to being transposed */
    int64_t staging_stride;
} tile;

static int64_t num_vectors(const tile *t)
{
    return (t->rows + LANES - 1) / LANES;
}

/* Which rows these are, and which keys they see: key j where band_left <= j - position <= band_right. */
static void place_tile(tile *t, const struct forward_job *job, int64_t index)
{
    const fc_forward_args *args = job->args;
    /* The last tile of a head first: under a causal mask it has the most to do. */
    int64_t first_row = (job->tiles_per_head - 1 - index % job->tiles_per_head) * BLOCK_M;
    int64_t head_index = index / job->tiles_per_head, position = first_row / job->group, head = first_row % job->group;
    t->args = args;
    t->batch = head_index / args->num_heads_kv;
    t->head_kv = head_index % args->num_heads_kv;
    t->rows = clamp(job->group * args->seqlen_q - first_row, 0, BLOCK_M);
    t->granules = (int)((t->rows + GRANULE - 1) / GRANULE);

    for (int64_t row = 0; row < t->granules * GRANULE; row++) {
        if (row < t->rows) {
            t->head[row] = t->head_kv * job->group + head;
            t->position[row] = position;
            if (++head == job->group) head = 0, position++;
        } else {
            t->head[row] = t->head[row - 1];
            t->position[row] = t->position[row - 1];
        }
        t->offset[row] = (real)(t->position[row] - t->position[0]);
    }
    /* A row costs about two operations a vector of d then, with the sum over lanes, where LANES rows cost LANES. */
    t->few_rows = t->rows * 4 <= LANES && args->head_dim % LANES == 0;
    const int64_t *mask_strides = args->attn_mask.strides;
    t->mask_is_uniform = t->rows == 1 || (mask_strides[2] == 0 && (mask_strides[1] == 0 || job->group == 1));
    for (int g = 0; g < t->granules; g++) {
        int64_t first = t->position[g * GRANULE], last = t->position[g * GRANULE + GRANULE - 1];
        t->key_begin[g] = clamp(first + args->band_left, 0, args->seqlen_k);
        t->key_end[g] = clamp(last + args->band_right + 1, 0, args->seqlen_k);
        t->all_begin[g] = clamp(last + args->band_left, 0, args->seqlen_k);
        t->all_end[g] = clamp(first + args->band_right + 1, 0, args->seqlen_k);
    }
    /* In one block of keys a row's sum is known before its output is; the lesser number is divided. */
    int64_t keys = t->key_end[t->granules - 1] - t->key_begin[0];
    t->divide_early = keys <= BLOCK_N && keys < args->head_dim_v;
    t->writes_result = t->divide_early && job->group == 1 && is_in_place(&args->out, args->head_dim_v, LANES);
}

/* The softmax begins empty, or with the sink as the only logit. */
static void start_rows(tile *t)
{
    const fc_forward_args *args = t->args;
    const fc_tensor *sinks = &args->sinks, *slopes = &args->alibi_slopes;
    for (int64_t row = 0; row < t->granules * GRANULE; row++) {
        t->max[row] = (real)-INFINITY;
        t->sum[row] = 0;
        if (sinks->dtype != FC_NONE) {
            load_row(&t->max[row], element(sinks, t->batch, t->head[row], 0), sinks->dtype, 0, 1);
            t->sum[row] = t->max[row] == (real)-INFINITY ? 0 : t->max[row] - t->max[row] + 1; /* NaN for +inf and NaN */
        }
        if (slopes->dtype != FC_NONE)
            load_row(&t->slope[row], element(slopes, t->batch, t->head[row], 0), slopes->dtype, 0, 1);
        if (args->keep_scale != 0) {
            fc_random key = fc_draw_key(args, t->batch, t->head[row]);
            for (int i = 0; i < 2; i++) t->draw_key[i][row] = key.word[i];
        }
    }
    t->has_output = false;
}

static void load_query(tile *t)
{
    const fc_tensor *query = &t->args->query;
    int64_t head_dim = t->args->head_dim;
    real factor = (real)(t->args->softcap != 0 ? t->args->scale / t->args->softcap : t->args->scale);
    for (int64_t row = 0; t->few_rows && row < t->rows; row++) {
        real *to = t->query + row * head_dim;
        load_row(to, element(query, t->batch, t->head[row], t->position[row]), query->dtype, query->strides[3],
                 head_dim);
        for (int64_t d = 0; d < head_dim; d++) to[d] *= factor;
    }
    for (int64_t v = 0; !t->few_rows && v < num_vectors(t); v++) {
        const real *rows[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t row = v * LANES + lane; /* a spare lane repeats the last row */
            rows[lane] = read_row(query, element(query, t->batch, t->head[row], t->position[row]), head_dim,
                                  t->staging + lane * t->staging_stride);
        }
        transpose_rows(t->query + v * LANES, BLOCK_M, rows, head_dim, factor);
    }
}

/* Rows first_key .. first_key + count - 1 of key or value as reals in whole units: in place, or copied to `buffer`.
 * In place even if the rows are a multiple of 4 KiB apart and share few of a cache's sets: each is walked along, and a
 * copy was slower (by 5% or so) at every distance up to 8 KiB. */
static const real *load_block(const tile *t, const fc_tensor *tensor, int64_t width, int64_t unit, int64_t first_key,
                              int64_t count, real *buffer, int64_t *row_stride)
{
    *row_stride = tensor->strides[2];
    if (is_in_place(tensor, width, unit)) return (const real *)element(tensor, t->batch, t->head_kv, first_key);

    *row_stride = round_up(width, LANES);
    for (int64_t key = 0; key < count; key++)
        load_row(buffer + key * *row_stride, element(tensor, t->batch, t->head_kv, first_key + key), tensor->dtype,
                 tensor->strides[3], width);
    return buffer;
}

/* Reads the mask of keys *begin .. *end - 1. Narrows that range where the mask hides its ends from every row. */
static void load_mask(tile *t, int64_t *begin, int64_t *end)
{
    const fc_tensor *mask = &t->args->attn_mask;
    int64_t count = *end - *begin, first = count, last = -1;
    int64_t column = *begin * mask->strides[3] * element_bytes(mask->dtype);
    int64_t num_rows = t->mask_is_uniform ? 1 : num_vectors(t) * LANES;
    const real *rows[LANES];
    for (int64_t row = 0; row < num_rows; row++) {
        real *values = t->mask_is_uniform ? t->mask : t->staging + row % LANES * t->staging_stride;
        load_row(values, element(mask, t->batch, t->head[row], t->position[row]) + column, mask->dtype,
                 mask->strides[3], count);
        rows[row % LANES] = values;
        for (int64_t i = 0; i < first; i++)
            if (values[i] != (real)-INFINITY) first = i;
        for (int64_t i = count - 1; i > last; i--)
            if (values[i] != (real)-INFINITY) last = i;
        if (!t->mask_is_uniform && (row + 1) % LANES == 0)
            transpose_rows(t->mask + row + 1 - LANES, BLOCK_M, rows, count, 1);
    }
    t->block_mask = t->mask + first * (t->mask_is_uniform ? 1 : BLOCK_M);
    *end = *begin + last + 1;
    *begin += first;
}

/* Cuts a block where the set of granules that see a key changes. That set is contiguous, and both its ends move only
 * forward, so there are at most 2 * GRANULES + 1 runs. */
static int find_runs(const tile *t, int64_t begin, int64_t end, struct run runs[2 * GRANULES + 1])
{
    int count = 0, first = 0, last = 0;
    for (int64_t next; begin < end; begin = next) {
        while (first < t->granules && t->key_end[first] <= begin) first++;
        while (last < t->granules && t->key_begin[last] <= begin) last++;
        next = end;
        if (first < t->granules && t->key_end[first] < next) next = t->key_end[first];
        if (last < t->granules && t->key_begin[last] < next) next = t->key_begin[last];
        if (first >= last) continue;
        int64_t row = first * GRANULE, rows = clamp(t->rows, 0, last * GRANULE) - row;
        runs[count++] = (struct run){begin, next, row, rows};
    }
    return count;
}

/* The rest of the formula on one vector of products, of key j with the rows from `row`: softcap, added mask, ALiBi,
 * bool mask. */
FC_INLINE vec adjust_score(const tile *t, vec score, int64_t j, int64_t row, const real *mask)
{
    const fc_forward_args *args = t->args;
    if (args->softcap != 0) score = (real)args->softcap * tanh_lanes(score);
    vec added = !mask ? (vec){0} : t->mask_is_uniform ? broadcast(*mask) : load(mask + row);
    if (mask && args->attn_mask.dtype != FC_BOOL) score += added;
    if (args->alibi_slopes.dtype != FC_NONE) {
        double from_first = (double)(j - t->position[0]) - (double)args->diagonal; /* any diagonal: no overflow */
        vec distance = (real)from_first - load(t->offset + row);
        score -= load(t->slope + row) * max_lanes(distance, -distance);
    }
    return mask && args->attn_mask.dtype == FC_BOOL ? select_lanes(added < 0, added, score) : score;
}

/* -inf for the rows whose band leaves out key j: seen where j - band_right <= position <= j - band_left. */
FC_INLINE vec hide_score(const tile *t, vec score, int64_t j, int64_t row)
{
    real least = (real)clamp(j - t->args->band_right - t->position[0], -1, BLOCK_M);
    real most = (real)clamp(j - t->args->band_left - t->position[0], -1, BLOCK_M);
    vec offset = load(t->offset + row);
    return select_lanes((offset >= least) & (offset <= most), score, broadcast((real)-INFINITY));
}

static void clear_output(tile *t)
{
    for (int64_t row = 0; row < t->rows; row++)
        memset(t->out + row * t->out_stride, 0, (size_t)t->out_width * sizeof(real));
    t->has_output = true;
}

/* out *= factor for LANES rows, of those that are real. */
static void rescale(const tile *t, int64_t row, vec factor)
{
    for (int64_t lane = 0; lane < LANES && row + lane < t->rows; lane++) {
        real *out = t->out + (row + lane) * t->out_stride;
        for (int64_t d = 0; d < t->out_width; d += LANES) store(out + d, load(out + d) * factor[lane]);
    }
}

/* Online softmax of one vector of rows over `count` keys: scores become probabilities against the row's new maximum. */
static void softmax(tile *t, real *score, int64_t count, int64_t row)
{
    vec old_max = load(t->max + row), new_max = old_max, sum = {0};
    for (int64_t key = 0; key < count; key++) new_max = max_lanes(load(score + key * BLOCK_M), new_max); /* skips NaN */
    store(t->max + row, new_max);

    /* A row that has seen nothing has the maximum -inf: 0 stands in, and every exp is 0. */
    vec base = select_lanes(new_max == (real)-INFINITY, (vec){0}, new_max);
    for (int64_t key = 0; key < count; key++) {
        vec p = exp_lanes(load(score + key * BLOCK_M) - base);
        store(score + key * BLOCK_M, p);
        sum += p;
    }

    /* Nothing to rescale where no maximum moved, or where nothing was summed. */
    vec old_sum = load(t->sum + row), nothing = {0};
    if (memcmp(&old_max, &new_max, sizeof(vec)) != 0 && memcmp(&old_sum, &nothing, sizeof(vec)) != 0) {
        vec factor = exp_lanes(old_max - base);
        old_sum *= factor;
        if (t->has_output) rescale(t, row, factor);
    }
    sum += old_sum;
    store(t->sum + row, sum);
    if (!t->divide_early) return;
    vec inverse = 1 / sum;
    for (int64_t key = 0; key < count; key++) store(score + key * BLOCK_M, load(score + key * BLOCK_M) * inverse);
}

/* Dropout of a granule's probabilities of keys first .. last - 1, in the block that begins at `begin`. */
static void drop_granule(const tile *t, int granule, int64_t first, int64_t last, int64_t begin)
{
    const real scale = (real)t->args->keep_scale;
    const uint32_t keep_below = t->args->keep_below;
    const int64_t row = granule * GRANULE;
    for (int64_t drawn = first / FC_DRAW_COLUMNS * FC_DRAW_COLUMNS; drawn < last; drawn += FC_DRAW_COLUMNS)
        for (int lane = 0; lane < FC_DRAW_LANES; lane++) {
            uint32_t words[FC_DRAW_WORDS][GRANULE];
            for (int i = 0; i < GRANULE; i++) {
                fc_random random =
                    fc_draw(t->draw_key[0][row + i], t->draw_key[1][row + i], t->position[row + i], drawn, lane);
                for (int n = 0; n < FC_DRAW_WORDS; n++) words[n][i] = random.word[n];
            }
            for (int n = 0; n < FC_DRAW_WORDS; n++) {
                int64_t key = drawn + n * FC_DRAW_LANES + lane;
                bool inside = key >= first && key < last;
                real *probability = t->score + (inside ? key - begin : 0) * BLOCK_M + row;
                for (int i = 0; i < GRANULE && inside; i++) probability[i] *= words[n][i] < keep_below ? scale : 0;
            }
        }
}

static void drop_block(const tile *t, int64_t begin, int64_t end)
{
    for (int g = 0; g < t->granules; g++)
        drop_granule(t, g, clamp(t->key_begin[g], begin, end), clamp(t->key_end[g], begin, end), begin);
}

/* score = key . query for the rows that see each of a run's keys. `begin` is the block's first key. */
static void score_run(const tile *t, const struct run *run, int64_t begin, const real *key, int64_t key_stride)
{
    int64_t head_dim = t->args->head_dim, keys = run->end - run->begin, first = run->begin - begin;
    real *score = t->score + first * BLOCK_M + run->row;
    key += first * key_stride;
    if (t->few_rows)
        dot_rows(t->rows, keys, t->query, head_dim, key, key_stride, head_dim, score, BLOCK_M);
    else
        multiply((run->rows + LANES - 1) / LANES, keys, t->query + run->row, BLOCK_M, key, 1, key_stride, head_dim,
                 score, BLOCK_M, false);
}

/* out = or += probability * value, likewise. */
static void weigh_run(tile *t, const struct run *run, int64_t begin, const real *value, int64_t value_stride)
{
    int64_t keys = run->end - run->begin, first = run->begin - begin;
    const real *probability = t->score + first * BLOCK_M + run->row;
    multiply(t->out_width / LANES, run->rows, value + first * value_stride, value_stride, probability, BLOCK_M, 1, keys,
             t->out + run->row * t->out_stride, t->out_stride, t->has_output);
    t->has_output = true;
}

/* Scores of one vector of rows, keys first .. last - 1 of the block that begins at `begin`, made complete: softcap,
 * masks, ALiBi, and the edges of the band. */
static void finish_scores(const tile *t, int64_t row, int64_t first, int64_t last, int64_t begin)
{
    const fc_forward_args *args = t->args;
    bool masked = args->attn_mask.dtype != FC_NONE;
    real *score = t->score + row - begin * BLOCK_M;
    if (masked || args->softcap != 0 || args->alibi_slopes.dtype != FC_NONE)
        for (int64_t j = first; j < last; j++) {
            const real *mask = masked ? t->block_mask + (j - begin) * (t->mask_is_uniform ? 1 : BLOCK_M) : NULL;
            store(score + j * BLOCK_M, adjust_score(t, load(score + j * BLOCK_M), j, row, mask));
        }
    int64_t all_begin = t->all_begin[row / GRANULE], all_end = t->all_end[row / GRANULE];
    for (int64_t j = first; j < last; j++) {
        if (j >= all_begin && j < all_end) j = all_end; /* every row sees the keys between */
        if (j < last) store(score + j * BLOCK_M, hide_score(t, load(score + j * BLOCK_M), j, row));
    }
}

/* Keys begin .. end - 1, at most BLOCK_N: scores, softmax, output. */
static void attend_block(tile *t, int64_t begin, int64_t end)
{
    const fc_forward_args *args = t->args;
    if (args->attn_mask.dtype != FC_NONE) load_mask(t, &begin, &end);

    struct run runs[2 * GRANULES + 1];
    int num_runs = find_runs(t, begin, end, runs);
    if (num_runs == 0) return;
    int64_t stride;
    const real *key = load_block(t, &args->key, args->head_dim, 1, begin, end - begin, t->key, &stride);
    for (int i = 0; i < num_runs; i++) score_run(t, &runs[i], begin, key, stride);

    for (int64_t row = 0; row < num_vectors(t) * LANES; row += LANES) {
        int64_t first = clamp(t->key_begin[row / GRANULE], begin, end);
        int64_t last = clamp(t->key_end[row / GRANULE], begin, end);
        if (first >= last) continue;
        finish_scores(t, row, first, last, begin);
        softmax(t, t->score + (first - begin) * BLOCK_M + row, last - first, row);
    }
    if (args->keep_scale != 0) drop_block(t, begin, end);

    const real *value = load_block(t, &args->value, args->head_dim_v, LANES, begin, end - begin, t->value, &stride);
    if (runs[0].rows < t->rows && !t->has_output) clear_output(t); /* no one product writes every row */
    for (int i = 0; i < num_runs; i++) weigh_run(t, &runs[i], begin, value, stride);
}

/* out / sum where that is still to be done, or 0 for a row that saw no key; and lse. */
static void store_output(tile *t)
{
    const fc_forward_args *args = t->args;
    const fc_tensor *out = &args->out;
    bool in_place = is_in_place(out, args->head_dim_v, LANES);
    for (int64_t row = 0; row < t->rows; row++) {
        real *from = t->out + row * t->out_stride, inverse = t->divide_early ? 1 : 1 / t->sum[row];
        bool seen = t->sum[row] != 0; /* if not, `from` may hold 0 times NaN */
        if (seen && t->writes_result) continue;
        void *place = element(out, t->batch, t->head[row], t->position[row]);
        real *to = in_place ? place : from;
        for (int64_t d = 0; d < t->out_width; d += LANES) store(to + d, seen ? load(from + d) * inverse : (vec){0});
        if (!in_place) store_row(place, out->dtype, out->strides[3], from, args->head_dim_v);
    }
    if (args->lse.dtype == FC_NONE) return;
    for (int64_t row = 0; row < t->rows; row++) {
        real *lse = (real *)element(&args->lse, t->batch, t->head[row], t->position[row]);
        *lse = t->max[row] + (FC_CPU_REAL_BYTES == 4 ? (real)logf((float)t->sum[row]) : (real)log(t->sum[row]));
    }
}

/* Lays the tile's buffers out in this thread's scratch, each on a cache line's boundary. */
static bool find_room(tile *t)
{
    const fc_forward_args *args = t->args;
    int64_t head_dim = round_up(args->head_dim, LANES), head_dim_v = round_up(args->head_dim_v, LANES);
    t->staging_stride = head_dim > BLOCK_N ? head_dim : BLOCK_N;
    t->out_stride = t->out_width = head_dim_v;
    const struct {
        real **buffer;
        int64_t size;
    } parts[] = {
        {&t->query, head_dim * BLOCK_M},          {&t->score, BLOCK_N * BLOCK_M},
        {&t->out, BLOCK_M * head_dim_v},          {&t->key, BLOCK_N * head_dim},
        {&t->value, BLOCK_N * head_dim_v},        {&t->mask, args->attn_mask.dtype != FC_NONE ? BLOCK_N * BLOCK_M : 0},
        {&t->staging, LANES * t->staging_stride},
    };
    const int num_parts = sizeof parts / sizeof parts[0];
    int64_t size = 0;
    for (int i = 0; i < num_parts; i++) size += round_up(parts[i].size, 64);
    real *next = fc_cpu_scratch((uint64_t)size * sizeof(real));
    if (!next) return false;
    for (int i = 0; i < num_parts; next += round_up(parts[i].size, 64), i++) *parts[i].buffer = next;
    if (t->writes_result) {
        t->out = (real *)element(&args->out, t->batch, t->head[0], t->position[0]);
        t->out_stride = args->out.strides[2];
    }
    return true;
}

static void forward_task(void *context, int64_t index)
{
    struct forward_job *job = context;
    tile t;
    place_tile(&t, job, index);
    if (!find_room(&t)) {
        atomic_store(&job->out_of_memory, true);
        return;
    }
    load_query(&t);
    start_rows(&t);
    int64_t end = t.key_end[t.granules - 1];
    for (int64_t begin = t.key_begin[0]; begin < end; begin += BLOCK_N)
        attend_block(&t, begin, begin + BLOCK_N < end ? begin + BLOCK_N : end);
    if (!t.has_output) clear_output(&t);
    store_output(&t);
}

static fc_status forward(const fc_forward_args *args, const fc_plan *plan)
{
    if (args->num_heads_kv == 0) return FC_OK;
    struct forward_job job = {.args = args, .group = args->num_heads_q / args->num_heads_kv};
    job.tiles_per_head = round_up(job.group * args->seqlen_q, BLOCK_M) / BLOCK_M;
    fc_cpu_run(forward_task, &job, plan->num_tiles, plan->num_threads, fc_cpu_threads_to_wake(args, plan));
    if (atomic_load(&job.out_of_memory))
        return fc_fail(FC_OUT_OF_MEMORY,
                       "no memory for the CPU kernel's scratch (under 1 MiB a thread): free some, or lower num_threads "
                       "(now %d)",
                       (int)plan->num_threads);
    return FC_OK;
}
