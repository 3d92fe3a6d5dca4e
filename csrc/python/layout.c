/*
 * layout.c - shapes: from the caller's arrays to the library's [batch, head, row, column].
 *
 * The last three dimensions are head, sequence and head_dim (layout "bshd" swaps the first two); a 2-D
 * array has one head. Everything before them is batch, broadcast by PyTorch's rules. The library knows one batch
 * stride per tensor, so batch dimensions are folded together where all operands allow; those that remain become a
 * loop of calls (only odd broadcasts need one).
 */
#include <stdio.h>

#include "binding.h"

void fc_format_shape(char *text, size_t size, int ndim, const int64_t *shape)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (used < size) snprintf(text + used, size - used, ndim == 1 ? ",)" : ")");
}

static int refuse_shapes(const char *rule, const fc_array *a, const fc_array *b, const fc_array *c)
{
    const fc_array *arrays[3] = {a, b, c};
    char text[3][200];
    for (int i = 0; i < 3; i++) fc_format_shape(text[i], sizeof text[i], arrays[i]->ndim, arrays[i]->shape);
    PyErr_Format(PyExc_ValueError, "query %s, key %s, value %s: %s", text[0], text[1], text[2], rule);
    return -1;
}

/* Position from the end of the head and sequence dimensions. */
static int head_at(bool heads_inside)
{
    return heads_inside ? 2 : 3;
}
static int row_at(bool heads_inside)
{
    return heads_inside ? 3 : 2;
}

/* Size of the dimension that stands `from_end` places before the end; 1 where the array has none. In a 2-D array
 * the rows come first whatever the layout. */
static int64_t size_at(const fc_array *array, int from_end)
{
    return from_end <= array->ndim ? array->shape[array->ndim - from_end] : 1;
}

static int64_t heads_of(const fc_array *array, bool heads_inside)
{
    return array->ndim == 2 ? 1 : size_at(array, head_at(heads_inside));
}

static int64_t rows_of(const fc_array *array, bool heads_inside)
{
    return array->ndim == 2 ? array->shape[0] : size_at(array, row_at(heads_inside));
}

/* Broadcasts b onto a; false when they do not fit. */
static bool broadcast(int64_t *a, int64_t b)
{
    if (*a == b || b == 1) return true;
    if (*a != 1) return false;
    *a = b;
    return true;
}

int fc_geometry_of(const fc_array *query, const fc_array *key, const fc_array *value, bool heads_inside, fc_geometry *g)
{
    const fc_array *arrays[3] = {query, key, value};
    int ndim = 0;
    for (int i = 0; i < 3; i++) {
        if (arrays[i]->ndim < 2)
            return refuse_shapes("each needs 2 dimensions or more, (..., heads, sequence, head_dim)", query, key,
                                 value);
        if (arrays[i]->ndim > ndim) ndim = arrays[i]->ndim;
    }
    *g = (fc_geometry){.heads_inside = heads_inside, .num_batch_dims = ndim > 3 ? ndim - 3 : 0};

    g->head_dim = size_at(query, 1);
    g->head_dim_v = size_at(value, 1);
    if (size_at(key, 1) != g->head_dim)
        return refuse_shapes("query and key must agree in head_dim, the last dimension", query, key, value);
    g->seqlen_q = rows_of(query, heads_inside);
    g->seqlen_k = rows_of(key, heads_inside);
    if (rows_of(value, heads_inside) != g->seqlen_k)
        return refuse_shapes("key and value must agree in sequence length", query, key, value);

    g->num_heads_q = heads_of(query, heads_inside);
    g->num_heads_kv = heads_of(key, heads_inside);
    if (!broadcast(&g->num_heads_kv, heads_of(value, heads_inside)))
        return refuse_shapes("key and value must agree in the number of heads", query, key, value);
    if (g->num_heads_q == 1) g->num_heads_q = g->num_heads_kv;
    if (g->num_heads_q != 0 && (g->num_heads_kv == 0 || g->num_heads_q % g->num_heads_kv != 0))
        return refuse_shapes(
            heads_inside ? "the number of query heads must be a multiple of that of key and value (layout 'bshd': "
                           "dimension -2 is heads)"
                         : "the number of query heads must be a multiple of that of key and value (layout 'bhsd': "
                           "dimension -3 is heads)",
            query, key, value);

    for (int i = 0; i < g->num_batch_dims; i++) {
        g->batch_shape[i] = 1;
        for (int j = 0; j < 3; j++)
            if (!broadcast(&g->batch_shape[i], size_at(arrays[j], ndim - i)))
                return refuse_shapes("the batch dimensions, before the last three, must be equal or 1", query, key,
                                     value);
        g->out_shape[i] = g->lse_shape[i] = g->batch_shape[i];
    }
    g->out_ndim = ndim;
    g->out_shape[ndim - 1] = g->head_dim_v;
    if (ndim == 2) {
        g->out_shape[0] = g->seqlen_q;
    } else {
        g->out_shape[ndim - head_at(heads_inside)] = g->num_heads_q;
        g->out_shape[ndim - row_at(heads_inside)] = g->seqlen_q;
    }
    g->lse_ndim = ndim - 1;
    g->lse_shape[ndim - 2] = g->seqlen_q;
    if (ndim > 2) g->lse_shape[ndim - 3] = g->num_heads_q;
    return 0;
}

static int refuse_operand(const fc_array *array, const char *wanted, int ndim, const int64_t *shape)
{
    char given[200], allowed[200];
    fc_format_shape(given, sizeof given, array->ndim, array->shape);
    fc_format_shape(allowed, sizeof allowed, ndim, shape);
    PyErr_Format(PyExc_ValueError, "%s has shape %s; %s %s", array->name, given, wanted, allowed);
    return -1;
}

/*
 * Lays `array` over `full`, the shape it stands for: strides[i] becomes its stride in dimension i, 0 where it is
 * repeated. False where it does not broadcast.
 */
static bool strides_over(const fc_array *array, int ndim, const int64_t *full, int64_t *strides)
{
    if (array->ndim > ndim) return false;
    for (int i = ndim - array->ndim; i < ndim; i++) {
        int at = i - (ndim - array->ndim);
        if (array->shape[at] == full[i])
            strides[i] = full[i] == 1 ? 0 : array->strides[at];
        else if (array->shape[at] != 1)
            return false;
    }
    return true;
}

int fc_place(const fc_geometry *g, enum fc_operand operand, const fc_array *array, fc_tensor *tensor,
             fc_batches *batches)
{
    int64_t full[FC_MAX_NDIM + 3], strides[FC_MAX_NDIM + 3] = {0};
    int nb = g->num_batch_dims, ndim = nb;
    for (int i = 0; i < nb; i++) full[i] = g->batch_shape[i];
    *tensor = (fc_tensor){.data = array->data, .dtype = array->dtype};
    bool fits;

    switch (operand) {
    case FC_QUERY:
    case FC_KEY:
    case FC_VALUE:
    case FC_OUT: {
        bool is_query = operand == FC_QUERY || operand == FC_OUT;
        int64_t rows = is_query ? g->seqlen_q : g->seqlen_k, heads = is_query ? g->num_heads_q : g->num_heads_kv;
        int64_t columns = operand == FC_VALUE || operand == FC_OUT ? g->head_dim_v : g->head_dim;
        if (array->ndim == 2) { /* no head dimension to swap */
            tensor->strides[2] = array->strides[0];
            tensor->strides[3] = array->strides[1];
            for (int i = 0; i < nb; i++) batches->strides[operand][i] = 0;
            return 0;
        }
        int head = g->heads_inside ? nb + 1 : nb, row = g->heads_inside ? nb : nb + 1;
        full[head] = heads;
        full[row] = rows;
        full[nb + 2] = columns;
        ndim = nb + 3;
        fits = strides_over(array, ndim, full, strides); /* geometry has checked it already */
        tensor->strides[1] = strides[head];
        tensor->strides[2] = strides[row];
        tensor->strides[3] = strides[nb + 2];
        break;
    }
    case FC_MASK:
        full[nb] = g->num_heads_q;
        full[nb + 1] = g->seqlen_q;
        full[nb + 2] = g->seqlen_k;
        ndim = nb + 3;
        fits = strides_over(array, ndim, full, strides);
        if (!fits)
            return refuse_operand(array,
                                  array->ndim == 2 && array->shape[1] == g->seqlen_k && nb > 0 &&
                                          array->shape[0] == g->batch_shape[nb - 1]
                                      ? "a mask of (batch, keys) is given as mask[:, None, None, :]; it must broadcast "
                                        "to (..., heads, rows, keys), here"
                                      : "it must broadcast to (..., heads, rows, keys), here",
                                  ndim, full);
        for (int i = 1; i < 4; i++) tensor->strides[i] = strides[nb + i - 1];
        break;
    case FC_LSE:
    case FC_ALIBI:
    case FC_SINKS:
    default:
        full[nb] = g->num_heads_q;
        ndim = nb + 1;
        if (operand == FC_LSE) {
            full[nb + 1] = g->seqlen_q;
            ndim = nb + 2;
        }
        fits = strides_over(array, ndim, full, strides);
        /* One number for all heads by accident is a likelier story than by intent. */
        if (operand != FC_LSE && (array->ndim == 0 || array->shape[array->ndim - 1] != g->num_heads_q)) fits = false;
        if (!fits)
            return refuse_operand(array, "it must be one number per query head, (num_heads_q,) or with batches", ndim,
                                  full);
        tensor->strides[1] = strides[nb];
        if (operand == FC_LSE) tensor->strides[2] = strides[nb + 1];
        break;
    }
    for (int i = 0; i < nb; i++) batches->strides[operand][i] = strides[i];
    return 0;
}

/* Joins neighbouring batch dimensions wherever every operand steps through the two as through one. */
void fc_fold(fc_batches *b)
{
    int folded = 0; /* dimensions 0 .. folded - 1 are done */
    for (int i = 0; i < b->ndim; i++) {
        if (b->shape[i] == 1) continue;
        bool joins = folded > 0;
        for (int o = 0; o < FC_NUM_OPERANDS && joins; o++)
            joins = b->strides[o][folded - 1] == b->strides[o][i] * b->shape[i];
        int at = joins ? folded - 1 : folded++;
        b->shape[at] = (joins ? b->shape[at] : 1) * b->shape[i];
        for (int o = 0; o < FC_NUM_OPERANDS; o++) b->strides[o][at] = b->strides[o][i];
    }
    b->ndim = folded;
}

/* Bytes from an array's first element to its lowest and past its highest one. False for an array without elements, and
 * for one that reaches beyond the address space, which the library refuses. */
static bool reach_of(const fc_array *array, int64_t *low, int64_t *high)
{
    int64_t size = fc_dtype_size(array->dtype);
    *low = 0;
    *high = size;
    for (int i = 0; i < array->ndim; i++) {
        if (array->shape[i] == 0) return false;
        int64_t span;
        if (__builtin_mul_overflow(array->shape[i] - 1, array->strides[i], &span) ||
            __builtin_mul_overflow(span, size, &span))
            return false;
        int64_t *end = span < 0 ? low : high;
        if (__builtin_add_overflow(*end, span, end)) return false;
    }
    return true;
}

/* Exact for the layouts that arrays really have: by rising stride, each dimension must step over all that the ones
 * before it reach. */
bool fc_overlaps_itself(const fc_array *array)
{
    bool seen[FC_MAX_NDIM] = {false};
    uint64_t reach = 0;
    for (int i = 0; i < array->ndim; i++)
        if (array->shape[i] == 0) return false;
    for (int done = 0; done < array->ndim; done++) {
        int next = -1;
        uint64_t least = 0;
        for (int i = 0; i < array->ndim; i++) {
            uint64_t step = array->strides[i] < 0 ? -(uint64_t)array->strides[i] : (uint64_t)array->strides[i];
            if (seen[i] || (next >= 0 && step >= least)) continue;
            next = i;
            least = step;
        }
        seen[next] = true;
        if (array->shape[next] == 1) continue;
        if (least <= reach) return true;
        uint64_t span;
        if (__builtin_mul_overflow((uint64_t)array->shape[next] - 1, least, &span) ||
            __builtin_add_overflow(reach, span, &reach))
            return false; /* the library refuses it */
    }
    return false;
}

/* The columns of an array within rows of `row` bytes: where they begin, and how many bytes they take. */
static void columns_of(const fc_array *array, uint64_t row, uint64_t *first, uint64_t *width)
{
    int64_t size = fc_dtype_size(array->dtype), low = 0, high = size;
    for (int i = 0; i < array->ndim; i++) {
        int64_t step = array->strides[i] * size;
        if (array->shape[i] == 1 || (uint64_t)(step < 0 ? -step : step) % row == 0)
            continue; /* steps over whole rows */
        *(step < 0 ? &low : &high) += (array->shape[i] - 1) * step;
    }
    *first = ((uintptr_t)array->data + (uintptr_t)low) % row;
    *width = (uint64_t)(high - low);
}

/*
 * Could the two share an element? Exact for arrays that lie apart, and for two slices of one buffer, side by side in
 * every row of it (both step by multiples of one row, and their columns do not meet). Any other pair whose ranges meet
 * counts as overlap.
 */
bool fc_arrays_overlap(const fc_array *a, const fc_array *b)
{
    const fc_array *both[2] = {a, b};
    int64_t low[2], high[2];
    for (int i = 0; i < 2; i++)
        if (!reach_of(both[i], &low[i], &high[i])) return false;
    uintptr_t a_data = (uintptr_t)a->data, b_data = (uintptr_t)b->data;
    if (a_data + (uintptr_t)high[0] <= b_data + (uintptr_t)low[1]) return false;
    if (b_data + (uintptr_t)high[1] <= a_data + (uintptr_t)low[0]) return false;

    /* A candidate for the row is any stride of either. */
    for (int which = 0; which < 2; which++)
        for (int i = 0; i < both[which]->ndim; i++) {
            int64_t step = both[which]->strides[i] * fc_dtype_size(both[which]->dtype);
            uint64_t row = (uint64_t)(step < 0 ? -step : step), first[2], width[2];
            if (row == 0 || both[which]->shape[i] == 1) continue;
            columns_of(a, row, &first[0], &width[0]);
            columns_of(b, row, &first[1], &width[1]);
            if (width[0] > row || width[1] > row) continue;
            /* Two arcs on a circle of `row` bytes are apart when each starts after the other's end. */
            uint64_t gap = (first[1] + row - first[0]) % row;
            if (gap >= width[0] && row - gap >= width[1]) return false;
        }
    return true;
}
