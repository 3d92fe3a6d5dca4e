/*
 * convert.h - float16 and bfloat16 to float32 and back, to nearest with ties to even.
 *
 * Every value survives: subnormals, infinities and NaN. Hardware conversion is used where the file is
 * compiled for it; the portable forms below give the same bits.
 */
#ifndef FC_CPU_CONVERT_H
#define FC_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Moves exponent and mantissa to their places and corrects the bias, 127 - 15 = 112. An all-ones exponent would come
 * out as 143, so it is set; a subnormal is a whole number of 2^-24. No step has a subnormal float, which a caller's
 * mode may take for zero. */
static inline float half_to_float(uint16_t half)
{
    uint32_t magnitude = half & 0x7fffu;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0;
    if (magnitude < 0x0400u) bits = float_bits((float)(int32_t)magnitude * 0x1p-24f);
    return float_from_bits(bits | (uint32_t)(half & 0x8000u) << 16);
}

static inline uint16_t float_to_half(float value)
{
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu, half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u; /* NaN */
    } else if (magnitude >= float_bits(65520.0f)) {
        half = 0x7c00u; /* 65520 lies half-way between the largest half, 65504, and the next power of two */
    } else if (magnitude < float_bits(0x1p-14f)) {
        /* Subnormal: a float in [0.5, 1) has the subnormals' spacing, 2^-24, so this addition rounds. */
        half = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
    } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    return (uint16_t)(sign | half);
}

static inline float bfloat16_to_float(uint16_t value)
{
    return float_from_bits((uint32_t)value << 16);
}

static inline uint16_t float_to_bfloat16(float value)
{
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
}

static inline void halves_to_floats(float *to, const uint16_t *from, int64_t count)
{
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#endif
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < count; i++) to[i] = half_to_float(from[i]);
}

static inline void floats_to_halves(uint16_t *to, const float *from, int64_t count)
{
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) to[i] = float_to_half(from[i]);
}

#endif /* FC_CPU_CONVERT_H */
