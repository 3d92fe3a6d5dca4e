/*
 * launch.cuh - host side of a kernel with more than 48 KiB of shared memory: ready it once per device, launch it.
 */
#ifndef FC_COMMON_LAUNCH_CUH
#define FC_COMMON_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

namespace fc {

/* KERNEL: void (Params), its Params a __grid_constant__. blocks: 0 to 2^31 - 1. */
template <auto KERNEL, class Params>
static cudaError_t launch(int64_t blocks, int threads, int smem_bytes, void *stream, const Params &params)
{
    /* Once per device (twice in a race does no harm): a block may pass 48 KiB of shared memory, and what is L1 or
     * shared goes to shared, so that as many blocks fit as were planned for. */
    static std::atomic<uint64_t> devices_ready{0};
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
    if (!(devices_ready.load(std::memory_order_relaxed) & bit)) {
        error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
        if (error != cudaSuccess) return error;
        error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
        if (error != cudaSuccess) return error;
        devices_ready.fetch_or(bit, std::memory_order_relaxed);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)smem_bytes;
    config.stream = (cudaStream_t)stream;
    return cudaLaunchKernelEx(&config, KERNEL, params);
}

} // namespace fc

#endif /* FC_COMMON_LAUNCH_CUH */
