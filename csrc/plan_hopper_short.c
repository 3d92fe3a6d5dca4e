/*
 * plan_hopper_short.c - plan.c's part for kernels/hopper_short: what fits, over how many blocks keys are split, and how
 * long it takes.
 *
 * A block keeps its share of a head's keys and values in shared memory. Where they are too many, or where tiles are so
 * few that most multiprocessors would idle, a cluster of blocks shares them.
 */
#include <math.h>

#include "internal.h"

static int64_t smem_bytes(const fc_forward_args *args, const fc_kernel *kernel, int64_t splits)
{
    return fc_hopper_short_smem_of(args, kernel->head_dim, kernel->block_m, kernel->block_n, splits).bytes;
}

/* The fewest splits with which it fits; 0: none. */
static int64_t least_splits(const fc_forward_args *args, const fc_kernel *kernel)
{
    for (int64_t splits = 1; splits <= FC_HOPPER_SHORT_MOST_SPLITS; splits *= 2)
        if (smem_bytes(args, kernel, splits) <= FC_HOPPER_BLOCK_SMEM_BYTES) return splits;
    return 0;
}

bool fc_hopper_short_serves(const fc_forward_args *args, const fc_kernel *kernel)
{
    return least_splits(args, kernel) > 0;
}

static bool has_masks(const fc_kernel *kernel)
{
    return kernel->mask == fc_mask_unbiased || kernel->mask == fc_mask_biased || kernel->mask == fc_mask_general;
}

/* Blocks that a multiprocessor holds, by registers (as the kernel bounds them) and by shared memory. */
static int64_t blocks_that_fit(const fc_kernel *kernel, int64_t bytes)
{
    int64_t warpgroups = FC_HOPPER_SHORT_WARPGROUPS(kernel->block_n, kernel->head_dim, has_masks(kernel));
    int64_t by_registers = warpgroups / (kernel->block_m / 64);
    int64_t by_smem = FC_HOPPER_SM_SMEM_BYTES / (bytes + 1024);
    return by_registers < by_smem ? by_registers : by_smem;
}

/* A grid, and the multiprocessors that it may have. */
struct layout {
    int64_t tiles, splits, sms;
    int64_t fit, per_sm; /* blocks on a multiprocessor: at most, and this call's */
};

static struct layout layout_of(const fc_kernel *kernel, int64_t tiles, int64_t splits, int64_t bytes, int64_t sms)
{
    /* Of a cluster's multiprocessors, which are neighbours, a large one leaves some over. */
    int64_t usable = splits > 2 ? sms - sms / 8 : sms, fit = blocks_that_fit(kernel, bytes);
    return (struct layout){
        .tiles = tiles, .splits = splits, .sms = sms, .fit = fit, .per_sm = fc_divide_up(tiles * splits, usable)};
}

/* Of the longest tile's keys, how many a tile sees in the mean. */
static double share_of_longest(const fc_forward_args *args, const fc_kernel *kernel, int64_t tiles)
{
    if (kernel->mask != fc_mask_band) return 1;
    double most, mean = fc_hopper_mean_keys(args, kernel->block_m, tiles / (args->batch * args->num_heads_q), &most);
    return most > 0 ? mean / most : 1;
}

/*
 * Cycles beyond what every call costs. A warpgroup alone takes some 600 and then 850 for 64 keys or 1300 for 128; the
 * second of its block adds some 770 and 3 or 6 a key, each further block 600 (250 of the smallest, four of which fit)
 * and 0.10 a row and key, and joining parts 600 for each. Each further turn of a multiprocessor costs 6500 more; where
 * a mask makes tiles unequal the long ones come first, and short ones fill the gaps, so turns need not be whole. To add
 * a bias takes 30% more. Measured on an H100 (docs/hopper_short.md).
 */
static double estimate(const fc_forward_args *args, const fc_kernel *kernel, const struct layout *of, double share)
{
    int64_t together = of->per_sm < of->fit ? of->per_sm : of->fit;
    double more_turns = (double)(fc_divide_up(of->per_sm, of->fit) - 1);
    if (kernel->mask == fc_mask_band)
        more_turns = fmax(0, (double)(of->tiles * of->splits) / (double)(of->sms * of->fit) - 1);
    bool is_wide = kernel->block_n == 128;
    double steps = (double)fc_divide_up(fc_divide_up(args->seqlen_k, kernel->block_n), of->splits);
    double keys = steps * kernel->block_n, alone = 600 + steps * (is_wide ? 1300 : 850);
    if (kernel->block_m > 64) alone += 770 + (is_wide ? 6.2 : 3.2) * keys;
    bool is_small = kernel->block_m == 64 && !is_wide && kernel->head_dim <= 64 && kernel->mask == fc_mask_full;
    double beside = (double)(together - 1) * ((is_small ? 250 : 600) + 0.10 * kernel->block_m * keys * share);
    double weight = fc_hopper_weight(kernel) * (kernel->mask == fc_mask_biased ? 1.3 : 1);
    double join = of->splits > 1 ? 600 * (double)of->splits : 0;
    return (alone + beside + join) * weight + more_turns * ((alone * share + beside + join) * weight + 6500);
}

/*
 * Has every multiprocessor get as many blocks. Those of a dependent launch are placed while the kernels before it hold
 * some multiprocessors more than others, and crowd on the rest. So blocks without a tile fill up the grid, and of those
 * that fit on a multiprocessor only this call's may: what the next call's would fetch ahead of their turn delays these.
 * Clusters let two calls' in, if they are large or nearly fill the machine alike: a cluster waits for neighbours, of
 * whom few become free at once. Gains nothing where no more fit anyway; with masks, nothing beyond one block each.
 */
static void lay_evenly(fc_launch *launch, const fc_kernel *kernel, const struct layout *of)
{
    if (of->per_sm >= of->fit || (has_masks(kernel) && of->per_sm > 1)) return;
    bool fills = 8 * launch->plan.num_blocks > 7 * of->sms && kernel->mask == fc_mask_full;
    bool waits = of->splits > 2 || (of->splits > 1 && fills);
    int64_t calls = waits && of->fit >= 2 * of->per_sm ? 2 : 1;
    launch->plan.num_blocks = of->per_sm * of->sms / of->splits * of->splits;
    launch->blocks_per_sm = (int32_t)(calls * of->per_sm);
}

/* The grid whose splits take the least time, *cycles: the fewest that fit, or more, as long as they gain, have
 * multiprocessors, and each block keeps 128 keys. */
static struct layout choose_splits(const fc_forward_args *args, const fc_kernel *kernel, int64_t tiles, int64_t sms,
                                   double share, double *cycles)
{
    int64_t least = least_splits(args, kernel);
    struct layout best = layout_of(kernel, tiles, least, smem_bytes(args, kernel, least), sms);
    *cycles = estimate(args, kernel, &best, share);
    for (int64_t splits = 2 * least; splits <= FC_HOPPER_SHORT_MOST_SPLITS; splits *= 2) {
        int64_t bytes = smem_bytes(args, kernel, splits);
        if (tiles * splits > sms || args->seqlen_k < 128 * splits || bytes > FC_HOPPER_BLOCK_SMEM_BYTES) break;
        struct layout layout = layout_of(kernel, tiles, splits, bytes, sms);
        double its_cycles = estimate(args, kernel, &layout, share);
        if (its_cycles >= *cycles) break;
        *cycles = its_cycles;
        best = layout;
    }
    return best;
}

double fc_hopper_short_plan_blocks(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device,
                                   int64_t splits, fc_launch *launch)
{
    int64_t tiles = launch->plan.num_tiles, sms = device->num_sms > 0 ? device->num_sms : 1;
    double share = share_of_longest(args, kernel, tiles), cycles = 0;
    struct layout layout = splits == 0 ? choose_splits(args, kernel, tiles, sms, share, &cycles)
                                       : layout_of(kernel, tiles, splits, smem_bytes(args, kernel, splits), sms);
    launch->plan.num_splits = (int32_t)layout.splits;
    launch->plan.num_blocks = tiles * layout.splits;
    lay_evenly(launch, kernel, &layout);
    /* Long tiles first, where they differ. */
    if (kernel->mask == fc_mask_full) {
        fc_hopper_group_by_keys(args, launch);
    } else {
        launch->heads_at_once = args->batch * args->num_heads_q;
        launch->num_groups = 1;
    }
    return cycles;
}
