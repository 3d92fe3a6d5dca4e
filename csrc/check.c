/*
 * check.c - every rule on shapes, dtypes, strides and options, and the words of every refusal; check_backward.c adds
 * those on gradients.
 *
 * A rule that fails says what was given, what is allowed and, where it is not plain, what to do. What
 * passes is turned into fc_forward_args: defaults filled in, and causal, window and diagonal folded into
 * one band of visible keys. It reads no array and asks no device.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "internal.h"

enum { MAX_HEAD_DIM = 256 };

/* Sizes beyond this could overflow an offset in bytes once multiplied, and fit in no memory. */
#define MAX_EXTENT (INT64_C(1) << 48)

/* Sums of three such numbers (row + diagonal + window) cannot overflow. */
#define MAX_OFFSET (INT64_C(1) << 60)

/* Structs only grow. The first release's size is the least; what a newer caller has beyond ours must be zero, so that
 * no option it set is silently dropped. */
fc_status fc_copy_struct(const char *name, const void *given, void *ours, uint64_t our_size, uint64_t least_size)
{
    if (given == NULL) return fc_fail(FC_INVALID, "%s is NULL", name);
    uint64_t size;
    memcpy(&size, given, sizeof size);
    if (size < least_size)
        return fc_fail(FC_INVALID, "%s.struct_size is %" PRIu64 "; set it to sizeof(%s), at least %" PRIu64, name, size,
                       name, least_size);
    /* A size this far out is an unset field, and its tail is not the caller's memory. */
    if (size > 64 * our_size)
        return fc_fail(FC_INVALID,
                       "%s.struct_size is %" PRIu64 ", not a plausible sizeof(%s); this library's is %" PRIu64, name,
                       size, name, our_size);
    for (uint64_t i = our_size; i < size; i++)
        if (((const unsigned char *)given)[i] != 0)
            return fc_fail(FC_INVALID,
                           "%s has a non-zero byte at offset %" PRIu64 ", an option that flashcore %s does not know; "
                           "load a newer library or leave the option zero",
                           name, i, FC_VERSION);
    memset(ours, 0, our_size);
    memcpy(ours, given, size < our_size ? size : our_size);
    memcpy(ours, &our_size, sizeof our_size);
    return FC_OK;
}

static fc_status check_extent(const char *name, int64_t given, int64_t least, int64_t most)
{
    if (given >= least && given <= most) return FC_OK;
    return fc_fail(FC_INVALID, "%s is %" PRId64 "; allowed: %" PRId64 " to %" PRId64, name, given, least, most);
}

/* A larger one is right, and no kernel serves it. */
static fc_status check_head_dim(const char *name, int64_t head_dim)
{
    if (head_dim >= 1 && head_dim <= MAX_HEAD_DIM) return FC_OK;
    return fc_fail(head_dim < 1 ? FC_INVALID : FC_UNSUPPORTED, "%s is %" PRId64 "; allowed: 1 to %d", name, head_dim,
                   MAX_HEAD_DIM);
}

static bool is_float(int32_t dtype)
{
    return dtype == FC_FLOAT16 || dtype == FC_BFLOAT16 || dtype == FC_FLOAT32 || dtype == FC_FLOAT64;
}

/* Element offsets of a tensor of this shape must fit in 62 bits of bytes. */
fc_status fc_check_tensor(const char *name, const fc_tensor *tensor, const int64_t shape[4], bool need_data)
{
    int64_t elements = 1, reach = 0;
    if (tensor->reserved != 0)
        return fc_fail(FC_INVALID, "%s.reserved is %" PRId32 "; set it to 0", name, tensor->reserved);
    for (int i = 0; i < 4; i++)
        if (shape[i] == 0) return FC_OK; /* nothing will be touched, whatever data and strides say */
    for (int i = 0; i < 4; i++) {
        int64_t span;
        if (__builtin_mul_overflow(shape[i] - 1, tensor->strides[i], &span) || span > MAX_OFFSET || span < -MAX_OFFSET)
            return fc_fail(FC_INVALID,
                           "%s: stride %" PRId64 " of a dimension of %" PRId64
                           " reaches beyond the 64-bit address space",
                           name, tensor->strides[i], shape[i]);
        reach += span < 0 ? -span : span;
        if (__builtin_mul_overflow(elements, shape[i], &elements) || elements > MAX_OFFSET || reach > MAX_OFFSET)
            return fc_fail(FC_INVALID, "%s: its shape and strides reach beyond the 64-bit address space", name);
    }
    if (!need_data) return FC_OK;
    if (tensor->data == NULL) return fc_fail(FC_INVALID, "%s.data is NULL, but the array has elements", name);
    int32_t bytes = fc_dtype_bytes(tensor->dtype);
    if ((uintptr_t)tensor->data % (uintptr_t)bytes != 0)
        return fc_fail(FC_INVALID, "%s.data is %p, not aligned to its %d-byte %s elements; copy the array", name,
                       tensor->data, bytes, fc_dtype_name(tensor->dtype));
    return FC_OK;
}

/* Outputs must not write one address twice. Exact for the layouts arrays really have: sorted by stride, each dimension
 * must step over all that the smaller ones reach. */
fc_status fc_check_output(const char *name, const fc_tensor *tensor, const int64_t shape[4], bool need_data)
{
    fc_status status = fc_check_tensor(name, tensor, shape, need_data);
    if (status != FC_OK) return status;
    int order[4] = {0, 1, 2, 3};
    int64_t step[4];
    for (int i = 0; i < 4; i++) {
        if (shape[i] == 0) return FC_OK;
        step[i] = tensor->strides[i] < 0 ? -tensor->strides[i] : tensor->strides[i];
    }
    for (int i = 1; i < 4; i++)
        for (int j = i; j > 0 && step[order[j]] < step[order[j - 1]]; j--) {
            int swap = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swap;
        }
    int64_t reach = 0;
    for (int i = 0; i < 4; i++) {
        int dim = order[i];
        if (shape[dim] == 1) continue;
        if (step[dim] <= reach)
            return fc_fail(FC_INVALID,
                           "%s: shape (%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 ") with strides (%" PRId64
                           ", %" PRId64 ", %" PRId64 ", %" PRId64
                           ") puts two elements at one address; give an array without self-overlap",
                           name, shape[0], shape[1], shape[2], shape[3], tensor->strides[0], tensor->strides[1],
                           tensor->strides[2], tensor->strides[3]);
        reach += (shape[dim] - 1) * step[dim];
    }
    return FC_OK;
}

/* Rules on one operand that may be absent, of query's dtype or float32 (bool too where allowed). */
static fc_status check_optional(const char *name, const fc_tensor *tensor, int32_t dtype, bool allow_bool,
                                const int64_t shape[4], bool need_data)
{
    if (tensor->dtype == FC_NONE) {
        if (tensor->data == NULL) return FC_OK;
        return fc_fail(FC_INVALID, "%s.data is given, but %s.dtype is not; set it to its fc_dtype", name, name);
    }
    bool allowed = tensor->dtype == dtype || tensor->dtype == FC_FLOAT32 || (allow_bool && tensor->dtype == FC_BOOL);
    if (!allowed)
        return fc_fail(FC_INVALID, "%s has dtype %s; allowed with %s arrays: %s%s%s", name,
                       fc_dtype_name(tensor->dtype), fc_dtype_name(dtype), allow_bool ? "bool, " : "",
                       fc_dtype_name(dtype), dtype == FC_FLOAT32 ? "" : ", float32");
    return fc_check_tensor(name, tensor, shape, need_data);
}

static fc_status check_shapes(const fc_attention_problem *p)
{
    fc_status status;
    if ((status = check_extent("batch", p->batch, 0, MAX_EXTENT)) != FC_OK) return status;
    if ((status = check_extent("num_heads_q", p->num_heads_q, 0, MAX_EXTENT)) != FC_OK) return status;
    if ((status = check_extent("num_heads_kv", p->num_heads_kv, 0, MAX_EXTENT)) != FC_OK) return status;
    if ((status = check_extent("seqlen_q", p->seqlen_q, 0, MAX_EXTENT)) != FC_OK) return status;
    if ((status = check_extent("seqlen_k", p->seqlen_k, 0, MAX_EXTENT)) != FC_OK) return status;
    if ((status = check_head_dim("head_dim", p->head_dim)) != FC_OK) return status;
    if ((status = check_head_dim("head_dim_v", p->head_dim_v)) != FC_OK) return status;
    if (p->num_heads_q > 0 && (p->num_heads_kv == 0 || p->num_heads_q % p->num_heads_kv != 0))
        return fc_fail(FC_INVALID,
                       "query has %" PRId64 " heads and key and value have %" PRId64
                       "; the query's number must be a multiple of theirs",
                       p->num_heads_q, p->num_heads_kv);
    return FC_OK;
}

static fc_status check_tensors(const fc_attention_problem *p, bool need_data)
{
    fc_status status;
    int32_t dtype = p->query.dtype;
    if (!is_float(dtype))
        return fc_fail(FC_INVALID, "query has dtype %s; allowed: float16, bfloat16, float32, float64",
                       fc_dtype_name(dtype));
    if (p->key.dtype != dtype || p->value.dtype != dtype || p->out.dtype != dtype)
        return fc_fail(FC_INVALID, "query, key, value and out have dtypes %s, %s, %s and %s; all four must be the same",
                       fc_dtype_name(dtype), fc_dtype_name(p->key.dtype), fc_dtype_name(p->value.dtype),
                       fc_dtype_name(p->out.dtype));

    const int64_t query[4] = {p->batch, p->num_heads_q, p->seqlen_q, p->head_dim};
    const int64_t key[4] = {p->batch, p->num_heads_kv, p->seqlen_k, p->head_dim};
    const int64_t value[4] = {p->batch, p->num_heads_kv, p->seqlen_k, p->head_dim_v};
    const int64_t out[4] = {p->batch, p->num_heads_q, p->seqlen_q, p->head_dim_v};
    const int64_t mask[4] = {p->batch, p->num_heads_q, p->seqlen_q, p->seqlen_k};
    const int64_t lse[4] = {p->batch, p->num_heads_q, p->seqlen_q, 1};
    const int64_t per_head[4] = {p->batch, p->num_heads_q, 1, 1};
    if ((status = fc_check_tensor("query", &p->query, query, need_data)) != FC_OK) return status;
    if ((status = fc_check_tensor("key", &p->key, key, need_data)) != FC_OK) return status;
    if ((status = fc_check_tensor("value", &p->value, value, need_data)) != FC_OK) return status;
    if ((status = fc_check_output("out", &p->out, out, need_data)) != FC_OK) return status;
    if (p->lse.dtype != FC_NONE) {
        int32_t wanted = dtype == FC_FLOAT64 ? FC_FLOAT64 : FC_FLOAT32;
        if (p->lse.dtype != wanted)
            return fc_fail(FC_INVALID, "lse has dtype %s; with %s arrays it is %s", fc_dtype_name(p->lse.dtype),
                           fc_dtype_name(dtype), fc_dtype_name(wanted));
        if ((status = fc_check_output("lse", &p->lse, lse, need_data)) != FC_OK) return status;
    }
    if ((status = check_optional("attn_mask", &p->attn_mask, dtype, true, mask, need_data)) != FC_OK) return status;
    if ((status = check_optional("alibi_slopes", &p->alibi_slopes, dtype, false, per_head, need_data)) != FC_OK)
        return status;
    return check_optional("sinks", &p->sinks, dtype, false, per_head, need_data);
}

fc_status fc_check_blocks(int32_t block_m, int32_t block_n)
{
    if (block_m >= 0 && block_n >= 0) return FC_OK;
    return fc_fail(FC_INVALID,
                   "block_m is %" PRId32 " and block_n is %" PRId32 "; allowed: 0 to let the library choose, or a "
                   "pair that explain names",
                   block_m, block_n);
}

/* Scores are worked out in float32, those of float64 arrays in float64: an option must be finite there. */
static bool is_finite_for(const fc_attention_problem *p, double x)
{
    return p->query.dtype == FC_FLOAT64 ? isfinite(x) : isfinite((float)x);
}

static fc_status check_softcap(const fc_attention_problem *p, double scale)
{
    double least = p->query.dtype == FC_FLOAT64 ? DBL_MIN : FLT_MIN;
    if (p->softcap == 0) return FC_OK;
    if (!isfinite(p->softcap) || p->softcap < 0)
        return fc_fail(FC_INVALID, "softcap is %g; it must be finite and positive, or absent", p->softcap);
    if (p->softcap >= least && is_finite_for(p, p->softcap) && is_finite_for(p, scale / p->softcap)) return FC_OK;
    return fc_fail(FC_INVALID,
                   "softcap is %g; it, and scale / softcap, must be in the range of %s, in which scores are",
                   p->softcap, least == DBL_MIN ? "float64" : "float32");
}

static fc_status check_options(const fc_attention_problem *p)
{
    const uint32_t known = FC_CAUSAL | FC_LOWER_RIGHT | FC_WINDOW_LEFT | FC_WINDOW_RIGHT | FC_SCALE | FC_DETERMINISTIC;
    if ((p->flags & ~known) != 0)
        return fc_fail(FC_INVALID, "flags holds 0x%" PRIx32 ", which flashcore %s does not know; known: 0x%" PRIx32,
                       p->flags & ~known, FC_VERSION, known);
    double scale = (p->flags & FC_SCALE) ? p->scale : 1;
    if (!is_finite_for(p, scale))
        return fc_fail(FC_INVALID, "scale is %g; it must be finite%s", scale,
                       isfinite(scale) ? " as a float32, in which these arrays' scores are" : "");
    if ((p->flags & FC_WINDOW_LEFT) && p->window_left < 0)
        return fc_fail(FC_INVALID, "window's left side is %" PRId64 "; allowed: 0 and up, or open", p->window_left);
    if ((p->flags & FC_WINDOW_RIGHT) && p->window_right < 0)
        return fc_fail(FC_INVALID, "window's right side is %" PRId64 "; allowed: 0 and up, or open", p->window_right);
    if ((p->flags & FC_LOWER_RIGHT) && p->diagonal != 0)
        return fc_fail(FC_INVALID, "diagonal is %" PRId64 " and lower right at once; give one of them", p->diagonal);
    if (p->diagonal > MAX_OFFSET || p->diagonal < -MAX_OFFSET)
        return fc_fail(FC_INVALID, "diagonal is %" PRId64 "; allowed: -2^60 to 2^60", p->diagonal);
    fc_status status = check_softcap(p, scale);
    if (status == FC_OK) status = fc_check_blocks(p->block_m, p->block_n);
    if (status != FC_OK) return status;
    if (!(p->dropout_p >= 0 && p->dropout_p <= 1)) /* NaN too */
        return fc_fail(FC_INVALID, "dropout_p is %g; allowed: 0 to 1", p->dropout_p);
    if (p->num_threads < 0)
        return fc_fail(FC_INVALID, "num_threads is %" PRId32 "; allowed: 0 for the default, or 1 and up",
                       p->num_threads);
    return check_extent("first_batch", p->first_batch, 0, MAX_EXTENT);
}

static fc_status check_seed(const fc_attention_problem *p, bool need_data)
{
    if (p->dropout_p == 0 || !need_data) return FC_OK;
    if (p->dropout_seed == NULL)
        return fc_fail(FC_INVALID,
                       "dropout_p is %g and dropout_seed is NULL; point it at two 64-bit numbers on the problem's "
                       "device, a seed and an offset, of which each call has others",
                       p->dropout_p);
    if ((uintptr_t)p->dropout_seed % sizeof(uint64_t) != 0)
        return fc_fail(FC_INVALID, "dropout_seed is %p, not aligned to its 8-byte numbers; copy them",
                       (const void *)p->dropout_seed);
    return FC_OK;
}

static int64_t clamp(int64_t x, int64_t low, int64_t high)
{
    return x < low ? low : x > high ? high : x;
}

/* Folds causal, window and diagonal into band_left <= j - i <= band_right. */
static void resolve_band(const fc_attention_problem *p, fc_forward_args *args)
{
    int64_t diagonal = (p->flags & FC_LOWER_RIGHT) ? p->seqlen_k - p->seqlen_q : p->diagonal;
    int64_t left = -p->seqlen_q, right = p->seqlen_k; /* every key of every row */
    if (p->flags & FC_WINDOW_LEFT) left = diagonal - clamp(p->window_left, 0, MAX_OFFSET);
    if (p->flags & FC_WINDOW_RIGHT) right = diagonal + clamp(p->window_right, 0, MAX_OFFSET);
    if ((p->flags & FC_CAUSAL) && right > diagonal) right = diagonal;
    /* An open right side may be narrower than the diagonal asks for: seqlen_k already hides nothing. */
    args->band_left = clamp(left, -p->seqlen_q, p->seqlen_k);
    args->band_right = clamp(right, -p->seqlen_q, p->seqlen_k);
    args->diagonal = diagonal;
}

static void resolve_dropout(const fc_attention_problem *p, fc_forward_args *args)
{
    if (p->dropout_p == 0) return;
    double keep = nearbyint((1 - p->dropout_p) * 0x1p32);
    args->keep_below = keep < 0x1p32 ? (uint32_t)keep : UINT32_MAX;
    args->keep_scale = p->dropout_p < 1 ? 1 / (1 - p->dropout_p) : 1;
    args->dropout_seed = p->dropout_seed;
    args->first_batch = p->first_batch;
}

fc_status fc_check(const fc_attention_problem *given, bool need_data, fc_attention_problem *problem,
                   fc_forward_args *args)
{
    fc_status status = fc_copy_struct("fc_attention_problem", given, problem, sizeof *problem, sizeof *problem);
    if (status != FC_OK) return status;
    const fc_attention_problem *p = problem;
    if (p->device_type != FC_CPU && p->device_type != FC_CUDA)
        return fc_fail(FC_INVALID, "device_type is %" PRId32 "; allowed: %d (CPU), %d (CUDA)", p->device_type, FC_CPU,
                       FC_CUDA);
    if ((status = check_shapes(p)) != FC_OK) return status;
    if ((status = check_tensors(p, need_data)) != FC_OK) return status;
    if ((status = check_options(p)) != FC_OK) return status;
    if ((status = check_seed(p, need_data)) != FC_OK) return status;

    memset(args, 0, sizeof *args);
    args->query = p->query;
    args->key = p->key;
    args->value = p->value;
    args->out = p->out;
    args->lse = p->lse;
    args->attn_mask = p->attn_mask;
    args->alibi_slopes = p->alibi_slopes;
    args->sinks = p->sinks;
    args->batch = p->batch;
    args->num_heads_q = p->num_heads_q;
    args->num_heads_kv = p->num_heads_kv;
    args->seqlen_q = p->seqlen_q;
    args->seqlen_k = p->seqlen_k;
    args->head_dim = p->head_dim;
    args->head_dim_v = p->head_dim_v;
    args->scale = (p->flags & FC_SCALE) ? p->scale : 1.0 / sqrt((double)p->head_dim);
    args->softcap = p->softcap;
    resolve_band(p, args);
    resolve_dropout(p, args);
    return FC_OK;
}
