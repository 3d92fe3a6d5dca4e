/*
 * backward.cu - the gradients of attention on any GPU from sm_75: any dtype, any head_dim to 256, every option.
 *
 *     prepare    delta = dout . out - dlse, and what turns a row's scores into probabilities: row_facts, in workspace
 *     gradients  dq, dk and dv [BLOCK_M, head_dim]: a block owns rows, or keys, of one and walks all that meet them
 *     dbias      a block owns a tile of dbias and walks all that it sums
 *     dsinks     a block owns an element
 *
 * Nobody adds to what another block owns, and every sum has one order: the bits are the same in each run, and do not
 * depend on which gradients are wanted. All arithmetic is float32 multiply-add on the ordinary cores.
 *
 * The trick is that dq, dk and dv are one computation. What a block owns is a and c, what it walks b, d and x:
 *
 *     dq:  query, dout    key, value, key           s  = a [BLOCK_M][head_dim]   @ b [BLOCK_N][head_dim].T
 *     dk:  key, value     query, dout, query        dp = c [BLOCK_M][head_dim_v] @ d [BLOCK_N][head_dim_v].T
 *     dv:  key            query, -, dout            gradient += w(s, dp) [BLOCK_M][BLOCK_N] @ x [BLOCK_N][HEAD_DIM]
 *
 * with w = p (dv) or p (dp - delta); dropout's factors go to the p of dv and to dp. So dk and dv see a tile of scores
 * transposed, nothing else differs, and a thread has one gradient in its registers; the price is eight products where a
 * kernel with more registers would have five. `a` stays in shared memory, all else passes through one buffer in chunks,
 * which keeps a block inside the 64 KiB of sm_75.
 */
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/mask.cuh"
#include "common/offsets.cuh"
#include "common/ptx.cuh"
#include "common/softmax.cuh"
#include "common/tile.cuh"
#include "common/types.cuh"
#include "common/variant.h"
#include "portable/dropout.cuh"
#include "portable/products.cuh"

using T = fc::FC_DTYPE;

/* One load fills b [BLOCK_N, DEPTH], c and d [.., PAIR_DEPTH] or x [X_ROWS, HEAD_DIM]: 16 KiB. */
constexpr int CHUNK = 4096;
constexpr int DEPTH = CHUNK / BLOCK_N;
constexpr int PAIR_DEPTH = CHUNK / (BLOCK_M + BLOCK_N);
constexpr int X_ROWS = CHUNK / HEAD_DIM;
static_assert(BLOCK_M == BLOCK_N, "rows and keys change places");
static_assert(HEAD_DIM % DEPTH == 0 && HEAD_DIM % PAIR_DEPTH == 0, "chunks fill the tile");
static_assert(BLOCK_N % X_ROWS == 0 && X_ROWS % LANES_X == 0, "chunks fill the tile");

/* Pitches, in floats, of 32 banks. Rows read side by side as float4 need an odd multiple of 4; x is read along the row,
 * and needs none; w is written LANES_X floats per lane row, which must not meet. */
constexpr int A_PITCH = HEAD_DIM + 4;
constexpr int B_PITCH = DEPTH + 4;
constexpr int PAIR_PITCH = PAIR_DEPTH + 4;
constexpr int X_PITCH = HEAD_DIM;
constexpr int W_PITCH = X_ROWS + (LANES_X + 32 - X_ROWS % 32) % 32;
constexpr int SUM_PITCH = BLOCK_N + 1; /* walked along rows and along columns, float by float */

struct shared_memory {
    union {
        float a[BLOCK_M * A_PITCH];
        float sums[BLOCK_M * SUM_PITCH]; /* dbias, once nothing is left to multiply */
    };
    union {
        float b[BLOCK_N * B_PITCH];
        struct {
            float c[BLOCK_M * PAIR_PITCH], d[BLOCK_N * PAIR_PITCH];
        };
        struct {
            float w[BLOCK_M * W_PITCH], x[X_ROWS * X_PITCH];
        };
        kept_bits kept;
    };
};
static_assert(sizeof(shared_memory) <= 64 * 1024, "sm_75 has 64 KiB of shared memory");

/* Beside a gradient of 256 columns, loads that are converted leave registers for four at a time; before Hopper so do
 * float32's beside 128. Measured by ptxas. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool FOUR_OF_FLOAT32 = HEAD_DIM == 128;
#else
constexpr bool FOUR_OF_FLOAT32 = false;
#endif
constexpr int LOADS_IN_FLIGHT = (sizeof(T::element) == 2 ? HEAD_DIM > 128 : FOUR_OF_FLOAT32) ? 4 : 8;

/* Of a row: p = exp(score - base) * inverse. base is +inf for a row that sees no key, and is NaN where lse is none. */
struct alignas(16) row_facts {
    float base, inverse, delta;
};
static_assert(sizeof(row_facts) == FC_PORTABLE_BACKWARD_ROW_BYTES, "the workspace is planned for it");

struct backward_params {
    fc_backward_args args;
    int64_t num_tiles;
    int64_t dq_tiles, dk_tiles; /* gradients_kernel's first ones; the rest are dv's */
    row_facts *facts;           /* [batch][num_heads_q][seqlen_q] */
};

/* Those of one query head's rows. */
static __device__ __forceinline__ row_facts *facts_of(const backward_params &params, int64_t batch, int64_t head)
{
    const fc_forward_args &args = params.args.forward;
    return params.facts + (batch * args.num_heads_q + head) * args.seqlen_q;
}

/* One head of an operand, from a row on. Given its rows' facts, one that sees no key is zeros: it has no part in any
 * sum, NaN though it may be. */
struct matrix {
    const fc_tensor &tensor;
    const T::element *data;
    const row_facts *facts;
    int rows, columns; /* that there are, or 2^30: no tile is so large */
    bool fours;

    __device__ __forceinline__ matrix(const fc_tensor &of, int64_t batch, int64_t head, int64_t row, int64_t seqlen,
                                      int64_t head_dim, const row_facts *row_facts = nullptr)
        : tensor(of), data(fc::row_of<const T::element>(of, batch, head, row)), facts(row_facts),
          rows((int)min(seqlen - row, (int64_t)1 << 30)), columns((int)head_dim),
          fours(fc::rows_of_fours<T>(of, head_dim))
    {
    }

    struct sees_a_key {
        const row_facts *facts;
        __device__ __forceinline__ bool operator()(int row) const { return !facts || facts[row].base != INFINITY; }
    };

    /* A chunk of it, from (row, column) on, to shared memory. */
    template <int ROW_COUNT, int COLUMN_COUNT, int PITCH>
    __device__ __forceinline__ void load(float *chunk_smem, int64_t row, int64_t column) const
    {
        const sees_a_key keep = {facts ? facts + row : nullptr};
        fc::load_tile<T, ROW_COUNT, COLUMN_COUNT, PITCH, THREADS, LOADS_IN_FLIGHT>(
            chunk_smem, data + row * tensor.strides[2] + column * tensor.strides[3], tensor.strides[2],
            tensor.strides[3], rows - row, columns - column, fours, keep);
    }
};

/* s += a @ b.T, where a is in shared memory, or on its way there. */
static __device__ __forceinline__ void multiply_a_b(float (&s)[ROWS][KEYS], shared_memory &smem, const matrix &b,
                                                    const thread_place &place)
{
#pragma unroll 1
    for (int column = 0; column < b.columns; column += DEPTH) {
        __syncthreads(); /* the buffer's last readers are done */
        b.load<BLOCK_N, DEPTH, B_PITCH>(smem.b, 0, column);
        __syncthreads(); /* a and b are there */
        add_products<DEPTH, A_PITCH, B_PITCH>(s, &smem.a[place.first_row * A_PITCH + column],
                                              &smem.b[place.lane_x * B_PITCH]);
    }
}

/* dp += c @ d.T */
static __device__ __forceinline__ void multiply_c_d(float (&dp)[ROWS][KEYS], shared_memory &smem, const matrix &c,
                                                    const matrix &d, const thread_place &place)
{
#pragma unroll 1
    for (int column = 0; column < d.columns; column += PAIR_DEPTH) {
        __syncthreads(); /* the buffer's last readers are done */
        c.load<BLOCK_M, PAIR_DEPTH, PAIR_PITCH>(smem.c, 0, column);
        d.load<BLOCK_N, PAIR_DEPTH, PAIR_PITCH>(smem.d, 0, column);
        __syncthreads(); /* c and d are there */
        add_products<PAIR_DEPTH, PAIR_PITCH, PAIR_PITCH>(dp, &smem.c[place.first_row * PAIR_PITCH],
                                                         &smem.d[place.lane_x * PAIR_PITCH]);
    }
}

/* gradient += w @ x, where w is in registers, a part of each row in each lane, and goes through shared memory. */
static __device__ __forceinline__ void multiply_w_x(float (&gradient)[ROWS][COLUMNS], const float (&w)[ROWS][KEYS],
                                                    shared_memory &smem, const matrix &x, const thread_place &place)
{
#pragma unroll /* so that the registers of w are free once their chunk is written */
    for (int chunk = 0; chunk < BLOCK_N / X_ROWS; chunk++) {
        __syncthreads(); /* the buffer's last readers are done */
#pragma unroll
        for (int c = 0; c < KEYS; c++) {
            const int in_chunk = c * LANES_X - chunk * X_ROWS;
            if (in_chunk < 0 || in_chunk >= X_ROWS) continue;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                smem.w[(place.first_row + r * LANES_Y) * W_PITCH + in_chunk + place.lane_x] = w[r][c];
            }
        }
        x.load<X_ROWS, HEAD_DIM, X_PITCH>(smem.x, chunk * X_ROWS, 0);
        __syncthreads(); /* w and x are there */
        add_weighted<X_ROWS, W_PITCH, X_PITCH>(gradient, &smem.w[place.first_row * W_PITCH], &smem.x[place.lane_x * 4]);
    }
}

enum class target { dq, dk, dv, dbias };
constexpr bool owns_keys(target wanted)
{
    return wanted == target::dk || wanted == target::dv;
}

/* Where a tile of scores lies: its corner is (row, key). */
struct score_tile {
    int64_t batch, head, head_kv, row, key;
};

/* w: 0 in; p out for dv, the scores' gradients for dbias, and what remains of these before softcap for dq and dk, but
 * for the scale. What the block owns is in smem.a, or on its way there. */
template <target TARGET>
static __device__ __forceinline__ void weigh(float (&w)[ROWS][KEYS], shared_memory &smem, const backward_params &params,
                                             const score_tile &at, const thread_place &place)
{
    constexpr bool TRANSPOSED = owns_keys(TARGET), NEEDS_DP = TARGET != target::dv;
    const fc_forward_args &args = params.args.forward;
    const matrix query(args.query, at.batch, at.head, at.row, args.seqlen_q, args.head_dim);
    const matrix key(args.key, at.batch, at.head_kv, at.key, args.seqlen_k, args.head_dim);
    const matrix dout(params.args.dout, at.batch, at.head, at.row, args.seqlen_q, args.head_dim_v);
    const matrix value(args.value, at.batch, at.head_kv, at.key, args.seqlen_k, args.head_dim_v);
    const row_facts *facts = facts_of(params, at.batch, at.head) + at.row;
    const fc::fragment fragment = TRANSPOSED ? fc::fragment{place.lane_x, LANES_X, place.first_row, LANES_Y, true}
                                             : fc::fragment{place.first_row, LANES_Y, place.lane_x, LANES_X, false};
    const int last_row = (int)min((int64_t)BLOCK_M, args.seqlen_q - at.row) - 1;

    multiply_a_b(w, smem, TRANSPOSED ? query : key, place);
    float dp[ROWS][KEYS] = {};
    if (NEEDS_DP) {
        multiply_c_d(dp, smem, TRANSPOSED ? value : dout, TRANSPOSED ? dout : value, place);
        drop(dp, smem.kept, args, at.batch, at.head, at.row, at.key, fragment);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < KEYS; c++) dp[r][c] -= facts[min(fragment.row_at(r, c), last_row)].delta;
        }
    }

    fc::scale_scores(w, args, TARGET == target::dq || TARGET == target::dk ? dp : nullptr);
    fc::mask_scores<T>(w, args, at.batch, at.head, at.row, at.key, BLOCK_M, BLOCK_N, fragment);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < KEYS; c++) {
            const row_facts &row = facts[min(fragment.row_at(r, c), last_row)];
            const bool hidden = w[r][c] == -INFINITY || row.base == INFINITY; /* then dp may be NaN */
            const float p = fc::exp_minus(w[r][c], row.base) * row.inverse;
            w[r][c] = hidden ? 0.0f : NEEDS_DP ? p * dp[r][c] : p;
        }
    }
    if (!NEEDS_DP) drop(w, smem.kept, args, at.batch, at.head, at.row, at.key, fragment);
}

/* What a block owns, and the query heads that meet it. */
struct owned_tile {
    int64_t batch, head_kv, first_head, end_head, first;
};

template <target TARGET>
static __device__ __forceinline__ owned_tile locate_owned(const fc_forward_args &args, int64_t tile)
{
    if (!owns_keys(TARGET)) {
        const fc::tile_position at = fc::locate_tile(args, tile, BLOCK_M);
        return {at.batch, at.head_kv, at.head, at.head + 1, at.row};
    }
    /* Keys count up: under a causal mask the long tiles start first. */
    const int64_t group = args.num_heads_q / args.num_heads_kv;
    const int64_t key_tiles = (args.seqlen_k + BLOCK_M - 1) / BLOCK_M;
    const int64_t key_tile = tile % key_tiles;
    tile /= key_tiles;
    const int64_t head_kv = tile % args.num_heads_kv;
    return {tile / args.num_heads_kv, head_kv, head_kv * group, (head_kv + 1) * group, key_tile * BLOCK_M};
}

/* As many as registers and shared memory (of sm_90, which has the most, a block costs one more KiB) allow. A thread
 * wants registers for its sums, and 64 for operands, facts and addresses. */
constexpr int blocks_per_sm(int sums)
{
    const int by_registers = 65536 / (THREADS * (sums + 64)),
              by_memory = FC_HOPPER_SM_SMEM_BYTES / (sizeof(shared_memory) + 1024);
    return by_registers < by_memory ? by_registers : by_memory;
}
constexpr int SCORES = ROWS * KEYS;

/* The gradient of what tile `tile` of TARGET's owns. */
template <target TARGET>
static __device__ __forceinline__ void compute_gradient(const backward_params &params, shared_memory &smem,
                                                        int64_t tile, const thread_place &place)
{
    constexpr bool OWNS_KEYS = owns_keys(TARGET);
    const fc_forward_args &args = params.args.forward;
    const fc_tensor &result = TARGET == target::dq   ? params.args.dq
                              : TARGET == target::dk ? params.args.dk
                                                     : params.args.dv;
    const int64_t columns = TARGET == target::dv ? args.head_dim_v : args.head_dim;
    const bool fours = fc::rows_of_fours<T>(result, columns);
    const float factor = TARGET == target::dv ? 1.0f : (float)args.scale;

    const owned_tile own = locate_owned<TARGET>(args, tile);
    const int64_t own_head = OWNS_KEYS ? own.head_kv : own.first_head;
    const int64_t own_seqlen = OWNS_KEYS ? args.seqlen_k : args.seqlen_q;
    const matrix a(OWNS_KEYS ? args.key : args.query, own.batch, own_head, own.first, own_seqlen, args.head_dim);
    a.load<BLOCK_M, HEAD_DIM, A_PITCH>(smem.a, 0, 0);

    float gradient[ROWS][COLUMNS] = {};
    for (int64_t head = own.first_head; head < own.end_head; head++) {
        const row_facts *facts = facts_of(params, own.batch, head);
        const fc::key_range keys(args, own.first, BLOCK_M);
        const fc::row_range rows(args, own.first, BLOCK_M);
        const int64_t end = OWNS_KEYS ? rows.end : keys.end;
        int64_t walked = OWNS_KEYS ? rows.first : first_drawn(args, keys.first);
        for (; walked < end; walked += BLOCK_N) {
            const score_tile at = {own.batch, head, own.head_kv, OWNS_KEYS ? walked : own.first,
                                   OWNS_KEYS ? own.first : walked};
            float w[ROWS][KEYS] = {};
            weigh<TARGET>(w, smem, params, at, place);
            const matrix x = TARGET == target::dq
                                 ? matrix(args.key, at.batch, at.head_kv, at.key, args.seqlen_k, columns)
                                 : matrix(TARGET == target::dk ? args.query : params.args.dout, at.batch, at.head,
                                          at.row, args.seqlen_q, columns, facts + at.row);
            multiply_w_x(gradient, w, smem, x, place);
        }
    }

    const row_facts *facts = facts_of(params, own.batch, own.first_head);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int64_t row = own.first + place.first_row + r * LANES_Y;
        if (row >= own_seqlen) continue;
        if (!OWNS_KEYS && facts[row].base == INFINITY) { /* it sees no key, though its dq may be 0 * NaN */
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) gradient[r][c] = 0;
        }
        write_row<T>(fc::row_of<T::element>(result, own.batch, own_head, row), result.strides[3], columns, fours,
                     gradient[r], factor, place.lane_x);
    }
}

/* All three in one launch: a small problem's tiles run side by side, and the host's time is spent once. */
static __global__ __launch_bounds__(THREADS, blocks_per_sm(2 * SCORES + ROWS * COLUMNS)) void FC_NAME(gradients_kernel)(
    const __grid_constant__ backward_params params)
{
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    const thread_place place;
    for (int64_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        if (tile < params.dq_tiles)
            compute_gradient<target::dq>(params, smem, tile, place);
        else if (tile < params.dq_tiles + params.dk_tiles)
            compute_gradient<target::dk>(params, smem, tile - params.dq_tiles, place);
        else
            compute_gradient<target::dv>(params, smem, tile - params.dq_tiles - params.dk_tiles, place);
    }
}

/* The size of what dbias stores along a dimension: where it sums, 1. */
static __host__ __device__ int64_t stored(const fc_tensor &gradient, int dimension, int64_t size)
{
    return gradient.strides[dimension] == 0 ? 1 : size;
}
static __host__ __device__ int64_t divide_up(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

/* Indices along a dimension. */
struct span {
    int64_t first, end;

    /* All of them where a gradient sums, else `count` from `first` on. */
    __device__ __forceinline__ span(const fc_tensor &gradient, int dimension, int64_t size, int64_t first_of_some,
                                    int64_t count)
        : first(first_of_some), end(min(size, first_of_some + count))
    {
        if (gradient.strides[dimension] == 0) first = 0, end = size;
    }
};

static __device__ __forceinline__ void write_value(const fc_tensor &tensor, int64_t offset, float x)
{
    if (tensor.dtype == FC_FLOAT32)
        ((float *)tensor.data)[offset] = x;
    else
        ((T::element *)tensor.data)[offset] = T::from_float(x);
}

static __global__
__launch_bounds__(THREADS,
                  blocks_per_sm(4 * SCORES)) void FC_NAME(dbias_kernel)(const __grid_constant__ backward_params params)
{
    const fc_forward_args &args = params.args.forward;
    const fc_tensor &dbias = params.args.dbias;
    const int64_t row_tiles = divide_up(stored(dbias, 2, args.seqlen_q), BLOCK_M);
    const int64_t key_tiles = divide_up(stored(dbias, 3, args.seqlen_k), BLOCK_N);
    const int64_t stored_heads = stored(dbias, 1, args.num_heads_q);
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    const thread_place place;

    for (int64_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        const span keys(dbias, 3, args.seqlen_k, tile % key_tiles * BLOCK_N, BLOCK_N);
        const span rows(dbias, 2, args.seqlen_q, tile / key_tiles % row_tiles * BLOCK_M, BLOCK_M);
        const span heads(dbias, 1, args.num_heads_q, tile / key_tiles / row_tiles % stored_heads, 1);
        const span batches(dbias, 0, args.batch, tile / key_tiles / row_tiles / stored_heads, 1);

        float sum[ROWS][KEYS] = {};
        for (int64_t batch = batches.first; batch < batches.end; batch++) {
            for (int64_t head = heads.first; head < heads.end; head++) {
                const int64_t head_kv = head / (args.num_heads_q / args.num_heads_kv);
                for (int64_t row = rows.first; row < rows.end; row += BLOCK_M) {
                    const fc::key_range seen(args, row, BLOCK_M);
                    for (int64_t key = keys.first; key < keys.end; key += BLOCK_N) {
                        if (key >= seen.end || key + BLOCK_N <= seen.first) continue;
                        const matrix a(args.query, batch, head, row, args.seqlen_q, args.head_dim);
                        float ds[ROWS][KEYS] = {};
                        a.load<BLOCK_M, HEAD_DIM, A_PITCH>(smem.a, 0, 0);
                        weigh<target::dbias>(ds, smem, params, {batch, head, head_kv, row, key}, place);
#pragma unroll
                        for (int r = 0; r < ROWS; r++) {
#pragma unroll
                            for (int c = 0; c < KEYS; c++) sum[r][c] += ds[r][c];
                        }
                    }
                }
            }
        }

        /* The tile's own rows and keys are added up last, by one thread for each element that is stored. a was last
         * read before the barriers that c and d wait for. */
        const bool sums_rows = dbias.strides[2] == 0, sums_keys = dbias.strides[3] == 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                smem.sums[(place.first_row + r * LANES_Y) * SUM_PITCH + place.lane_x + c * LANES_X] = sum[r][c];
            }
        }
        __syncthreads(); /* the sums are there */
        const int64_t corner =
            fc::row_offset(dbias, batches.first, heads.first, rows.first) + keys.first * dbias.strides[3];
        const int stored_rows = sums_rows ? 1 : (int)(rows.end - rows.first);
        const int stored_keys = sums_keys ? 1 : (int)(keys.end - keys.first);
        for (int index = threadIdx.x; index < stored_rows * stored_keys; index += THREADS) {
            const int row = index / stored_keys, key = index % stored_keys;
            float total = 0;
            for (int i = row; i < (sums_rows ? BLOCK_M : row + 1); i++) {
                for (int j = key; j < (sums_keys ? BLOCK_N : key + 1); j++) total += smem.sums[i * SUM_PITCH + j];
            }
            write_value(dbias, corner + row * dbias.strides[2] + key * dbias.strides[3], total);
        }
        __syncthreads(); /* the sums have been read: a may come */
    }
}

/* Each element's threads take rows in turn, and their sums meet as a tree. */
static __global__ __launch_bounds__(THREADS) void FC_NAME(dsinks_kernel)(const __grid_constant__ backward_params params)
{
    const fc_forward_args &args = params.args.forward;
    const fc_tensor &dsinks = params.args.dsinks;
    const int64_t stored_heads = stored(dsinks, 1, args.num_heads_q);
    float *sums = (float *)dynamic_shared();

    for (int64_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        const span heads(dsinks, 1, args.num_heads_q, tile % stored_heads, 1);
        const span batches(dsinks, 0, args.batch, tile / stored_heads, 1);
        float sum = 0;
        for (int64_t batch = batches.first; batch < batches.end; batch++) {
            for (int64_t head = heads.first; head < heads.end; head++) {
                const float sink = fc::head_value<T>(args.sinks, batch, head);
                const row_facts *facts = facts_of(params, batch, head);
                for (int64_t row = threadIdx.x; row < args.seqlen_q; row += THREADS)
                    sum -= fc::exp_minus(sink, facts[row].base) * facts[row].inverse * facts[row].delta;
            }
        }
        sums[threadIdx.x] = sum;
        for (int half = THREADS / 2; half > 0; half /= 2) {
            __syncthreads(); /* the upper half's sums are there */
            if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        }
        if (threadIdx.x == 0) write_value(dsinks, fc::row_offset(dsinks, batches.first, heads.first, 0), sums[0]);
        __syncthreads(); /* thread 0 has read the sum */
    }
}

/*
 * lse is a sum of two numbers, max + log(sum), and where the first is large the second is lost in rounding: under a
 * mask of finfo.min, exp(score - lse) is 1 for each of n equal keys and not 1/n. Up to 1024 an lse is rounded by 2^-15
 * at most, and so is p, relatively; above it both numbers are found again.
 */
static __device__ __forceinline__ bool is_coarse(float lse)
{
    return fabsf(lse) > 1024 && fabsf(lse) < INFINITY;
}

/* The online softmax of the forward, without its out, for the coarse rows of a tile. */
static __device__ void count_again(const backward_params &params, shared_memory &smem, const fc::tile_position &at,
                                   row_facts *facts)
{
    const fc_forward_args &args = params.args.forward;
    const thread_place place;
    const fc::fragment fragment = {place.first_row, LANES_Y, place.lane_x, LANES_X};
    fc::row_group<LANES_X> rows(threadIdx.x % 32);
    if (args.sinks.dtype != FC_NONE) {
        rows.max = fc::head_value<T>(args.sinks, at.batch, at.head);
        rows.sum = rows.max == -INFINITY ? 0 : 1;
    }
    const matrix query(args.query, at.batch, at.head, at.row, args.seqlen_q, args.head_dim);
    query.load<BLOCK_M, HEAD_DIM, A_PITCH>(smem.a, 0, 0);
    const fc::key_range keys(args, at.row, BLOCK_M);
    for (int64_t j = keys.first; j < keys.end; j += BLOCK_N) {
        float s[ROWS][KEYS] = {}, no_out[ROWS][1] = {};
        multiply_a_b(s, smem, matrix(args.key, at.batch, at.head_kv, j, args.seqlen_k, args.head_dim), place);
        fc::scale_scores(s, args);
        fc::mask_scores<T>(s, args, at.batch, at.head, at.row, j, BLOCK_M, BLOCK_N, fragment);
        rows.step(s, no_out);
    }
    /* Lane r of a group has row r. */
    const int row = place.first_row + place.lane_x * LANES_Y;
    if (place.lane_x < ROWS && at.row + row < args.seqlen_q && is_coarse(facts[row].base) && rows.sum != 0) {
        facts[row].base = rows.max;
        facts[row].inverse = 1 / rows.sum;
    }
}

/* A warp takes a row at a time. */
static __global__ __launch_bounds__(THREADS, blocks_per_sm(3 * SCORES)) void FC_NAME(prepare_kernel)(
    const __grid_constant__ backward_params params)
{
    const fc_forward_args &args = params.args.forward;
    const fc_tensor &dout = params.args.dout, &dlse = params.args.dlse;
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int64_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        const fc::tile_position at = fc::locate_tile(args, tile, BLOCK_M);
        row_facts *facts = facts_of(params, at.batch, at.head) + at.row;
        bool any_coarse = false;
        for (int r = warp; r < BLOCK_M && at.row + r < args.seqlen_q; r += THREADS / 32) {
            const float lse = *fc::row_of<const float>(args.lse, at.batch, at.head, at.row + r);
            row_facts row = {lse == -INFINITY ? INFINITY : lse == INFINITY ? NAN : lse, 1, 0};
            if (lse != -INFINITY) { /* else delta is 0, whatever dout holds */
                const T::element *a = fc::row_of<const T::element>(args.out, at.batch, at.head, at.row + r);
                const T::element *b = fc::row_of<const T::element>(dout, at.batch, at.head, at.row + r);
                for (int64_t column = lane; column < args.head_dim_v; column += 32)
                    row.delta +=
                        T::to_float(a[column * args.out.strides[3]]) * T::to_float(b[column * dout.strides[3]]);
#pragma unroll
                for (int bit = 16; bit > 0; bit /= 2) row.delta += __shfl_xor_sync(0xffffffffu, row.delta, bit);
                if (dlse.dtype != FC_NONE) row.delta -= *fc::row_of<const float>(dlse, at.batch, at.head, at.row + r);
            }
            if (lane == 0) facts[r] = row;
            any_coarse |= is_coarse(lse);
        }
        /* The barrier also sees to it that the facts are there. */
        if (__syncthreads_or(any_coarse)) count_again(params, smem, at, facts);
    }
}

template <auto KERNEL>
static cudaError_t launch(backward_params params, int64_t num_tiles, const fc_plan *plan, void *stream)
{
    if (num_tiles == 0) return cudaSuccess;
    params.num_tiles = num_tiles;
    const int64_t blocks = num_tiles < plan->num_blocks ? num_tiles : plan->num_blocks;
    return fc::launch<KERNEL>({blocks, THREADS, sizeof(shared_memory), sizeof(shared_memory)}, stream, params);
}

extern "C" int FC_NAME(backward)(const fc_backward_args *args, const fc_plan *plan, void *workspace, void *stream)
{
    const fc_forward_args &f = args->forward;
    const int64_t row_tiles = f.batch * f.num_heads_q * divide_up(f.seqlen_q, BLOCK_M);
    const int64_t key_tiles = f.batch * f.num_heads_kv * divide_up(f.seqlen_k, BLOCK_M);
    const int64_t dq_tiles = args->dq.dtype != FC_NONE ? row_tiles : 0;
    const int64_t dk_tiles = args->dk.dtype != FC_NONE ? key_tiles : 0;
    const int64_t dv_tiles = args->dv.dtype != FC_NONE ? key_tiles : 0;
    const int64_t dbias_tiles = stored(args->dbias, 0, f.batch) * stored(args->dbias, 1, f.num_heads_q) *
                                divide_up(stored(args->dbias, 2, f.seqlen_q), BLOCK_M) *
                                divide_up(stored(args->dbias, 3, f.seqlen_k), BLOCK_N);
    const int64_t sinks = stored(args->dsinks, 0, f.batch) * stored(args->dsinks, 1, f.num_heads_q);

    const backward_params params = {*args, 0, dq_tiles, dk_tiles, (row_facts *)workspace};
    cudaError_t error = launch<FC_NAME(prepare_kernel)>(params, row_tiles, plan, stream);
    if (error == cudaSuccess)
        error = launch<FC_NAME(gradients_kernel)>(params, dq_tiles + dk_tiles + dv_tiles, plan, stream);
    if (error == cudaSuccess && args->dbias.dtype != FC_NONE)
        error = launch<FC_NAME(dbias_kernel)>(params, dbias_tiles, plan, stream);
    if (error == cudaSuccess && args->dsinks.dtype != FC_NONE)
        error = launch<FC_NAME(dsinks_kernel)>(params, sinks, plan, stream);
    return error;
}
