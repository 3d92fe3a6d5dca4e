/*
 * forward.cu - attention forward on any GPU from sm_75: any dtype, any head_dim to 256, every option.
 *
 *     query [BLOCK_M, head_dim], key [BLOCK_N, head_dim], value [BLOCK_N, head_dim_v] -> out [BLOCK_M, head_dim_v]
 *
 * All arithmetic is float32 multiply-add on the ordinary cores: exact on every architecture, and the measure
 * for the faster families. One block owns BLOCK_M query rows and walks the keys that their band leaves visible.
 *
 * The products and the threads' shares of them are those of products.cuh; P goes back through shared memory, because a
 * thread holds some keys' probabilities and needs all. The trick is that key and value pass through one buffer, CHUNK
 * elements at a time, which keeps a block inside the 64 KiB of sm_75; the blocks that share a multiprocessor compute
 * while one loads.
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
    union {
        float p[BLOCK_M * P_PITCH];
        kept_bits kept; /* until p is written */
    };
};
static_assert(sizeof(shared_memory) <= 64 * 1024, "sm_75 has 64 KiB of shared memory");

/* Registers a thread wants: its accumulators, and 64 for operands, row state and addresses. */
constexpr int BLOCKS_PER_SM = 65536 / (THREADS * (ROWS * (KEYS + COLUMNS) + 64));

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

struct portable_params {
    fc_forward_args args;
    int64_t num_tiles;
};

static __global__
__launch_bounds__(THREADS, BLOCKS_PER_SM) void FC_NAME(forward_kernel)(const __grid_constant__ portable_params params)
{
    const fc_forward_args &args = params.args;
    shared_memory &smem = *(shared_memory *)dynamic_shared();
    const thread_place place;
    const int lane_x = place.lane_x, first_row = place.first_row;
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
        fc::row_group<LANES_X> rows(threadIdx.x % 32);

        for (int64_t j = first_drawn(args, keys.first); j < keys.end; j += BLOCK_N) {
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
                add_products<K_CHUNK, Q_PITCH, K_PITCH>(s, &smem.query[first_row * Q_PITCH + d],
                                                        &smem.key[lane_x * K_PITCH]);
            }

            fc::scale_scores(s, args);
            fc::mask_scores<T>(s, args, at.batch, at.head, at.row, j, BLOCK_M, BLOCK_N, fragment);
            rows.step(s, out);
            drop(s, smem.kept, args, at.batch, at.head, at.row, j, fragment);

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
                add_weighted<V_CHUNK, P_PITCH, V_PITCH>(out, &smem.p[first_row * P_PITCH], &smem.value[lane_x * 4]);
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
                write_row<T>(fc::row_of<T::element>(args.out, at.batch, at.head, row), args.out.strides[3],
                             args.head_dim_v, out_fours, out[r], row_factor, lane_x);
            }
        }
    }
}

extern "C" int FC_NAME(forward)(const fc_forward_args *args, const fc_launch *launch, void *, void *stream)
{
    return fc::launch<FC_NAME(forward_kernel)>(
        {launch->plan.num_blocks, THREADS, sizeof(shared_memory), sizeof(shared_memory)}, stream,
        portable_params{*args, launch->plan.num_tiles});
}
