/*
 * tensor_map.cuh - what the copy engine must know of an array, encoded on the host.
 *
 * A map has four dimensions, (column, row, head, batch), and moves boxes of 128 bytes of columns (the span of the
 * swizzle), or fewer, by some rows. What a box covers outside the array arrives as zeros, so sequence ends and a
 * head_dim below the kernel's are padded on the way, and nothing behind them is ever read.
 */
#ifndef FC_HOPPER_TENSOR_MAP_CUH
#define FC_HOPPER_TENSOR_MAP_CUH

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "common/driver.cuh"
#include "kernels.h"

namespace fc {

/* What one copy moves: rows of 64 or 128 bytes, swizzled as widely. */
struct tensor_box {
    int row_bytes, rows;
};

/* Strides are of whole 16 bytes, and none negative. */
static cudaError_t make_tensor_map(CUtensorMap *map, const fc_tensor &tensor, int64_t columns, int64_t rows,
                                   int64_t heads, int64_t batch, tensor_box box)
{
    static std::atomic<decltype(&cuTensorMapEncodeTiled)> found{nullptr};
    decltype(&cuTensorMapEncodeTiled) encode;
    const cudaError_t error = find_in_driver("cuTensorMapEncodeTiled", found, &encode);
    if (error != cudaSuccess) return error;
    const CUtensorMapDataType type = tensor.dtype == FC_FLOAT16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                     : tensor.dtype == FC_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : tensor.dtype == FC_FLOAT32  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const int bytes = fc_dtype_bytes(tensor.dtype);
    const cuuint64_t sizes[4] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)heads, (cuuint64_t)batch};
    cuuint64_t stride_bytes[3];
    for (int i = 0; i < 3; i++) {
        const bool one = sizes[3 - i] == 1; /* its stride means nothing and may be anything */
        stride_bytes[2 - i] = one ? 16 : (cuuint64_t)(tensor.strides[i] * bytes);
    }
    const cuuint32_t box_sizes[4] = {(cuuint32_t)(box.row_bytes / bytes), (cuuint32_t)box.rows, 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const CUtensorMapSwizzle swizzle = box.row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return call_driver([&] {
        return encode(map, type, 4, tensor.data, sizes, stride_bytes, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    });
}

} // namespace fc

#endif /* FC_HOPPER_TENSOR_MAP_CUH */
