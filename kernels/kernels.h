/*
 * kernels.h - the one contract between the C core and the kernels, on CUDA and on the CPU.
 *
 * The C core hands over a problem that is checked, with every option resolved to plain numbers, and a
 * plan that says which kernel, tiles and grid. A kernel decides nothing, allocates nothing, raises
 * nothing. Both sides include this file; it needs no CUDA header.
 */
#ifndef FC_KERNELS_H
#define FC_KERNELS_H

#include <stdbool.h>

#include "flashcore.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * A forward problem, resolved.
 *
 * Visible keys: key j is visible to row i exactly where band_left <= j - i <= band_right (and the bool
 * mask is true). Both are clamped to [-seqlen_q, seqlen_k], so that i + band never overflows and
 * "everything" is band_left = -seqlen_q, band_right = seqlen_k.
 *
 * score = softcap(scale * q.k) + attn_mask - slope * |j - i - diagonal|, in natural units: an added mask may
 * hold finfo.min of float32, so multiply by log2(e) only after the row maximum is subtracted.
 */
typedef struct fc_forward_args {
    fc_tensor query, key, value, out; /* as in fc_attention_problem; one dtype */
    fc_tensor lse;                    /* dtype FC_NONE: not wanted */
    fc_tensor attn_mask;              /* dtype FC_NONE: none; FC_BOOL; or added */
    fc_tensor alibi_slopes, sinks;    /* dtype FC_NONE: none; strides[0], strides[1] are batch, head */
    int64_t batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    int64_t band_left, band_right;
    int64_t diagonal;
    double scale;
    double softcap;    /* 0: none */
    double keep_scale; /* of the weights that dropout keeps; 0: no dropout, and the next three mean nothing */
    const uint64_t *dropout_seed; /* seed and offset, on the device; common/dropout.h draws from them */
    int64_t first_batch;          /* added to the batch's number there */
    uint32_t keep_below;          /* a weight is kept where its random number is less */
} fc_forward_args;

/* Does the band leave every row its first keys, and every row its last ones? */
static inline bool fc_is_open_left(const fc_forward_args *args)
{
    return args->band_left <= -args->seqlen_q + 1;
}
static inline bool fc_is_open_right(const fc_forward_args *args)
{
    return args->band_right >= args->seqlen_k - 1;
}

/* A window that is narrow enough for Hopper's tiles of rows to see much the same number of keys, and mostly others than
 * the next ones do. What is made of it was measured up to here; at twice the width it is worth nothing. */
static inline bool fc_is_narrow_window(const fc_forward_args *args)
{
    return !fc_is_open_left(args) && !fc_is_open_right(args) && args->band_right - args->band_left <= 2048;
}

/* csrc/error.c: bytes of a number; 0 for FC_NONE and outside the enum. */
int32_t fc_dtype_bytes(int32_t dtype);

/* Whether Hopper's copy engine reaches an array where it lies: rows of neighbours, that begin at whole 16 bytes. */
static inline bool fc_hopper_maps(const fc_tensor *array)
{
    if (array->strides[3] != 1 || (uintptr_t)array->data % 16 != 0) return false;
    for (int i = 0; i < 3; i++) {
        int64_t stride = array->strides[i];
        if (stride < 0 || stride >= (int64_t)1 << 37 || stride * fc_dtype_bytes(array->dtype) % 16 != 0) return false;
    }
    return true;
}

static inline bool fc_mask_rows_differ(const fc_forward_args *args)
{
    return args->attn_mask.strides[2] != 0 && args->seqlen_q > 1;
}

/* The copy of attn_mask with aligned rows, [batch, heads, seqlen_q] of them, that kernels/hopper/align_mask.cuh makes
 * of one which the copy engine cannot read; what all batches or all heads share is there once. */
typedef struct fc_mask_copy {
    int64_t batch, heads, row_bytes;
} fc_mask_copy;
static inline fc_mask_copy fc_mask_copy_of(const fc_forward_args *args)
{
    const fc_tensor *mask = &args->attn_mask;
    fc_mask_copy copy;
    copy.batch = mask->strides[0] == 0 ? 1 : args->batch;
    copy.heads = mask->strides[1] == 0 ? 1 : args->num_heads_q;
    copy.row_bytes = (args->seqlen_k * fc_dtype_bytes(mask->dtype) + 15) / 16 * 16;
    return copy;
}

/* A backward problem, resolved. */
typedef struct fc_backward_args {
    fc_forward_args forward; /* out and lse are inputs here */
    fc_tensor dout, dlse;    /* dlse's dtype FC_NONE: zero */
    fc_tensor dq, dk, dv;    /* here and below, dtype FC_NONE: not wanted */
    fc_tensor dbias, dsinks; /* stride 0: one element, with the sum over that dimension */
} fc_backward_args;

/* A plan, and what of it only a launcher needs to know: how tiles are dealt to blocks (kernels/hopper/schedule.cuh),
 * and how many blocks share a multiprocessor. */
typedef struct fc_launch {
    fc_plan plan;
    int64_t heads_at_once; /* heads whose tiles are dealt out together, so that their keys stay in cache; 0: any */
    int64_t num_groups;    /* of so many heads, the last of which takes the rest, more or fewer; 0: none */
    bool groups_alternate; /* they begin with their first rows and with their last ones in turn; the last group does
                            * with the last, as otherwise all */
    int32_t blocks_per_sm; /* more are kept from sharing a multiprocessor; 0: as many as fit */
} fc_launch;

/* workspace: the plan's workspace_bytes of device memory, or NULL where that is 0.
 * Returns a cudaError_t, 0 for success; stream is a cudaStream_t. */
typedef int (*fc_forward_launcher)(const fc_forward_args *args, const fc_launch *launch, void *workspace, void *stream);
typedef int (*fc_backward_launcher)(const fc_backward_args *args, const fc_plan *plan, void *workspace, void *stream);

/* The portable backward's workspace, for each row of each query head. */
#define FC_PORTABLE_BACKWARD_ROW_BYTES 16

/* Shared memory of a Hopper multiprocessor, of which the system keeps 1 KiB for each block; and the most one may have.
 */
#define FC_HOPPER_SM_SMEM_BYTES    (228 * 1024)
#define FC_HOPPER_BLOCK_SMEM_BYTES (FC_HOPPER_SM_SMEM_BYTES - 1024)

/* Warpgroups of kernels/hopper_short that fit on a multiprocessor: by a thread's numbers (scores, weights, out; some 16
 * for options) and some 40 registers beside, four with at most 128 registers, three with 168. Its launch bound, and the
 * planner's. */
#define FC_HOPPER_SHORT_NUMBERS(block_n, head_dim, has_masks)                                                          \
    ((block_n) / 2 + (block_n) / 4 + (head_dim) / 2 + ((has_masks) ? 16 : 0))
#define FC_HOPPER_SHORT_WARPGROUPS(block_n, head_dim, has_masks)                                                       \
    (FC_HOPPER_SHORT_NUMBERS(block_n, head_dim, has_masks) <= 88    ? 4                                                \
     : FC_HOPPER_SHORT_NUMBERS(block_n, head_dim, has_masks) <= 128 ? 3                                                \
                                                                    : 2)

/* What a warp of kernels/hopper_short holds at the end, of 16 rows: out, sums and references, in float32. */
#define FC_HOPPER_SHORT_PART_BYTES(head_dim) (((head_dim) / 2 + 4) * 4 * 32)

/* The most blocks in a cluster that may split a head's keys: the largest size that every GPU takes. */
#define FC_HOPPER_SHORT_MOST_SPLITS 8

/* The warps whose rows one block of a cluster joins; with more blocks than warps, some join none. Powers of two. */
static inline int64_t fc_hopper_short_joined_warps(int64_t warps, int64_t splits)
{
    return splits < warps ? warps / splits : 1;
}

/* A block's shared memory in kernels/hopper_short, for both sides: barriers, query, its share of the head's keys and
 * values, the parts that it gets from other blocks of its cluster, in whole KiB since a mask's swizzle follows, and of
 * a mask sixteen rows of a tile for each warp. */
#define FC_HOPPER_SHORT_BARRIER_BYTES 1024
typedef struct fc_hopper_short_smem {
    int64_t parts_offset, mask_offset, bytes;
} fc_hopper_short_smem;
static inline fc_hopper_short_smem fc_hopper_short_smem_of(const fc_forward_args *args, int64_t head_dim,
                                                           int64_t block_m, int64_t block_n, int64_t splits)
{
    int64_t warps = block_m / 16, tiles = (args->seqlen_k + block_n - 1) / block_n;
    int64_t share = (tiles + splits - 1) / splits, row_bytes = 2 * head_dim;
    int64_t parts = fc_hopper_short_joined_warps(warps, splits) * (splits - 1);
    fc_hopper_short_smem smem;
    smem.parts_offset = FC_HOPPER_SHORT_BARRIER_BYTES + (block_m + 2 * share * block_n) * row_bytes;
    smem.mask_offset = smem.parts_offset + (parts * FC_HOPPER_SHORT_PART_BYTES(head_dim) + 1023) / 1024 * 1024;
    smem.bytes = smem.mask_offset + warps * 16 * block_n * fc_dtype_bytes(args->attn_mask.dtype);
    return smem;
}

/* CUDA launchers are named fc_<family>_forward_<dtype>_d<head_dim>_<mask>_<block_m>x<block_n>, one per row of
 * variants.def, or _backward_. */
#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif
#ifdef FC_WITH_CUDA
/* A row for one architecture alone exists where that is among the build's targets (setup.py defines FC_BUILD_90A). */
#define FC_IF_BUILT_75(...) __VA_ARGS__
#ifdef FC_BUILD_90A
#define FC_IF_BUILT_90a(...) __VA_ARGS__
#else
#define FC_IF_BUILT_90a(...)
#endif
#define FC_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                                     \
    FC_IF_BUILT_##arch(int fc_##family##_forward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n(               \
                           const fc_forward_args *, const fc_launch *, void *, void *);)
#define FC_BACKWARD_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                            \
    FC_IF_BUILT_##arch(int fc_##family##_backward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n(              \
                           const fc_backward_args *, const fc_plan *, void *, void *);)
#include "variants.def"
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif /* FC_KERNELS_H */
