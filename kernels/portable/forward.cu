/*
 * forward.cu - attention forward on any GPU from sm_75: any dtype, any head_dim to 256, every option.
 *
 *     query [BLOCK_M, head_dim], key [BLOCK_N, head_dim], value [BLOCK_N, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * All arithmetic is float32 multiply-add on the ordinary cores: exact on every architecture, and the measure
 * for the faster families. One block owns BLOCK_M query rows and walks the keys that their band leaves visible.
 *
 * The trick is to keep the multiply-add units fed from shared memory. A thread computes 8 rows of S and of out in
 * registers; LANES_X neighbouring lanes share those rows and split the keys (of S) and the columns (of
 * out). Both products read both operands as float4, along the contiguous axis, so no tile is ever
 * transposed; P goes back through shared memory, because a thread holds some keys' probabilities and needs all.
 * Key and value pass through one buffer, CHUNK elements at a time, which keeps a block inside the 64 KiB of
 * sm_75; the blocks that share a multiprocessor compute while one loads.
 */
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/mask.cuh"
#include "common/offsets.cuh"
#include "common/softmax.cuh"
#include "common/tile.cuh"
#include "common/types.cuh"
#include "common/variant.h"

using T = fc::FC_DTYPE;

/*
 * A warp is 32 / LANES_X rows of lanes by LANES_X lanes. Lane bit 0 selects the row, the next ones the column
 * (and bit 4 another row where LANES_X is 8): a 16-byte shared load is served in two passes of 16
 * lanes when lanes that differ in bit 0, or in bit 1, read the same address, and this order gives both
 * operands that: bit 0 does not change the key, bit 1 does not change the row.
 */
constexpr int ROWS = 8;
constexpr int LANES_X = THREADS * ROWS / BLOCK_M;
constexpr int LANES_Y = 32 / LANES_X;
constexpr int KEYS = BLOCK_N / LANES_X;
constexpr int COLUMNS = HEAD_DIM / LANES_X;
static_assert(LANES_X == 8 || LANES_X == 16, "a row of the tile is 8 or 16 lanes of one warp");
static_assert(BLOCK_N % LANES_X == 0 && HEAD_DIM % (4 * LANES_X) == 0, "a thread's columns are groups of four");

/* One load fills key [BLOCK_N, K_CHUNK] or value [V_CHUNK, HEAD_DIM]: 16 KiB. */
constexpr int CHUNK = 4096;
constexpr int K_CHUNK = CHUNK / BLOCK_N;
constexpr int V_CHUNK = CHUNK / HEAD_DIM;
static_assert(HEAD_DIM % K_CHUNK == 0 && BLOCK_N % V_CHUNK == 0 && V_CHUNK % LANES_X == 0, "chunks fill the tile");

/* Pitches, in floats, of 32 banks. Rows read side by side as float4 need an odd multiple of 4; value is
 * read along the row, and needs none; P is written LANES_X floats per lane row, which must not meet. */
constexpr int Q_PITCH = HEAD_DIM + 4;
constexpr int K_PITCH = K_CHUNK + 4;
constexpr int V_PITCH = HEAD_DIM;
constexpr int P_PITCH = V_CHUNK + (LANES_X + 32 - V_CHUNK % 32) % 32;

struct shared_memory {
    float query[BLOCK_M * Q_PITCH];
    union {
        float key[BLOCK_N * K_PITCH];
        float value[V_CHUNK * V_PITCH];
    };
    float p[BLOCK_M * P_PITCH];
};
static_assert(sizeof(shared_memory) <= 64 * 1024, "sm_75 has 64 KiB of shared memory");

/* Registers a thread wants: its accumulators, and 64 for operands, row state and addresses. */
constexpr int BLOCKS_PER_SM = 65536 / (THREADS * (ROWS * (KEYS + COLUMNS) + 64));

/* s += query @ key.T over one chunk of head_dim. query_smem and key_smem: this thread's first row and key. */
static __device__ __forceinline__ void multiply_q_k(float (&s)[ROWS][KEYS], const float *query_smem,
                                                    const float *key_smem)
{
#pragma unroll 1 /* the other warps hide the latency; more in flight would spill */
    for (int d = 0; d < K_CHUNK; d += 4) {
        float4 k[KEYS];
#pragma unroll
        for (int c = 0; c < KEYS; c++) k[c] = *(const float4 *)&key_smem[c * LANES_X * K_PITCH + d];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 q = *(const float4 *)&query_smem[r * LANES_Y * Q_PITCH + d];
#pragma unroll
            for (int c = 0; c < KEYS; c++) {
                s[r][c] += q.x * k[c].x;
                s[r][c] += q.y * k[c].y;
                s[r][c] += q.z * k[c].z;
                s[r][c] += q.w * k[c].w;
            }
        }
    }
}

/* out += p @ value over one chunk of keys. p_smem and value_smem: this thread's first row and column. */
static __device__ __forceinline__ void multiply_p_v(float (&out)[ROWS][COLUMNS], const float *p_smem,
                                                    const float *value_smem)
{
#pragma unroll 1
    for (int j = 0; j < V_CHUNK; j += 4) {
        float4 v[4][COLUMNS / 4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int c = 0; c < COLUMNS / 4; c++) {
                v[n][c] = *(const float4 *)&value_smem[(j + n) * V_PITCH + c * 4 * LANES_X];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 p = *(const float4 *)&p_smem[r * LANES_Y * P_PITCH + j];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float p_n = n == 0 ? p.x : n == 1 ? p.y : n == 2 ? p.z : p.w;
#pragma unroll
                for (int c = 0; c < COLUMNS / 4; c++) {
                    out[r][4 * c + 0] += p_n * v[n][c].x;
                    out[r][4 * c + 1] += p_n * v[n][c].y;
                    out[r][4 * c + 2] += p_n * v[n][c].z;
                    out[r][4 * c + 3] += p_n * v[n][c].w;
                }
            }
        }
    }
}

/* Adds the sink to one row's sum, writes its lse, and gives the factor that out still lacks: 0 for a row
 * that saw no key. */
static __device__ __forceinline__ float finish_row(float row_max, float row_sum, const fc_forward_args &args,
                                                   const fc::tile_position &at, int64_t row)
{
    float shrink = 1;
    if (args.sinks.dtype != FC_NONE) {
        const float sink = fc::head_value<T>(args.sinks, at.batch, at.head);
        const float new_max = fmaxf(row_max, sink);
        shrink = fc::exp_minus(row_max, new_max);
        row_sum = row_sum * shrink + fc::exp_minus(sink, new_max);
        row_max = new_max;
    }
    if (args.lse.dtype != FC_NONE) *fc::row_of<float>(args.lse, at.batch, at.head, row) = row_max + logf(row_sum);
    return row_sum == 0 ? 0.0f : shrink / row_sum;
}

/* This thread's columns of one row of out. out_gmem: the row's first element. */
static __device__ __forceinline__ void write_row(T::element *out_gmem, int64_t column_stride, int64_t head_dim_v,
                                                 bool fours, const float (&out)[COLUMNS], float factor, int lane_x)
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 4) {
        const int column = c * LANES_X + lane_x * 4;
        fc::four<T> x;
#pragma unroll
        for (int n = 0; n < 4; n++) x.x[n] = T::from_float(out[c + n] * factor);
        if (fours) {
            if (column < head_dim_v) *(fc::four<T> *)(out_gmem + column) = x;
        } else {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                if (column + n < head_dim_v) out_gmem[(column + n) * column_stride] = x.x[n];
            }
        }
    }
}

struct portable_params {
    fc_forward_args args;
    int64_t num_tiles;
};

extern __shared__ float4 dynamic_smem[];

static __global__
__launch_bounds__(THREADS, BLOCKS_PER_SM) void FC_NAME(forward_kernel)(const __grid_constant__ portable_params params)
{
    const fc_forward_args &args = params.args;
    shared_memory &smem = *(shared_memory *)dynamic_smem;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int lane_x = lane / 2 % LANES_X;
    const int lane_y = lane % 2 + lane / (2 * LANES_X) * 2;
    const int first_row = warp * LANES_Y * ROWS + lane_y;
    const fc::fragment fragment = {first_row, LANES_Y, lane_x, LANES_X};

    const bool query_fours = fc::rows_of_fours<T>(args.query, args.head_dim);
    const bool key_fours = fc::rows_of_fours<T>(args.key, args.head_dim);
    const bool value_fours = fc::rows_of_fours<T>(args.value, args.head_dim_v);
    const bool out_fours = fc::rows_of_fours<T>(args.out, args.head_dim_v);

    for (int64_t tile = blockIdx.x; tile < params.num_tiles; tile += gridDim.x) {
        const fc::tile_position at = fc::locate_tile(args, tile, BLOCK_M);
        const fc::key_range keys(args, at.row, BLOCK_M);

        fc::load_tile<T, BLOCK_M, HEAD_DIM, Q_PITCH, THREADS>(
            smem.query, fc::row_of<const T::element>(args.query, at.batch, at.head, at.row), args.query.strides[2],
            args.query.strides[3], args.seqlen_q - at.row, args.head_dim, query_fours);

        float out[ROWS][COLUMNS] = {};
        fc::row_group<LANES_X> rows(lane);

        for (int64_t j = keys.first; j < keys.end; j += BLOCK_N) {
            const T::element *key = fc::row_of<const T::element>(args.key, at.batch, at.head_kv, j);
            const T::element *value = fc::row_of<const T::element>(args.value, at.batch, at.head_kv, j);

            float s[ROWS][KEYS] = {};
#pragma unroll 1
            for (int d = 0; d < args.head_dim; d += K_CHUNK) {
                __syncthreads(); /* the buffer's last readers are done */
                fc::load_tile<T, BLOCK_N, K_CHUNK, K_PITCH, THREADS>(smem.key, key + d * args.key.strides[3],
                                                                     args.key.strides[2], args.key.strides[3],
                                                                     args.seqlen_k - j, args.head_dim - d, key_fours);
                __syncthreads(); /* query and key are there */
                multiply_q_k(s, &smem.query[first_row * Q_PITCH + d], &smem.key[lane_x * K_PITCH]);
            }

            fc::finish_scores<T>(s, args, at.batch, at.head, at.row, j, BLOCK_M, BLOCK_N, fragment);
            rows.step(s, out);

#pragma unroll /* so that the registers of s are free once their chunk is written */
            for (int chunk = 0; chunk < BLOCK_N / V_CHUNK; chunk++) {
                __syncthreads(); /* the last readers of the buffer and of p are done */
                fc::load_tile<T, V_CHUNK, HEAD_DIM, V_PITCH, THREADS>(
                    smem.value, value + chunk * V_CHUNK * args.value.strides[2], args.value.strides[2],
                    args.value.strides[3], args.seqlen_k - j - chunk * V_CHUNK, args.head_dim_v, value_fours);
#pragma unroll
                for (int c = 0; c < KEYS; c++) {
                    const int in_chunk = c * LANES_X - chunk * V_CHUNK;
                    if (in_chunk < 0 || in_chunk >= V_CHUNK) continue;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        smem.p[(first_row + r * LANES_Y) * P_PITCH + in_chunk + lane_x] = s[r][c];
                    }
                }
                __syncthreads(); /* p and value are there */
                multiply_p_v(out, &smem.p[first_row * P_PITCH], &smem.value[lane_x * 4]);
            }
        }

        /* Lane r finishes row r; then all lanes of the group write it. */
        const int64_t own_row = at.row + first_row + lane_x * LANES_Y;
        float factor = 0;
        if (lane_x < ROWS && own_row < args.seqlen_q) factor = finish_row(rows.max, rows.sum, args, at, own_row);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int64_t row = at.row + first_row + r * LANES_Y;
            const float row_factor = rows.from_lane(factor, r);
            if (rows.from_lane(rows.sum, r) == 0) { /* the row saw no key, though its out may be 0 * NaN */
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) out[r][c] = 0;
            }
            if (row < args.seqlen_q) {
                write_row(fc::row_of<T::element>(args.out, at.batch, at.head, row), args.out.strides[3],
                          args.head_dim_v, out_fours, out[r], row_factor, lane_x);
            }
        }
    }
}

extern "C" int FC_NAME(forward)(const fc_forward_args *args, const fc_plan *plan, void *, void *stream)
{
    return fc::launch<FC_NAME(forward_kernel)>(plan->num_blocks, THREADS, sizeof(shared_memory), stream,
                                               portable_params{*args, plan->grid});
}
