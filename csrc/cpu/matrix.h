/*
 * matrix.h - what attention needs of linear algebra, on small blocks: rows in and out, transposition, products.
 *
 * The product is C[column][row] = sum over k of B(k, column) * A[k][row]: vectors run along rows, B is read one scalar
 * at a time with any strides. A register tile of VECTORS x PANEL_COLUMNS accumulators is fed by VECTORS loads and
 * PANEL_COLUMNS broadcasts per k, so it is bound by multiplication and not by loading.
 *
 * Included once per element type, with simd.h's three parameters and
 *   FC_CPU_PANEL_VECTORS  vectors of rows in the register tile, 1 to 4; PANEL_COLUMNS columns times that many
 *                         accumulators, plus the rows' vectors and one scalar, must fit the register file
 */
#include "convert.h"
#include "simd.h"

#ifndef FC_CPU_MATRIX_H
#define FC_CPU_MATRIX_H

#include <stdbool.h>

#include "flashcore.h"

#define load_row       FC_CPU_NAME(load_row)
#define store_row      FC_CPU_NAME(store_row)
#define is_in_place    FC_CPU_NAME(is_in_place)
#define read_row       FC_CPU_NAME(read_row)
#define transpose_rows FC_CPU_NAME(transpose_rows)
#define multiply_panel FC_CPU_NAME(multiply_panel)
#define multiply_rows  FC_CPU_NAME(multiply_rows)
#define multiply       FC_CPU_NAME(multiply)
#define dot_rows       FC_CPU_NAME(dot_rows)

enum { PANEL_COLUMNS = 6 };

static inline int64_t round_up(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static inline int64_t clamp(int64_t n, int64_t least, int64_t most)
{
    return n < least ? least : n > most ? most : n;
}

static inline int64_t element_bytes(int32_t dtype)
{
    return dtype == FC_BOOL ? 1 : dtype == FC_FLOAT64 ? 8 : dtype == FC_FLOAT32 ? 4 : 2;
}

static inline char *element(const fc_tensor *tensor, int64_t batch, int64_t head, int64_t row)
{
    int64_t index = batch * tensor->strides[0] + head * tensor->strides[1] + row * tensor->strides[2];
    return (char *)tensor->data + index * element_bytes(tensor->dtype);
}

#endif /* FC_CPU_MATRIX_H */

/* Reads `count` elements of any dtype, `stride` apart. A bool becomes 0 where true and -inf where false. */
static void load_row(real *to, const void *from, int32_t dtype, int64_t stride, int64_t count)
{
    const uint16_t *halves = from;
    const float *floats = from;
    const double *doubles = from;
    const uint8_t *bools = from;
    bool copy = stride == 1 && dtype == (FC_CPU_REAL_BYTES == 4 ? FC_FLOAT32 : FC_FLOAT64);
    if (copy) {
        memcpy(to, from, (size_t)count * sizeof(real));
    } else if (dtype == FC_FLOAT16 && stride == 1 && FC_CPU_REAL_BYTES == 4) {
        halves_to_floats((float *)to, halves, count);
    } else if (dtype == FC_FLOAT16) {
        for (int64_t i = 0; i < count; i++) to[i] = (real)half_to_float(halves[i * stride]);
    } else if (dtype == FC_BFLOAT16 && stride == 1) {
        for (int64_t i = 0; i < count; i++) to[i] = (real)bfloat16_to_float(halves[i]);
    } else if (dtype == FC_BFLOAT16) {
        for (int64_t i = 0; i < count; i++) to[i] = (real)bfloat16_to_float(halves[i * stride]);
    } else if (dtype == FC_FLOAT32) {
        for (int64_t i = 0; i < count; i++) to[i] = (real)floats[i * stride];
    } else if (dtype == FC_FLOAT64) {
        for (int64_t i = 0; i < count; i++) to[i] = (real)doubles[i * stride];
    } else if (stride == 1) {
        for (int64_t i = 0; i < count; i++) to[i] = bools[i] ? (real)0 : (real)-INFINITY;
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = bools[i * stride] ? (real)0 : (real)-INFINITY;
    }
}

static void store_row(void *to, int32_t dtype, int64_t stride, const real *from, int64_t count)
{
    uint16_t *halves = to;
    float *floats = to;
    real *reals = to;
    if (dtype == FC_FLOAT16 && stride == 1 && FC_CPU_REAL_BYTES == 4) {
        floats_to_halves(halves, (const float *)from, count);
    } else if (dtype == FC_FLOAT16) {
        for (int64_t i = 0; i < count; i++) halves[i * stride] = float_to_half((float)from[i]);
    } else if (dtype == FC_BFLOAT16 && stride == 1) {
        for (int64_t i = 0; i < count; i++) halves[i] = float_to_bfloat16((float)from[i]);
    } else if (dtype == FC_BFLOAT16) {
        for (int64_t i = 0; i < count; i++) halves[i * stride] = float_to_bfloat16((float)from[i]);
    } else if (dtype == FC_FLOAT32 && FC_CPU_REAL_BYTES == 8) {
        for (int64_t i = 0; i < count; i++) floats[i * stride] = (float)from[i];
    } else if (stride == 1) {
        memcpy(reals, from, (size_t)count * sizeof(real));
    } else {
        for (int64_t i = 0; i < count; i++) reals[i * stride] = from[i];
    }
}

/* Does a row of this tensor lie in memory as `count` reals, a multiple of `unit`? */
static bool is_in_place(const fc_tensor *tensor, int64_t count, int64_t unit)
{
    return tensor->dtype == (FC_CPU_REAL_BYTES == 4 ? FC_FLOAT32 : FC_FLOAT64) && tensor->strides[3] == 1 &&
           count % unit == 0;
}

/* `count` elements of a tensor's row as whole vectors of reals: in place, or copied to `buffer`. */
static const real *read_row(const fc_tensor *tensor, const void *from, int64_t count, real *buffer)
{
    if (is_in_place(tensor, count, LANES)) return from;
    load_row(buffer, from, tensor->dtype, tensor->strides[3], count);
    return buffer;
}

/* Turns LANES rows of `count` elements into `count` vectors, to_stride apart, times a factor. Both sides have room up
 * to a multiple of LANES. */
static void transpose_rows(real *to, int64_t to_stride, const real *const rows[LANES], int64_t count, real factor)
{
    for (int64_t k = 0; k < count; k += LANES) {
        vec square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = load(rows[i] + k);
        transpose_square(square);
        for (int i = 0; i < LANES; i++) store(to + (k + i) * to_stride, square[i] * factor);
    }
}

/* One register tile: c[column][row] = or += sum over k of b(k, column) * a[k][row], a row-major block of `a_stride`.
 * The first two arguments are constants at every call, so that the loops over them unroll and `sum` lives in registers.
 */
FC_INLINE void multiply_panel(const int vectors, const int columns, const real *a, int64_t a_stride, const real *b,
                              int64_t b_stride_k, int64_t b_stride_column, int64_t depth, real *c, int64_t c_stride,
                              bool accumulate)
{
    vec sum[PANEL_COLUMNS][4];
#pragma GCC unroll 6
    for (int column = 0; column < columns; column++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[column][v] = accumulate ? load(c + column * c_stride + v * LANES) : (vec){0};
    for (; depth > 0; depth--, a += a_stride, b += b_stride_k) {
#pragma GCC unroll 6
        for (int column = 0; column < columns; column++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[column][v] += load(a + v * LANES) * b[column * b_stride_column];
    }
#pragma GCC unroll 6
    for (int column = 0; column < columns; column++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(c + column * c_stride + v * LANES, sum[column][v]);
}

/* All columns for one panel of rows. */
FC_INLINE void multiply_rows(const int vectors, int64_t columns, const real *a, int64_t a_stride, const real *b,
                             int64_t b_stride_k, int64_t b_stride_column, int64_t depth, real *c, int64_t c_stride,
                             bool accumulate)
{
    for (; columns >= PANEL_COLUMNS; columns -= PANEL_COLUMNS) {
        multiply_panel(vectors, PANEL_COLUMNS, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride,
                       accumulate);
        b += PANEL_COLUMNS * b_stride_column;
        c += PANEL_COLUMNS * c_stride;
    }
    switch (columns) {
    case 5:
        multiply_panel(vectors, 5, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    case 4:
        multiply_panel(vectors, 4, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    case 3:
        multiply_panel(vectors, 3, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    case 2:
        multiply_panel(vectors, 2, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    case 1:
        multiply_panel(vectors, 1, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    }
}

/* The same for any number of row vectors. Not inlined: GCC then keeps the accumulators in memory, and AVX2 loses a
 * third of its speed. */
__attribute__((noinline)) static void multiply(int64_t vectors, int64_t columns, const real *a, int64_t a_stride,
                                               const real *b, int64_t b_stride_k, int64_t b_stride_column,
                                               int64_t depth, real *c, int64_t c_stride, bool accumulate)
{
    for (; vectors >= FC_CPU_PANEL_VECTORS; vectors -= FC_CPU_PANEL_VECTORS) {
        multiply_rows(FC_CPU_PANEL_VECTORS, columns, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride,
                      accumulate);
        a += FC_CPU_PANEL_VECTORS * LANES;
        c += FC_CPU_PANEL_VECTORS * LANES;
    }
    switch (vectors) {
#if FC_CPU_PANEL_VECTORS > 3
    case 3:
        multiply_rows(3, columns, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
#endif
#if FC_CPU_PANEL_VECTORS > 2
    case 2:
        multiply_rows(2, columns, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
#endif
    case 1:
        multiply_rows(1, columns, a, a_stride, b, b_stride_k, b_stride_column, depth, c, c_stride, accumulate);
        break;
    }
}

/*
 * c[column][row] = b[column] . a[row], for few rows: here vectors run along `depth`, a multiple of LANES, on which both
 * have stride 1. LANES columns at a time: their vectors of partial sums, transposed, add up to a vector of LANES
 * results. A whole vector is written per column; behind the last row it repeats row 0.
 */
static inline void dot_rows(int64_t rows, int64_t columns, const real *a, int64_t a_stride, const real *b,
                            int64_t b_stride, int64_t depth, real *c, int64_t c_stride)
{
    for (int64_t column = 0; column < columns; column += LANES) {
        int64_t count = columns - column < LANES ? columns - column : LANES;
        for (int64_t row = 0; row < rows; row++) {
            vec sums[LANES], total = {0};
            for (int64_t i = 0; i < LANES; i++) {
                const real *from = b + (column + (i < count ? i : count - 1)) * b_stride;
                sums[i] = (vec){0};
                for (int64_t k = 0; k < depth; k += LANES) sums[i] += load(from + k) * load(a + row * a_stride + k);
            }
            transpose_square(sums);
            for (int i = 0; i < LANES; i++) total += sums[i];
            for (int64_t i = 0; i < count; i++) {
                real *to = c + (column + i) * c_stride;
                if (row == 0) store(to, broadcast(total[i]));
                to[row] = total[i];
            }
        }
    }
}
