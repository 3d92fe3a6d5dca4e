/*
 * plan_hopper_short.c - plan.c's part for kernels/hopper_short: what fits, over how many blocks keys are split, and how
 * long it takes.
 *
 * A block keeps its share of a head's keys and values in shared memory. Where they are too many, or where tiles are so
 * few that most multiprocessors would idle, a cluster of blocks shares them.
 */
#include <math.h>

#include "internal.h"

enum { SMEM_BYTES = 227 * 1024, SM_SMEM_BYTES = 228 * 1024, BARRIER_BYTES = 1024, MOST_SPLITS = 8 };

/* A block's shared memory, as kernels/hopper_short/forward.cu lays it out, and 1 KiB that the system keeps. */
static int64_t smem_bytes(const fc_forward_args *args, const fc_kernel *kernel, int64_t splits)
{
    int64_t row_bytes = kernel->head_dim * 2,
            tiles = fc_divide_up(fc_divide_up(args->seqlen_k, kernel->block_n), splits);
    int64_t part_bytes = (kernel->head_dim / 2 + 4) * (int64_t)sizeof(float) * kernel->threads;
    int64_t mask_bytes = kernel->threads / 32 * fc_hopper_short_mask_bytes(&args->attn_mask, kernel->block_n);
    return BARRIER_BYTES + kernel->block_m * row_bytes + 2 * tiles * kernel->block_n * row_bytes +
           (splits - 1) * part_bytes + mask_bytes;
}

/* The fewest splits with which it fits; 0: none. */
static int64_t least_splits(const fc_forward_args *args, const fc_kernel *kernel)
{
    for (int64_t splits = 1; splits <= MOST_SPLITS; splits *= 2)
        if (smem_bytes(args, kernel, splits) <= SMEM_BYTES) return splits;
    return 0;
}

bool fc_hopper_short_serves(const fc_forward_args *args, const fc_kernel *kernel)
{
    return least_splits(args, kernel) > 0;
}

/* Blocks that a multiprocessor holds, by registers (as the kernel bounds them) and by shared memory. */
static int64_t blocks_that_fit(const fc_kernel *kernel, int64_t bytes)
{
    bool has_masks = kernel->mask == fc_mask_unbiased || kernel->mask == fc_mask_general;
    int64_t warpgroups = FC_HOPPER_SHORT_WARPGROUPS(kernel->block_n, kernel->head_dim, has_masks);
    int64_t by_registers = warpgroups / (kernel->block_m / 64), by_smem = SM_SMEM_BYTES / (bytes + 1024);
    return by_registers < by_smem ? by_registers : by_smem;
}

/*
 * Cycles beyond what every call costs. A warpgroup alone takes some 600 and then 850 for 64 keys or 1300 for 128; the
 * second of its block adds some 770 and 3 or 6 a key, and each further block 600 and 0.10 a row and key. Each further
 * turn of a multiprocessor costs 6500 more; where a mask makes tiles unequal the long ones come first, and short ones
 * fill the gaps, so turns need not be whole. Measured on an H100 (docs/hopper_short.md).
 */
static double estimate(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device, int64_t tiles,
                       int64_t splits)
{
    int64_t sms = device->num_sms > 0 ? device->num_sms : 1, blocks = tiles * splits;
    int64_t fit = blocks_that_fit(kernel, smem_bytes(args, kernel, splits));
    int64_t per_sm = fc_divide_up(blocks, sms);
    /* Beside the last blocks of the kernel before, those of this one do not spread evenly. */
    if (fit > 1 && per_sm == 1 && 2 * blocks > sms) per_sm = 2;
    double more_turns = (double)(fc_divide_up(per_sm, fit) - 1), share = 1;
    if (kernel->mask == fc_mask_band) {
        double most;
        share = fc_hopper_mean_keys(args, kernel->block_m, tiles / (args->batch * args->num_heads_q), &most) / most;
        more_turns = fmax(0, (double)blocks / (double)(sms * fit) - 1);
    }
    bool is_wide = kernel->block_n == 128;
    double steps = (double)fc_divide_up(fc_divide_up(args->seqlen_k, kernel->block_n), splits);
    double keys = steps * kernel->block_n, alone = 600 + steps * (is_wide ? 1300 : 850);
    if (kernel->block_m > 64) alone += 770 + (is_wide ? 6.4 : 3.2) * keys;
    double beside = (double)((per_sm < fit ? per_sm : fit) - 1) * (600 + 0.10 * kernel->block_m * keys * share);
    double weight = fc_hopper_weight(kernel), join = splits > 1 ? 1500 : 0;
    return (alone + beside) * weight + join + more_turns * ((alone * share + beside) * weight + join + 6500);
}

double fc_hopper_short_plan_blocks(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device,
                                   fc_plan *plan)
{
    int64_t splits = least_splits(args, kernel), tiles = plan->grid;
    /* More only while half the multiprocessors have no block, and a block keeps 256 keys. */
    while (2 * splits <= MOST_SPLITS && tiles * 2 * splits * 2 <= device->num_sms &&
           args->seqlen_k >= 2 * splits * 256 && smem_bytes(args, kernel, 2 * splits) <= SMEM_BYTES)
        splits *= 2;
    plan->num_splits = (int32_t)splits;
    plan->num_blocks = tiles * splits;
    /* Long tiles first, where they differ. */
    if (kernel->mask == fc_mask_full) {
        fc_hopper_group_by_keys(args, plan);
    } else {
        plan->heads_at_once = args->batch * args->num_heads_q;
        plan->num_groups = 1;
    }
    return estimate(args, kernel, device, tiles, splits);
}
