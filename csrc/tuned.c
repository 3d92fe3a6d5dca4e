/*
 * tuned.c - choices that were measured: the class of a problem, and a table of which kernel serves a class best.
 *
 * A class is everything that decides which kernel is fastest, with sizes in steps: what was measured on one of its
 * problems is used for all. It is a number whose bits are its fields (below), so that it can be stored and compared.
 *
 * The table is read by every call and written hardly ever. It has a fixed size and no lock, in any number of threads:
 * an entry is two numbers, and a choice is a hint that the planner checks, so a race may cost speed and nothing else.
 */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

/* ---- classes ---- */

/* Fields from the lowest bit up. */
enum {
    DTYPE_BITS = 3,
    BAND_BITS = 2,
    OPTION_BITS = 7,
    DIM_BITS = 4,  /* head dimensions, in steps of 32 */
    SIZE_BITS = 7, /* all other sizes, in steps of half an octave */
};
enum { STEP_OF_DIM = 32 };
#define MOST_HEADS (INT64_C(1) << 60)
enum { OPEN, CAUSAL, WINDOW }; /* band: hides nothing; the keys on the right; keys on the left */
static const char *const option_names[OPTION_BITS] = {"a bool mask", "an added mask", "alibi",  "sinks",
                                                      "softcap",     "scale <= 0",    "dropout"};

/* Sizes are rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ...; this is the number of the step. */
static uint64_t step_of(int64_t size)
{
    if (size <= 2) return size < 0 ? 0 : (uint64_t)size;
    int log2 = 63 - __builtin_clzll((uint64_t)size - 1); /* 2^log2 < size <= 2^(log2 + 1) */
    bool upper = size > (INT64_C(3) << (log2 - 1));
    return (uint64_t)(2 * log2 + 1 + upper);
}

static int64_t largest_of(uint64_t step)
{
    if (step <= 2) return (int64_t)step;
    int log2 = (int)(step - 1) / 2;
    return step % 2 == 0 ? INT64_C(2) << log2 : INT64_C(3) << (log2 - 1);
}

static uint64_t options_of(const fc_forward_args *args)
{
    const bool has[OPTION_BITS] = {
        args->attn_mask.dtype == FC_BOOL,
        args->attn_mask.dtype != FC_BOOL && args->attn_mask.dtype != FC_NONE,
        args->alibi_slopes.dtype != FC_NONE,
        args->sinks.dtype != FC_NONE,
        args->softcap != 0,
        !((float)args->scale > 0),
        args->keep_scale != 0,
    };
    uint64_t bits = 0;
    for (int i = 0; i < OPTION_BITS; i++) bits |= (uint64_t)has[i] << i;
    return bits;
}

/* What the band hides, and the keys that it leaves: to the last row, or to any row of a window. */
static uint64_t band_of(const fc_forward_args *args, int64_t *keys)
{
    *keys = 0;
    bool left_open = fc_is_open_left(args);
    if (left_open && fc_is_open_right(args)) return OPEN;
    *keys = left_open ? args->seqlen_q + args->band_right : args->band_right - args->band_left + 1;
    if (*keys > args->seqlen_k) *keys = args->seqlen_k;
    return left_open ? CAUSAL : WINDOW;
}

static void put(uint64_t *class, int *at, int bits, uint64_t field)
{
    *class |= field << *at;
    *at += bits;
}

static uint64_t take(uint64_t *class, int bits)
{
    uint64_t field = *class & ((UINT64_C(1) << bits) - 1);
    *class >>= bits;
    return field;
}

uint64_t fc_class_of(const fc_forward_args *args)
{
    int64_t keys, heads;
    if (__builtin_mul_overflow(args->batch, args->num_heads_q, &heads))
        heads = MOST_HEADS; /* of arrays that are empty */
    if (heads > MOST_HEADS) heads = MOST_HEADS;
    uint64_t class = 0, band = band_of(args, &keys);
    int at = 0;
    put(&class, &at, DTYPE_BITS, (uint64_t)args->query.dtype);
    put(&class, &at, BAND_BITS, band);
    put(&class, &at, OPTION_BITS, options_of(args));
    put(&class, &at, DIM_BITS, (uint64_t)(args->head_dim + STEP_OF_DIM - 1) / STEP_OF_DIM);
    put(&class, &at, DIM_BITS, (uint64_t)(args->head_dim_v + STEP_OF_DIM - 1) / STEP_OF_DIM);
    put(&class, &at, SIZE_BITS, step_of(heads));
    put(&class, &at, SIZE_BITS, step_of(heads == 0 ? 0 : args->num_heads_q / args->num_heads_kv));
    put(&class, &at, SIZE_BITS, step_of(args->seqlen_q));
    put(&class, &at, SIZE_BITS, step_of(args->seqlen_k));
    put(&class, &at, SIZE_BITS, step_of(keys));
    return class;
}

int fc_class_describe(uint64_t class, char *buffer, size_t size)
{
    uint64_t dtype = take(&class, DTYPE_BITS), band = take(&class, BAND_BITS), options = take(&class, OPTION_BITS);
    int dim = (int)take(&class, DIM_BITS) * STEP_OF_DIM, dim_v = (int)take(&class, DIM_BITS) * STEP_OF_DIM;
    int64_t sizes[5]; /* in the order of fc_class_of */
    for (int i = 0; i < 5; i++) sizes[i] = largest_of(take(&class, SIZE_BITS));
    char mask[64] = "full", with[128] = "";
    if (band != OPEN)
        snprintf(mask, sizeof mask, "%s of %" PRId64 " keys", band == CAUSAL ? "causal" : "window", sizes[4]);
    for (int i = 0; i < OPTION_BITS; i++)
        if (options >> i & 1) fc_append(with, sizeof with, option_names[i]);
    return snprintf(buffer, size,
                    "%s, head_dim %d/%d, up to %" PRId64 " heads in groups of %" PRId64 ", %" PRId64
                    " queries, %" PRId64 " keys, %s%s%s",
                    fc_dtype_name((int32_t)dtype), dim, dim_v, sizes[0], sizes[1], sizes[2], sizes[3], mask,
                    with[0] ? ", with " : "", with);
}

/* ---- the table ---- */

enum { SLOTS = 4096, MOST_PROBES = 64 };

typedef struct slot {
    _Atomic uint64_t key;   /* 0: free */
    _Atomic int32_t choice; /* index of the kernel, plus 1; 0: none */
} slot;
static slot table[SLOTS];
static atomic_bool is_used; /* spares those who never tune the rest */

/* Device and class in 64 bits. Should two pairs ever share them, they share a choice, which at worst is slow. */
static uint64_t key_of(const fc_device *device, uint64_t class)
{
    uint64_t name[sizeof device->name / sizeof(uint64_t)] = {0}, mixed = class;
    memcpy(name, device->name, strnlen(device->name, sizeof device->name));
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) mixed = fc_mix(mixed, name[i]);
    mixed = fc_mix(mixed, (uint64_t)device->type);
    mixed = fc_mix(mixed, (uint64_t)device->compute_capability);
    mixed = fc_mix(mixed, (uint64_t)device->num_sms);
    mixed = fc_mix(mixed, (uint64_t)device->isa);
    return mixed == 0 ? 1 : mixed;
}

int32_t fc_tuned_find(const fc_attention_problem *problem, const fc_forward_args *args, const fc_device *device)
{
    bool is_free = problem->block_m == 0 && problem->block_n == 0 && problem->kernel == NULL &&
                   (problem->flags & FC_DETERMINISTIC) == 0;
    if (!is_free || !atomic_load_explicit(&is_used, memory_order_relaxed)) return -1;
    uint64_t key = key_of(device, fc_class_of(args));
    for (uint64_t i = 0; i < MOST_PROBES; i++) {
        slot *here = &table[(key + i) % SLOTS];
        uint64_t found = atomic_load_explicit(&here->key, memory_order_relaxed);
        if (found == key) return atomic_load_explicit(&here->choice, memory_order_relaxed) - 1;
        if (found == 0) return -1;
    }
    return -1;
}

/* False: no slot is free near where the key belongs. */
static bool set_choice(uint64_t key, int32_t choice)
{
    for (uint64_t i = 0; i < MOST_PROBES; i++) {
        slot *here = &table[(key + i) % SLOTS];
        uint64_t found = 0;
        if (!atomic_compare_exchange_strong(&here->key, &found, key) && found != key) continue;
        atomic_store(&here->choice, choice);
        return true;
    }
    return false;
}

fc_status fc_tuned_add(const fc_device *given, uint64_t shape_class, const char *kernel)
{
    fc_device device;
    fc_status status = fc_copy_struct("fc_device", given, &device, sizeof device, sizeof device);
    if (status != FC_OK) return status;
    if (device.type != FC_CPU && device.type != FC_CUDA)
        return fc_fail(FC_INVALID, "fc_device.type is %" PRId32 "; allowed: %d (CPU), %d (CUDA)", device.type, FC_CPU,
                       FC_CUDA);
    int32_t at = 0;
    while (at < fc_num_kernels && (kernel == NULL || strcmp(fc_kernels[at].name, kernel) != 0)) at++;
    if (at == fc_num_kernels)
        return fc_fail(FC_INVALID, "this build has no kernel '%s'; fc_kernel_name has those it has",
                       kernel == NULL ? "" : kernel);
    if (!set_choice(key_of(&device, shape_class), at + 1))
        return fc_fail(FC_OUT_OF_MEMORY, "the table of tuned choices is full, at about %d classes", SLOTS / 2);
    atomic_store(&is_used, true);
    return FC_OK;
}

void fc_tuned_clear(void)
{
    atomic_store(&is_used, false);
    for (int i = 0; i < SLOTS; i++) {
        atomic_store(&table[i].choice, 0);
        atomic_store(&table[i].key, 0);
    }
}
