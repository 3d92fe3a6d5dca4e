/*
 * tile.cuh - a block of threads brings a tile [ROWS][COLUMNS] of any strides to shared memory, as float32.
 *
 * What lies outside the array, past `rows_there` or `columns_there`, is never read and becomes zero: a zero column adds
 * nothing to q.k, and a zero value row times probability 0 is 0, whatever lies behind the sequence's end.
 */
#ifndef FC_COMMON_TILE_CUH
#define FC_COMMON_TILE_CUH

#include "common/types.cuh"

namespace fc {

struct every_row {
    __device__ __forceinline__ bool operator()(int) const { return true; }
};

/* tile_smem: [ROWS][PITCH]. fours: rows_of_fours() says that groups of four may be moved at once. A row of the tile
 * that `keep` refuses becomes zero too. */
template <class T, int ROWS, int COLUMNS, int PITCH, int THREADS, int MOST_IN_FLIGHT = 8, class Keep = every_row>
__device__ __forceinline__ void load_tile(float *tile_smem, const typename T::element *tile_gmem, int64_t row_stride,
                                          int64_t column_stride, int64_t rows_there, int64_t columns_there, bool fours,
                                          Keep keep = {})
{
    int rows = (int)min(rows_there, (int64_t)ROWS);
    const int columns = (int)min(columns_there, (int64_t)COLUMNS);
    if (fours) {
        constexpr int THREADS_PER_ROW = COLUMNS / 4;
        constexpr int ROWS_AT_ONCE = THREADS / THREADS_PER_ROW;
        constexpr int STEPS = ROWS / ROWS_AT_ONCE;
        /* Loads per thread before the first is waited for. */
        constexpr int IN_FLIGHT = STEPS < MOST_IN_FLIGHT ? STEPS : MOST_IN_FLIGHT;
        static_assert(THREADS % THREADS_PER_ROW == 0 && ROWS % ROWS_AT_ONCE == 0 && STEPS % IN_FLIGHT == 0,
                      "a tile is whole steps of the block");
        const int column = threadIdx.x % THREADS_PER_ROW * 4;
        int row = threadIdx.x / THREADS_PER_ROW;
        const typename T::element *source = tile_gmem + row * row_stride + column;
        const int64_t next = ROWS_AT_ONCE * row_stride;
        float *target = tile_smem + row * PITCH + column;
        if (column >= columns) rows = 0;
#pragma unroll 1
        for (int step = 0; step < STEPS; step += IN_FLIGHT) {
            four<T> staged[IN_FLIGHT];
#pragma unroll
            for (int n = 0; n < IN_FLIGHT; n++) {
                staged[n] = {};
                if (row < rows) { /* both are asked for before either is there */
                    staged[n] = *(const four<T> *)source;
                    if (!keep(row)) staged[n] = {};
                }
                row += ROWS_AT_ONCE;
                source += next;
            }
#pragma unroll
            for (int n = 0; n < IN_FLIGHT; n++) {
                *(float4 *)target = make_float4(T::to_float(staged[n].x[0]), T::to_float(staged[n].x[1]),
                                                T::to_float(staged[n].x[2]), T::to_float(staged[n].x[3]));
                target += ROWS_AT_ONCE * PITCH;
            }
        }
    } else {
#pragma unroll 1
        for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
            const int row = index / COLUMNS, column = index % COLUMNS;
            float x = 0;
            if (row < rows && column < columns && keep(row)) {
                x = T::to_float(tile_gmem[row * row_stride + column * column_stride]);
            }
            tile_smem[row * PITCH + column] = x;
        }
    }
}

} // namespace fc

#endif /* FC_COMMON_TILE_CUH */
