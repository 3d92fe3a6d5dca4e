/* tensor_map.cuh - in place of kernels/hopper/tensor_map.cuh. */
#ifndef FC_HOPPER_TENSOR_MAP_CUH
#define FC_HOPPER_TENSOR_MAP_CUH

#include <cuda.h>

#include "kernels.h"

namespace fc {

struct tensor_box {
    int row_bytes, rows;
};
inline cudaError_t make_tensor_map(CUtensorMap *map, const fc_tensor &tensor, int64_t columns, int64_t rows,
                                   int64_t heads, int64_t batch, tensor_box box)
{
    const int bytes = fc_dtype_bytes(tensor.dtype);
    const int64_t sizes[3] = {batch, heads, rows};
    bool is_readable = (uintptr_t)tensor.data % 16 == 0;
    for (int i = 0; i < 3; i++) is_readable &= sizes[i] == 1 || tensor.strides[i] * bytes % 16 == 0;
    if (!is_readable) return cudaErrorInvalidValue;
    *map = {(const unsigned char *)tensor.data,
            {columns, rows, heads, batch},
            {bytes, bytes * tensor.strides[2], bytes * tensor.strides[1], bytes * tensor.strides[0]},
            bytes,
            box.row_bytes,
            box.rows};
    return cudaSuccess;
}

} // namespace fc

#endif /* FC_HOPPER_TENSOR_MAP_CUH */
