/*
 * products.cuh - the two products of attention on the ordinary cores: tiles in shared memory, sums in registers.
 *
 *     add_products   s[BLOCK_M][n]            += a [BLOCK_M][depth] @ b [n][depth].T
 *     add_weighted   out[BLOCK_M][HEAD_DIM]   += w [BLOCK_M][n] @ x [n][HEAD_DIM]
 *
 * The trick is to keep the multiply-add units fed from shared memory. A thread computes ROWS rows of both results;
 * LANES_X neighbouring lanes share those rows and split the columns. Both products read both operands as float4, along
 * the contiguous axis, so no tile is ever transposed.
 *
 * A warp is 32 / LANES_X rows of lanes by LANES_X lanes. Lane bit 0 selects the row, the next ones the column
 * (and bit 4 another row where LANES_X is 8): a 16-byte shared load is served in two passes of 16
 * lanes when lanes that differ in bit 0, or in bit 1, read the same address, and this order gives both
 * operands that: bit 0 does not change the column, bit 1 does not change the row.
 */
#ifndef FC_PORTABLE_PRODUCTS_CUH
#define FC_PORTABLE_PRODUCTS_CUH

#include <stdint.h>

#include "common/types.cuh"
#include "common/variant.h"

constexpr int ROWS = 8;
constexpr int LANES_X = THREADS * ROWS / BLOCK_M;
constexpr int LANES_Y = 32 / LANES_X;
constexpr int KEYS = BLOCK_N / LANES_X;
constexpr int COLUMNS = HEAD_DIM / LANES_X;
static_assert(LANES_X == 8 || LANES_X == 16, "a row of the tile is 8 or 16 lanes of one warp");
static_assert(BLOCK_N % LANES_X == 0 && HEAD_DIM % (4 * LANES_X) == 0, "a thread's columns are groups of four");

/* This thread's part: rows first_row + r * LANES_Y; columns lane_x + c * LANES_X of s, and of out groups of four,
 * 4 * (lane_x + c * LANES_X). */
struct thread_place {
    int lane_x, first_row;

    __device__ __forceinline__ thread_place()
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        lane_x = lane / 2 % LANES_X;
        first_row = warp * LANES_Y * ROWS + lane % 2 + lane / (2 * LANES_X) * 2;
    }
};

/* a_smem and b_smem: this thread's first row of a and of b. */
template <int DEPTH, int A_PITCH, int B_PITCH, int N>
static __device__ __forceinline__ void add_products(float (&s)[ROWS][N], const float *a_smem, const float *b_smem)
{
#pragma unroll 1 /* the other warps hide the latency; more in flight would spill */
    for (int d = 0; d < DEPTH; d += 4) {
        float4 b[N];
#pragma unroll
        for (int c = 0; c < N; c++) b[c] = *(const float4 *)&b_smem[c * LANES_X * B_PITCH + d];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 a = *(const float4 *)&a_smem[r * LANES_Y * A_PITCH + d];
#pragma unroll
            for (int c = 0; c < N; c++) {
                s[r][c] += a.x * b[c].x;
                s[r][c] += a.y * b[c].y;
                s[r][c] += a.z * b[c].z;
                s[r][c] += a.w * b[c].w;
            }
        }
    }
}

/* w_smem and x_smem: this thread's first row of w and first column of x. */
template <int N, int W_PITCH, int X_PITCH>
static __device__ __forceinline__ void add_weighted(float (&out)[ROWS][COLUMNS], const float *w_smem,
                                                    const float *x_smem)
{
#pragma unroll 1
    for (int j = 0; j < N; j += 4) {
        float4 x[4][COLUMNS / 4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int c = 0; c < COLUMNS / 4; c++) {
                x[n][c] = *(const float4 *)&x_smem[(j + n) * X_PITCH + c * 4 * LANES_X];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 w = *(const float4 *)&w_smem[r * LANES_Y * W_PITCH + j];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float w_n = n == 0 ? w.x : n == 1 ? w.y : n == 2 ? w.z : w.w;
#pragma unroll
                for (int c = 0; c < COLUMNS / 4; c++) {
                    out[r][4 * c + 0] += w_n * x[n][c].x;
                    out[r][4 * c + 1] += w_n * x[n][c].y;
                    out[r][4 * c + 2] += w_n * x[n][c].z;
                    out[r][4 * c + 3] += w_n * x[n][c].w;
                }
            }
        }
    }
}

/* This thread's columns of one row of the result, times a factor. row_gmem: the row's first element; `fours`: as
 * rows_of_fours() says. */
template <class T>
static __device__ __forceinline__ void write_row(typename T::element *row_gmem, int64_t column_stride, int64_t columns,
                                                 bool fours, const float (&out)[COLUMNS], float factor, int lane_x)
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 4) {
        const int column = c * LANES_X + lane_x * 4;
        fc::four<T> x;
#pragma unroll
        for (int n = 0; n < 4; n++) x.x[n] = T::from_float(out[c + n] * factor);
        if (fours) {
            if (column < columns) *(fc::four<T> *)(row_gmem + column) = x;
        } else {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                if (column + n < columns) row_gmem[(column + n) * column_stride] = x.x[n];
            }
        }
    }
}

#endif /* FC_PORTABLE_PRODUCTS_CUH */
