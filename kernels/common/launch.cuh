/*
 * launch.cuh - host side of a kernel with more than 48 KiB of shared memory: ready it once per device, launch it.
 */
#ifndef FC_COMMON_LAUNCH_CUH
#define FC_COMMON_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

#include "common/dependent.cuh"

namespace fc {

struct launch_shape {
    int64_t blocks; /* 0 to 2^31 - 1 */
    int threads;
    int smem_bytes, most_smem_bytes; /* of this launch, and of any of this kernel */
    int cluster = 1;                 /* consecutive blocks that reach each other's shared memory */
    /* The kernel lets the next one be set up while it still runs, and waits itself for the end of the one before. */
    bool is_dependent = false;
};

/* A kernel's parameters lie in memory, and each 64 bytes of them cost their first reader some 200 cycles: one thread
 * reads a word of each, all under way at once. What comes of them goes to `sink`, in shared memory, or else the
 * assembler drops the reads. */
template <class Params>
static __device__ __forceinline__ void prefetch_params(const Params &params, volatile uint32_t &sink)
{
    uint32_t all = 0;
#pragma unroll
    for (size_t i = 0; i < sizeof params; i += 64) all ^= *(const uint32_t *)((const char *)&params + i);
    sink = all;
}

/* KERNEL: void (Params), its Params a __grid_constant__. */
template <auto KERNEL, class Params>
static cudaError_t launch(const launch_shape &shape, void *stream, const Params &params)
{
    /* Once per device (twice in a race does no harm): a block may pass 48 KiB of shared memory, and what is L1 or
     * shared goes to shared, so that as many blocks fit as were planned for. */
    static std::atomic<uint64_t> devices_ready{0};
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
    if (!(devices_ready.load(std::memory_order_relaxed) & bit)) {
        error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.most_smem_bytes);
        if (error != cudaSuccess) return error;
        error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
        if (error != cudaSuccess) return error;
        devices_ready.fetch_or(bit, std::memory_order_relaxed);
    }
    cudaLaunchAttribute attributes[2] = {};
    int count = 0;
    if (shape.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {(unsigned)shape.cluster, 1, 1};
    }
    const graph_place place = shape.is_dependent ? place_in_graph((cudaStream_t)stream) : graph_place();
    if (shape.is_dependent && should_depend(place)) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)shape.blocks);
    config.blockDim = dim3((unsigned)shape.threads);
    config.dynamicSmemBytes = (size_t)shape.smem_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = (unsigned)count;
    error = cudaLaunchKernelEx(&config, KERNEL, params);
    if (place.capture != 0 && error == cudaSuccess) last_in_graph = place_in_graph((cudaStream_t)stream);
    return error;
}

} // namespace fc

#endif /* FC_COMMON_LAUNCH_CUH */
