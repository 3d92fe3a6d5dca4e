/*
 * offsets.cuh - from indices to addresses. Every product is 64-bit: arrays may pass 2^31 elements.
 */
#ifndef FC_COMMON_OFFSETS_CUH
#define FC_COMMON_OFFSETS_CUH

#include <stdint.h>

#include "common/types.cuh"
#include "kernels.h"

namespace fc {

/* Element (batch, head, row, 0) of a tensor: how many elements from its first, and where. */
__device__ __forceinline__ int64_t row_offset(const fc_tensor &tensor, int64_t batch, int64_t head, int64_t row)
{
    return batch * tensor.strides[0] + head * tensor.strides[1] + row * tensor.strides[2];
}
template <class Element>
__device__ __forceinline__ Element *row_of(const fc_tensor &tensor, int64_t batch, int64_t head, int64_t row)
{
    return (Element *)tensor.data + row_offset(tensor, batch, head, row);
}

/* Element (batch, head) of alibi_slopes or sinks, which are float32 or of the query's dtype T. */
template <class T> __device__ __forceinline__ float head_value(const fc_tensor &tensor, int64_t batch, int64_t head)
{
    if (tensor.dtype == FC_FLOAT32) return *row_of<const float>(tensor, batch, head, 0);
    return T::to_float(*row_of<const typename T::element>(tensor, batch, head, 0));
}

/* Whether every row is whole groups of four elements that one load or store can move. */
template <class T> __device__ __forceinline__ bool rows_of_fours(const fc_tensor &tensor, int64_t columns)
{
    const int64_t offsets = tensor.strides[0] | tensor.strides[1] | tensor.strides[2] | columns;
    return tensor.strides[3] == 1 && offsets % 4 == 0 && (uintptr_t)tensor.data % sizeof(four<T>) == 0;
}

/* One tile of the output: rows row .. row + block_m - 1 of one query head. */
struct tile_position {
    int64_t batch, head, head_kv, row;
};

/*
 * Tile number -> place. The query heads of one kv head follow each other, so that they read its keys
 * and values while these are in the cache; rows count down, so that under a causal mask the long tiles start
 * first and the short ones fill the end.
 */
__device__ __forceinline__ tile_position locate_tile(const fc_forward_args &args, int64_t tile, int block_m)
{
    const int64_t group = args.num_heads_q / args.num_heads_kv;
    const int64_t row_tiles = (args.seqlen_q + block_m - 1) / block_m;
    const int64_t in_group = tile % group;
    tile /= group;
    const int64_t row_tile = row_tiles - 1 - tile % row_tiles;
    tile /= row_tiles;
    const int64_t head_kv = tile % args.num_heads_kv;
    return {tile / args.num_heads_kv, head_kv * group + in_group, head_kv, row_tile * block_m};
}

} // namespace fc

#endif /* FC_COMMON_OFFSETS_CUH */
