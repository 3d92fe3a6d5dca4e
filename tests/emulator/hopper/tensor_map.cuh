/* tensor_map.cuh - in place of kernels/hopper/tensor_map.cuh. */
#ifndef FC_HOPPER_TENSOR_MAP_CUH
#define FC_HOPPER_TENSOR_MAP_CUH

#include <cuda.h>

#include "kernels.h"

namespace fc {

inline cudaError_t make_tensor_map(CUtensorMap *map, const fc_tensor &tensor, int64_t columns, int64_t rows,
                                   int64_t heads, int64_t batch, int box_rows)
{
    *map = {(const unsigned char *)tensor.data,
            {columns, rows, heads, batch},
            {2, 2 * tensor.strides[2], 2 * tensor.strides[1], 2 * tensor.strides[0]},
            box_rows};
    return cudaSuccess;
}

} // namespace fc

#endif /* FC_HOPPER_TENSOR_MAP_CUH */
