/*
 * plan_hopper.c - plan.c's part for Hopper: which arrays its copy engine reads, and how tiles are dealt to blocks.
 *
 * Each block stays on one multiprocessor. Tiles are dealt to the blocks like cards, in rounds of opposite direction
 * (kernels/hopper/schedule.cuh): group after group of heads, and in a group row after row, from the last, or in
 * every other group from the first. Under a causal mask costs fall linearly within a group, so two rounds that fall
 * into one group cost every block the same. The choice is the size of the groups, and of the last one: whether the
 * loads come out even depends on how they divide the rounds, in no simple way; and keys must stay in the L2 cache
 * meanwhile.
 *
 * The trick is to try: a few sizes are dealt here as the kernel will, and the most even ones are kept in mind for the
 * next call of these sizes.
 */
#include "internal.h"
#include <math.h>
#include <stdatomic.h>

/* One array: rows of 16-byte pieces, none of them backwards; rows and keys are 32-bit numbers, and their sums too. */
static bool is_readable(const fc_tensor *tensor, const int64_t shape[4])
{
    enum { EIGHT = 16 / 2, MOST = INT32_MAX / 2 - 1024 };
    if ((uintptr_t)tensor->data % 16 != 0 || (tensor->strides[3] != 1 && shape[3] > 1)) return false;
    for (int i = 0; i < 3; i++) {
        int64_t stride = tensor->strides[i];
        if (shape[i] > MOST) return false;
        if (shape[i] > 1 && (stride < 0 || stride % EIGHT != 0 || stride >= (int64_t)1 << 39)) return false;
    }
    return true;
}

bool fc_hopper_reads(const fc_forward_args *args)
{
    const int64_t far = (int64_t)1 << 30; /* ALiBi's distances are 32-bit numbers, too */
    if (args->alibi_slopes.dtype != FC_NONE && (args->diagonal > far || args->diagonal < -far)) return false;
    const int64_t query[4] = {args->batch, args->num_heads_q, args->seqlen_q, args->head_dim};
    const int64_t key[4] = {args->batch, args->num_heads_kv, args->seqlen_k, args->head_dim};
    const int64_t value[4] = {args->batch, args->num_heads_kv, args->seqlen_k, args->head_dim_v};
    return is_readable(&args->query, query) && is_readable(&args->key, key) && is_readable(&args->value, value);
}

const char *fc_hopper_reads_what(const fc_forward_args *args)
{
    return fc_hopper_reads(args) ? ""
                                 : "; Hopper's kernels read query, key and value whose last dimension is contiguous, "
                                   "whose other strides are positive multiples of 8 elements, and whose data is "
                                   "aligned to 16 bytes (copy the array), and ALiBi with diagonals up to 2^30";
}

/* Of the time. Groups that begin with their smallest tiles ask for many new keys at once; and a score says no more than
 * this, in which the earlier sizes are the better tried ones. */
static const double ALTERNATING_LOSES = 0.015, CLEARLY = 0.008;

enum { MOST_BLOCKS = 256, MOST_ROW_TILES = 1024, MOST_ROUNDS = 64, MEMO = 64 };

/* Keys that block_m rows from first_row see. */
static int64_t visible_keys(const fc_forward_args *args, int64_t first_row, int64_t block_m)
{
    int64_t end_row = first_row + block_m < args->seqlen_q ? first_row + block_m : args->seqlen_q;
    int64_t first = first_row + args->band_left, end = end_row + args->band_right;
    if (first < 0) first = 0;
    if (end > args->seqlen_k) end = args->seqlen_k;
    return end > first ? end - first : 0;
}

/* What the tiles of one head cost, from the first rows on, in keys of a whole tile. Measured on an H100: a tile's own
 * time is some 1.5 us, and a key takes a block 0.72 ps for each of its rows and columns, so that their ratio is 2^21
 * over both. Rows that are not there save what only their warpgroups would do, 60%. */
static void find_costs(const fc_forward_args *args, const fc_kernel *kernel, int64_t row_tiles, int64_t costs[])
{
    int64_t block_m = kernel->block_m, own = (1 << 21) / (block_m * kernel->head_dim);
    for (int64_t i = 0; i < row_tiles; i++) {
        int64_t left = args->seqlen_q - i * block_m, rows = left < block_m ? left : block_m;
        costs[i] = (own + visible_keys(args, i * block_m, block_m)) * (4 * block_m + 6 * rows) / (10 * block_m);
    }
}

/* Tiles being dealt: what each block has so far, and who is next. */
struct deal {
    int64_t loads[MOST_BLOCKS], num_blocks, place, step;
};

static void deal_group(struct deal *deal, const int64_t costs[], int64_t row_tiles, int64_t heads, bool last_rows_first)
{
    for (int64_t i = 0; i < row_tiles; i++) {
        int64_t cost = costs[last_rows_first ? row_tiles - 1 - i : i];
        for (int64_t head = 0; head < heads; head++) {
            deal->loads[deal->place] += cost;
            if (deal->place + deal->step < 0 || deal->place + deal->step == deal->num_blocks)
                deal->step = -deal->step; /* the next round begins where this one ends */
            else
                deal->place += deal->step;
        }
    }
}

/* The share of their time that the blocks work, where the one with the most sets it. */
static double evenness(const struct deal *deal)
{
    int64_t all = 0, most = 0;
    for (int64_t i = 0; i < deal->num_blocks; i++) {
        all += deal->loads[i];
        if (deal->loads[i] > most) most = deal->loads[i];
    }
    return most > 0 ? (double)all / (double)(most * deal->num_blocks) : 1;
}

/* Everything that the choice depends on, in 64 bits. Should two problems ever share those that are kept, they share a
 * choice, if it is one for both, which at worst is slow. */
static uint64_t fingerprint(const fc_forward_args *args, const fc_device *device, int64_t block_m, int64_t num_blocks)
{
    const int64_t facts[] = {args->batch,    args->num_heads_q, args->num_heads_kv, args->seqlen_q,   args->seqlen_k,
                             args->head_dim, args->head_dim_v,  args->band_left,    args->band_right, device->l2_bytes,
                             block_m,        num_blocks};
    uint64_t mixed = 0;
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) mixed = fc_mix(mixed, (uint64_t)facts[i]);
    return mixed;
}

/* How rows are dealt in groups that follow each other: from the last in all, or in every other one from the first, the
 * last of them from the last. */
enum order { DOWN, UP_AND_DOWN, DOWN_AND_UP };

/* What is tried, and what it scores: the share of their time that blocks work, less what that costs. */
struct trial {
    int64_t heads, at_once, row_tiles;
    int64_t in_cache; /* heads whose keys fill 65% of the L2 cache */
    enum order order;
    double best, evenness; /* the best score, and what of it is evenness */
};

/* Of keys beyond the cache, some come from memory as often as blocks ask at different times: up to 6% of the time. */
static double cache_loss(const struct trial *trial, int64_t heads, int64_t num_blocks)
{
    return heads <= trial->in_cache ? 0 : 0.06 * (double)heads / ((double)num_blocks / 4);
}

/* Tries a last group of any number of heads behind others of at_once, and keeps the best. */
static void try_groups(struct trial *trial, const int64_t costs[], fc_launch *launch)
{
    int64_t at_once = trial->at_once, blocks = launch->plan.num_blocks;
    struct deal deal = {.num_blocks = blocks, .step = 1};
    for (int64_t group = 0, rest = trial->heads; rest > 0; group++, rest -= at_once) {
        bool is_down = trial->order == DOWN || (group + (trial->order == UP_AND_DOWN)) % 2 == 0;
        if (is_down && (rest <= blocks / 2 || rest <= at_once)) { /* the last group may be this one */
            struct deal whole = deal;
            deal_group(&whole, costs, trial->row_tiles, rest, true);
            double share = (double)rest / (double)trial->heads;
            double even = evenness(&whole);
            double score = even - cache_loss(trial, at_once, blocks) * (1 - share) -
                           cache_loss(trial, rest, blocks) * share - (trial->order == DOWN ? 0 : ALTERNATING_LOSES);
            if (score > trial->best + CLEARLY) { /* or else as good as equal: the earlier one */
                trial->best = score;
                trial->evenness = even;
                launch->heads_at_once = at_once;
                launch->num_groups = group + 1;
                launch->groups_alternate = trial->order != DOWN;
            }
        }
        deal_group(&deal, costs, trial->row_tiles, at_once, is_down);
    }
}

/* Sets heads_at_once, num_groups, of which the last takes the rest of the heads, and groups_alternate. Returns how even
 * the blocks' loads are; 1 where that is not looked at. */
static double choose_groups(const fc_forward_args *args, const fc_device *device, const fc_kernel *kernel,
                            fc_launch *launch)
{
    int64_t heads = args->batch * args->num_heads_q, row_tiles = fc_divide_up(args->seqlen_q, kernel->block_m);
    int64_t blocks = launch->plan.num_blocks;
    launch->heads_at_once = blocks < 4 ? 1 : blocks / 4;
    if (launch->heads_at_once > heads) launch->heads_at_once = heads;
    launch->num_groups = heads / launch->heads_at_once;
    if (row_tiles > MOST_ROW_TILES || blocks > MOST_BLOCKS || launch->plan.num_tiles > blocks * MOST_ROUNDS) return 1;

    /* 32 bits of a fingerprint, 8 of evenness, one of groups_alternate, 7 of heads_at_once, 16 of num_groups: enough
     * for the tiles that MOST_ROUNDS and MOST_BLOCKS allow. */
    static _Atomic uint64_t memo[MEMO];
    uint64_t print = fingerprint(args, device, kernel->block_m, blocks);
    _Atomic uint64_t *entry = &memo[print % MEMO];
    uint64_t known = atomic_load_explicit(entry, memory_order_relaxed);
    int64_t known_at_once = (int64_t)(known >> 16 & 0x7f), known_groups = (int64_t)(known & 0xffff);
    if (known >> 32 == print >> 32 && known_groups > 0 && known_at_once * (known_groups - 1) < heads) {
        launch->heads_at_once = known_at_once;
        launch->num_groups = known_groups;
        launch->groups_alternate = known >> 23 & 1;
        return (double)(known >> 24 & 0xff) / 255;
    }

    int64_t costs[MOST_ROW_TILES], bytes = 2 * args->seqlen_k * (args->head_dim + args->head_dim_v); /* a kv head's */
    find_costs(args, kernel, row_tiles, costs);
    struct trial trial = {.heads = heads, .row_tiles = row_tiles, .in_cache = heads, .best = -1, .evenness = 1};
    if (bytes > 0) trial.in_cache = device->l2_bytes * 13 / 20 / bytes * (args->num_heads_q / args->num_heads_kv);
    for (trial.order = DOWN; trial.order <= DOWN_AND_UP; trial.order++) {
        double most = trial.order == DOWN ? 1 : 1 - ALTERNATING_LOSES;
        const int64_t tries[] = {blocks / 4, 2 * blocks / 11, blocks / 6, blocks / 8, blocks / 11, blocks / 12};
        for (size_t i = 0; i < sizeof tries / sizeof *tries && trial.best + CLEARLY < most; i++) {
            trial.at_once = tries[i] < 1 ? 1 : tries[i] < heads ? tries[i] : heads;
            try_groups(&trial, costs, launch);
        }
    }
    uint64_t evenness_255 = (uint64_t)(trial.evenness * 255 + 0.5);
    known = print >> 32 << 32 | evenness_255 << 24 | (uint64_t)launch->groups_alternate << 23 |
            (uint64_t)launch->heads_at_once << 16 | (uint64_t)launch->num_groups;
    atomic_store_explicit(entry, known, memory_order_relaxed);
    return (double)evenness_255 / 255;
}

void fc_hopper_group_by_keys(const fc_forward_args *args, fc_launch *launch)
{
    launch->heads_at_once = args->num_heads_q / args->num_heads_kv;
    launch->num_groups = args->batch * args->num_heads_kv;
}

double fc_hopper_mean_keys(const fc_forward_args *args, int64_t block_m, int64_t row_tiles, double *most)
{
    int64_t samples = row_tiles < 8 ? row_tiles : 8; /* tiles, or as many rows from the middle of each eighth */
    double mean = 0;
    *most = 0;
    for (int64_t i = 0; i < samples; i++) {
        int64_t first_row = (row_tiles * (2 * i + 1) - samples) * block_m / (2 * samples);
        double keys = (double)visible_keys(args, first_row, block_m);
        mean += keys / (double)samples;
        if (keys > *most) *most = keys;
    }
    return mean;
}

double fc_hopper_weight(const fc_kernel *kernel)
{
    return kernel->head_dim <= 64 ? 1 : kernel->head_dim <= 128 ? 1.45 : 2.6;
}

/* A row and key of a kernel beside one of 192 x 128 at head_dim 64 or 192 x 64 at 128. Four warpgroups with narrow
 * tiles of keys take 3% more, under a narrow window, of whose keys a block's warpgroups pass what it hides from each,
 * 13% less. Two take 20% more, but at head_dim 128 without attn_mask: there they are level in full calls, and in causal
 * ones ahead up to 1,024 keys and from 4,096 to 8,192; from 1,536 to 3,000 they are 1 to 4% behind, and of very many
 * they read keys again that the L2 cache has lost. To add a bias that differs by row at head_dim 64 takes four
 * warpgroups 20% more than three, and two 23%. */
static double pace(const fc_forward_args *args, const fc_kernel *kernel)
{
    if (kernel->mask == fc_mask_biased && kernel->head_dim <= 64 && fc_mask_rows_differ(args))
        return kernel->block_m > 192 ? 1.2 : kernel->block_m == 192 ? 1 : 1.23;
    if (kernel->block_m > 192) return fc_is_narrow_window(args) ? 0.87 : 1.03;
    if (kernel->block_m == 192 || kernel->head_dim > 128) return 1;
    if (kernel->head_dim <= 64) return 1.2;
    if (kernel->mask == fc_mask_full) return 1.02;
    if (kernel->mask != fc_mask_band || (!fc_is_open_left(args) && !fc_is_open_right(args))) return 1.2;
    bool is_ahead = args->seqlen_k <= 1024 || (args->seqlen_k > 3072 && args->seqlen_k <= 8192);
    return is_ahead ? 0.97 : 1.08;
}

/* Cycles beyond what every call costs: those of the block with the most to do, 0.088 a row and key, where a tile's own
 * cost is that of 256 keys, or of 320 where tiles have 128: fitted to whole calls on an H100, whose first tiles wait
 * for memory and whose blocks end unevenly. What tiles cost beside each other is less (find_costs). */
static double estimate(const fc_forward_args *args, const fc_kernel *kernel, const fc_plan *plan, double evenness)
{
    int64_t row_tiles = plan->num_tiles / (args->batch * args->num_heads_q);
    int64_t rounds = fc_divide_up(plan->num_tiles, plan->num_blocks);
    double own = kernel->block_n == 128 ? 320 : 256, load = (own + (double)args->seqlen_k) * (double)rounds;
    bool is_window = fc_is_narrow_window(args);
    if (!fc_is_open_left(args) || !fc_is_open_right(args)) {
        double most, mean = fc_hopper_mean_keys(args, kernel->block_m, row_tiles, &most);
        /* A narrow window's tiles are alike; others differ, and are dealt as evenly as may be: the 0.088 were fitted
         * to calls that are so to 0.94. */
        double tiles = (double)plan->num_tiles / (double)plan->num_blocks;
        load = (own + mean) * (is_window ? (double)rounds : tiles * fmax(1, 0.94 / evenness));
        if (load < own + most) load = own + most;
    }
    return 1000 + 0.088 * load * kernel->block_m * pace(args, kernel) * fc_hopper_weight(kernel);
}

/* Room for a copy of attn_mask with aligned rows, where rows differ and are not. */
static uint64_t mask_copy_bytes(const fc_forward_args *args)
{
    const fc_tensor *mask = &args->attn_mask;
    if (mask->dtype == FC_NONE || !fc_mask_rows_differ(args) || fc_hopper_maps(mask)) return 0;
    fc_mask_copy copy = fc_mask_copy_of(args);
    return (uint64_t)(copy.batch * copy.heads * args->seqlen_q * copy.row_bytes);
}

double fc_hopper_plan_blocks(const fc_forward_args *args, const fc_kernel *kernel, const fc_device *device,
                             fc_launch *launch)
{
    fc_plan *plan = &launch->plan;
    if (device->num_sms > 0 && plan->num_blocks > device->num_sms) plan->num_blocks = device->num_sms;
    plan->workspace_bytes = mask_copy_bytes(args);
    double evenness = 1;
    if (fc_is_open_left(args) && fc_is_open_right(args))
        fc_hopper_group_by_keys(args, launch);
    else
        evenness = choose_groups(args, device, kernel, launch);
    return estimate(args, kernel, plan, evenness);
}
