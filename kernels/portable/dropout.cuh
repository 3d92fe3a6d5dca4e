/*
 * dropout.cuh - dropout of a tile of weights, or of their gradients, wherever the threads hold them.
 *
 * The trick: which rows and keys a thread holds suits the products, and one draw serves four keys of one row. So the
 * block draws for the tile, each word once, and leaves a bit for each weight in shared memory.
 */
#ifndef FC_PORTABLE_DROPOUT_CUH
#define FC_PORTABLE_DROPOUT_CUH

#include "common/dropout.h"
#include "common/mask.cuh"
#include "common/variant.h"

static_assert(BLOCK_N <= FC_DRAW_COLUMNS && BLOCK_N % FC_DRAW_LANES == 0, "a draw covers a row of the tile");

/* Bit n of [row * FC_DRAW_LANES + lane]: is key lane + n * FC_DRAW_LANES of the tile kept? */
typedef uint8_t kept_bits[BLOCK_M * FC_DRAW_LANES];

/* Where a walk over keys begins, so that each tile is one draw wide. */
static __device__ __forceinline__ int64_t first_drawn(const fc_forward_args &args, int64_t first)
{
    return args.keep_scale != 0 ? first / FC_DRAW_COLUMNS * FC_DRAW_COLUMNS : first;
}

/* x *= dropout's factors, where there is dropout. (i, j): the tile's corner. */
template <int ROWS, int KEYS>
static __device__ __forceinline__ void drop(float (&x)[ROWS][KEYS], kept_bits &kept_smem, const fc_forward_args &args,
                                            int64_t batch, int64_t head, int64_t i, int64_t j, const fc::fragment &at)
{
    if (args.keep_scale == 0) return;
    const fc_random key = fc_draw_key(&args, batch, head);
    const int64_t first = j / FC_DRAW_COLUMNS * FC_DRAW_COLUMNS;
    __syncthreads(); /* the memory's last readers are done */
#pragma unroll 1
    for (int index = threadIdx.x; index < BLOCK_M * FC_DRAW_LANES; index += THREADS) {
        const fc_random random =
            fc_draw(key.word[0], key.word[1], i + index / FC_DRAW_LANES, first, index % FC_DRAW_LANES);
        unsigned bits = 0;
#pragma unroll
        for (int n = 0; n < FC_DRAW_WORDS; n++) bits |= (unsigned)(random.word[n] < args.keep_below) << n;
        kept_smem[index] = (uint8_t)(bits >> (j - first) / FC_DRAW_LANES);
    }
    __syncthreads(); /* the bits are there */
    const float scale = (float)args.keep_scale;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < KEYS; c++) {
            const int key_in_tile = at.key_at(r, c);
            const unsigned bits = kept_smem[at.row_at(r, c) * FC_DRAW_LANES + key_in_tile % FC_DRAW_LANES];
            x[r][c] *= bits >> key_in_tile / FC_DRAW_LANES & 1 ? scale : 0.0f;
        }
    }
}

#endif /* FC_PORTABLE_DROPOUT_CUH */
