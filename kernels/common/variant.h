/*
 * variant.h - the row of variants.def that this compilation is for, as names and constants.
 *
 * The build passes a row's columns as the macros FC_FAMILY, FC_DTYPE, FC_HEAD_DIM, FC_MASK, FC_BLOCK_M,
 * FC_BLOCK_N and FC_THREADS. Every <family>/forward.cu defines its launcher as FC_NAME(forward), every
 * backward.cu as FC_NAME(backward), so that the name is joined here alone: fc_portable_forward_float16_d64_any_64x64.
 */
#ifndef FC_COMMON_VARIANT_H
#define FC_COMMON_VARIANT_H

#include "kernels.h"

#define FC_JOIN_EXPANDED(family, op, dtype, head_dim, mask, block_m, block_n)                                          \
    fc_##family##_##op##_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n
#define FC_JOIN(family, op, dtype, head_dim, mask, block_m, block_n)                                                   \
    FC_JOIN_EXPANDED(family, op, dtype, head_dim, mask, block_m, block_n)
#define FC_NAME(op) FC_JOIN(FC_FAMILY, op, FC_DTYPE, FC_HEAD_DIM, FC_MASK, FC_BLOCK_M, FC_BLOCK_N)

/* Which calls the row serves; the words of its mask column. */
enum class mask_class { any, full, band, unbiased, biased, general };
constexpr mask_class MASK = mask_class::FC_MASK;
/* Calls with attn_mask; `any` serves these, too, in its own way. */
constexpr bool HAS_MASKS = MASK == mask_class::unbiased || MASK == mask_class::biased || MASK == mask_class::general;
constexpr int HEAD_DIM = FC_HEAD_DIM;
constexpr int BLOCK_M = FC_BLOCK_M;
constexpr int BLOCK_N = FC_BLOCK_N;
constexpr int THREADS = FC_THREADS;

#endif /* FC_COMMON_VARIANT_H */
