/*
 * attention.c - FlashCore from C: one causal grouped-head attention on the CPU, checked against a loop in double.
 *
 *     cc examples/attention.c $(python -P -m flashcore paths --cflags --libs) -lm -o attention && ./attention
 *
 * query [2, 4, 37, 16], key and value [2, 2, 37, 16]: query heads 0 and 1 share the first key head, 2 and 3 the
 * second. Every array lies [batch, seqlen, heads, head_dim] in memory, as a projection's output does; the strides say
 * so, and nothing is copied.
 */
#include <flashcore.h>
#include <math.h>
#include <stdio.h>

enum { BATCH = 2, HEADS_Q = 4, HEADS_KV = 2, SEQLEN = 37, HEAD_DIM = 16 };

static float query[BATCH][SEQLEN][HEADS_Q][HEAD_DIM];
static float key[BATCH][SEQLEN][HEADS_KV][HEAD_DIM];
static float value[BATCH][SEQLEN][HEADS_KV][HEAD_DIM];
static float out[BATCH][SEQLEN][HEADS_Q][HEAD_DIM];

/* Numbers in [-2, 2), the same in every run: the top 24 bits of a 32-bit linear congruential generator. */
static void fill(float *data, size_t count)
{
    static uint32_t state = 42;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        data[i] = (float)(state >> 8) / (1 << 22) - 2.0f;
    }
}

/* An array [batch, seqlen, heads, head_dim], described in the order of (batch, head, row, column). */
static fc_tensor describe(void *data, int64_t heads)
{
    fc_tensor tensor = {
        .data = data,
        .strides = {SEQLEN * heads * HEAD_DIM, HEAD_DIM, heads * HEAD_DIM, 1},
        .dtype = FC_FLOAT32,
    };
    return tensor;
}

/* One row of the result, from the formula: softmax(scale * q . k) times v over the keys up to the row's own. */
static void expected_row(int batch, int head, int row, double result[HEAD_DIM])
{
    int head_kv = head / (HEADS_Q / HEADS_KV);
    double score[SEQLEN], largest = -INFINITY, sum = 0.0;
    for (int j = 0; j <= row; j++) {
        score[j] = 0.0;
        for (int d = 0; d < HEAD_DIM; d++)
            score[j] += (double)query[batch][row][head][d] * key[batch][j][head_kv][d] / sqrt(HEAD_DIM);
        largest = fmax(largest, score[j]);
    }
    for (int d = 0; d < HEAD_DIM; d++) result[d] = 0.0;
    for (int j = 0; j <= row; j++) {
        double weight = exp(score[j] - largest);
        sum += weight;
        for (int d = 0; d < HEAD_DIM; d++) result[d] += weight * value[batch][j][head_kv][d];
    }
    for (int d = 0; d < HEAD_DIM; d++) result[d] /= sum;
}

int main(void)
{
    fill(&query[0][0][0][0], sizeof query / sizeof(float));
    fill(&key[0][0][0][0], sizeof key / sizeof(float));
    fill(&value[0][0][0][0], sizeof value / sizeof(float));

    /* Fields that are not named are zero, which means the default: no mask, no window, scale 1/sqrt(head_dim). */
    fc_attention_problem problem = {
        .struct_size = sizeof problem,
        .device_type = FC_CPU,
        .batch = BATCH,
        .num_heads_q = HEADS_Q,
        .num_heads_kv = HEADS_KV,
        .seqlen_q = SEQLEN,
        .seqlen_k = SEQLEN,
        .head_dim = HEAD_DIM,
        .head_dim_v = HEAD_DIM,
        .query = describe(query, HEADS_Q),
        .key = describe(key, HEADS_KV),
        .value = describe(value, HEADS_KV),
        .out = describe(out, HEADS_Q),
        .flags = FC_CAUSAL,
    };

    /* What will run. On a GPU, plan.workspace_bytes of device memory would go into fc_attention_forward. */
    fc_plan plan = {.struct_size = sizeof plan};
    if (fc_attention_plan(&problem, NULL, &plan) != FC_OK) {
        fprintf(stderr, "plan: %s\n", fc_last_error());
        return 1;
    }
    char words[256];
    fc_plan_describe(&problem, NULL, &plan, words, sizeof words);
    printf("flashcore %s: %s\n", fc_version(), words);

    fc_status status = fc_attention_forward(&problem, NULL, 0, NULL);
    if (status != FC_OK) {
        fprintf(stderr, "%s: %s\n", fc_status_name(status), fc_last_error());
        return 1;
    }

    double largest = 0.0;
    for (int b = 0; b < BATCH; b++)
        for (int h = 0; h < HEADS_Q; h++)
            for (int i = 0; i < SEQLEN; i++) {
                double row[HEAD_DIM];
                expected_row(b, h, i, row);
                for (int d = 0; d < HEAD_DIM; d++) {
                    double error = fabs(out[b][i][h][d] - row[d]);
                    if (!(error <= largest)) largest = error; /* so written, a NaN counts as an error */
                }
            }

    /* Values are below 2 and so is their weighted mean: one rounding of it is 2^-24 * 2, 1.2e-7. The score, a sum of
     * 16 products, may be off by a few of its own roundings, and the weights with it. */
    const double allowed = 2e-6;
    printf("largest error %.1e, allowed %.1e\n", largest, allowed);
    return largest <= allowed ? 0 : 1;
}
