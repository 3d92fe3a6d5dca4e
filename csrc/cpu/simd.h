/*
 * simd.h - vectors of one element type: `vec`, LANES of `real`, and the few operations C does not spell.
 *
 * Built on GCC's vector extensions (which Clang has too): +, *, < and shuffles work on whole vectors and a
 * scalar operand is broadcast. No include guard: included once per element type, with
 *
 *   FC_CPU_VECTOR_BYTES   16, 32 or 64
 *   FC_CPU_REAL           float or double
 *   FC_CPU_REAL_BYTES     4 or 8
 *
 * Every name defined for an element type ends in it: FC_CPU_NAME(vec) is vec_float or vec_double.
 */
#ifndef FC_CPU_SIMD_H
#define FC_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FC_CPU_PASTE2(a, b) a##_##b
#define FC_CPU_PASTE(a, b)  FC_CPU_PASTE2(a, b)
#define FC_CPU_NAME(name)   FC_CPU_PASTE(name, FC_CPU_REAL)
#define FC_INLINE           static inline __attribute__((always_inline))

#define real             FC_CPU_REAL
#define LANES            (FC_CPU_VECTOR_BYTES / FC_CPU_REAL_BYTES)
#define vec              FC_CPU_NAME(vec)
#define ivec             FC_CPU_NAME(ivec)
#define uvec             FC_CPU_NAME(uvec)
#define load             FC_CPU_NAME(load)
#define store            FC_CPU_NAME(store)
#define broadcast        FC_CPU_NAME(broadcast)
#define select_lanes     FC_CPU_NAME(select_lanes)
#define max_lanes        FC_CPU_NAME(max_lanes)
#define power_of_two     FC_CPU_NAME(power_of_two)
#define reduced_exp      FC_CPU_NAME(reduced_exp)
#define exp_lanes        FC_CPU_NAME(exp_lanes)
#define tanh_lanes       FC_CPU_NAME(tanh_lanes)
#define transpose_square FC_CPU_NAME(transpose_square)

/* 1/k!, the Taylor coefficients of exp. */
static const double inverse_factorial[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800,
};

#endif /* FC_CPU_SIMD_H */

typedef real vec __attribute__((vector_size(FC_CPU_VECTOR_BYTES)));
#if FC_CPU_REAL_BYTES == 4
typedef int32_t ivec __attribute__((vector_size(FC_CPU_VECTOR_BYTES))); /* as a comparison gives: -1 where true */
typedef uint32_t uvec __attribute__((vector_size(FC_CPU_VECTOR_BYTES)));
#else
typedef int64_t ivec __attribute__((vector_size(FC_CPU_VECTOR_BYTES)));
typedef uint64_t uvec __attribute__((vector_size(FC_CPU_VECTOR_BYTES)));
#endif

FC_INLINE vec load(const real *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

FC_INLINE void store(real *to, vec v)
{
    memcpy(to, &v, sizeof v);
}

FC_INLINE vec broadcast(real x)
{
    return x - (vec){0}; /* not 0 + x, which would lose the sign of -0 */
}

FC_INLINE vec select_lanes(ivec where, vec yes, vec no)
{
    return (vec)((where & (ivec)yes) | (~where & (ivec)no));
}

/* a > b ? a : b, so that b comes out wherever either is NaN. */
FC_INLINE vec max_lanes(vec a, vec b)
{
#if FC_CPU_VECTOR_BYTES == 64 && defined(__AVX512F__)
    return FC_CPU_REAL_BYTES == 4 ? (vec)_mm512_max_ps((__m512)a, (__m512)b)
                                  : (vec)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif FC_CPU_VECTOR_BYTES == 32 && defined(__AVX__)
    return FC_CPU_REAL_BYTES == 4 ? (vec)_mm256_max_ps((__m256)a, (__m256)b)
                                  : (vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif FC_CPU_VECTOR_BYTES == 16 && defined(__SSE2__)
    return FC_CPU_REAL_BYTES == 4 ? (vec)_mm_max_ps((__m128)a, (__m128)b) : (vec)_mm_max_pd((__m128d)a, (__m128d)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

/* x * 2^n, for integral n <= 0, rounded once even where the result is subnormal. Without an instruction for it: two
 * factors, each a normal number whose exponent field is written directly, because 2^n alone may be too small. */
FC_INLINE vec power_of_two(vec x, vec n, ivec n_integer)
{
#if FC_CPU_VECTOR_BYTES == 64 && defined(__AVX512F__)
    (void)n_integer;
    return FC_CPU_REAL_BYTES == 4 ? (vec)_mm512_scalef_ps((__m512)x, (__m512)n)
                                  : (vec)_mm512_scalef_pd((__m512d)x, (__m512d)n);
#else
    (void)n;
    enum { MANTISSA = FC_CPU_REAL_BYTES == 4 ? 23 : 52, BIAS = FC_CPU_REAL_BYTES == 4 ? 127 : 1023 };
    ivec half = n_integer >> 1;
    vec first = (vec)((uvec)(half + BIAS) << MANTISSA);
    vec second = (vec)((uvec)(n_integer - half + BIAS) << MANTISSA);
    return x * first * second;
#endif
}

/*
 * exp(x) = 2^n (1 + p) for x <= 0: returns p = exp(r) - 1 and n, where n = round(x / ln 2), r = x - n ln 2.
 *
 * Rounding: adding 1.5 * 2^MANTISSA leaves no fraction bits, and the low bits are then the integer n.
 * Cody-Waite: ln 2 = high + low, where high has so few bits that n * high is exact without FMA.
 * |r| <= ln(2)/2 = 0.3466. The Taylor series to degree 7 (13) leaves 0.3466^8/8! = 5e-9 (0.3466^14/14! = 4e-18), a
 * twelfth (a twenty-fifth) of half an ulp.
 */
FC_INLINE vec reduced_exp(vec x, vec *n, ivec *n_integer)
{
    enum { DEGREE = FC_CPU_REAL_BYTES == 4 ? 7 : 13 };
    const real magic = FC_CPU_REAL_BYTES == 4 ? (real)0x1.8p23 : (real)0x1.8p52;
    const real inverse_ln2 = (real)1.4426950408889634074;
    const real ln2_high = FC_CPU_REAL_BYTES == 4 ? (real)0x1.63p-1 : (real)0x1.62e42feep-1; /* 9 and 32 bits */
    const real ln2_low = FC_CPU_REAL_BYTES == 4 ? (real)-2.12194440054690583e-4 : (real)1.90821492927058770002e-10;

    vec shifted = x * inverse_ln2 + magic;
    *n = shifted - magic;
    *n_integer = (ivec)shifted - (ivec)broadcast(magic);
    vec r = x - *n * ln2_high - *n * ln2_low;
    vec q = broadcast((real)inverse_factorial[DEGREE]);
#pragma GCC unroll 16
    for (int k = DEGREE - 1; k >= 1; k--) q = q * r + (real)inverse_factorial[k];
    return q * r;
}

/* exp(x) for x <= 0, subnormal results too: under 1 ulp wrong with FMA, 1.3 without; exp(-inf) = 0; NaN stays. */
FC_INLINE vec exp_lanes(vec x)
{
    const real lowest = FC_CPU_REAL_BYTES == 4 ? -104 : -746; /* rounds to 0, and keeps -inf - -inf away */
    vec n;
    ivec n_integer;
    vec p = reduced_exp(max_lanes(broadcast(lowest), x), &n, &n_integer);
    return power_of_two(p + 1, n, n_integer);
}

/* tanh|x| = -e / (2 + e) with e = exp(-2|x|) - 1, taken without cancellation: 2^n p + (2^n - 1). */
FC_INLINE vec tanh_lanes(vec x)
{
    const real lowest = -50; /* exp(-50) is nothing beside 1, in double too */
    vec n, minus_2x = select_lanes(x > 0, -2 * x, 2 * x);
    ivec n_integer;
    vec p = reduced_exp(max_lanes(broadcast(lowest), minus_2x), &n, &n_integer);
    vec e = power_of_two(p, n, n_integer) + (power_of_two(broadcast(1), n, n_integer) - 1);
    vec t = e / (2 + e);
    return select_lanes(x > 0, -t, t);
}

/*
 * Transposes a LANES x LANES square held in vectors. One step interleaves row i with row i + LANES/2: element (i, j),
 * whose index has the bits of i above those of j, moves to where that index is rotated left by one bit.
 * log2(LANES) steps swap the two halves of the bits, and that is the transpose.
 */
#undef FC_CPU_LOW
#undef FC_CPU_HIGH
#if LANES == 16
#define FC_CPU_LOW  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FC_CPU_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define FC_CPU_LOW  0, 8, 1, 9, 2, 10, 3, 11
#define FC_CPU_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif LANES == 4
#define FC_CPU_LOW  0, 4, 1, 5
#define FC_CPU_HIGH 2, 6, 3, 7
#elif LANES == 2
#define FC_CPU_LOW  0, 2
#define FC_CPU_HIGH 1, 3
#endif

FC_INLINE void transpose_square(vec square[LANES])
{
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        vec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            vec upper = square[i], lower = square[i + LANES / 2];
#if defined(__clang__)
            next[2 * i] = __builtin_shufflevector(upper, lower, FC_CPU_LOW);
            next[2 * i + 1] = __builtin_shufflevector(upper, lower, FC_CPU_HIGH);
#else
            next[2 * i] = __builtin_shuffle(upper, lower, (ivec){FC_CPU_LOW});
            next[2 * i + 1] = __builtin_shuffle(upper, lower, (ivec){FC_CPU_HIGH});
#endif
        }
        memcpy(square, next, sizeof next);
    }
}
