/*
 * launch.cuh - host side of a kernel with more than 48 KiB of shared memory: ready it once per device, launch it.
 */
#ifndef FC_COMMON_LAUNCH_CUH
#define FC_COMMON_LAUNCH_CUH

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

#include "common/dependent.cuh"
#include "common/driver.cuh"

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

/* Once per device (twice in a race does no harm): a block may pass 48 KiB of shared memory, and what is L1 or shared
 * goes to shared, so that as many blocks fit as were planned for. */
template <auto KERNEL> static cudaError_t ready_kernel(int device, int most_smem_bytes)
{
    static std::atomic<uint64_t> devices_ready{0};
    const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
    if (devices_ready.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most_smem_bytes);
    if (error != cudaSuccess) return error;
    error =
        cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) devices_ready.fetch_or(bit, std::memory_order_relaxed);
    return error;
}

/* The driver's launch is 0.3 us shorter than the runtime's, which ends there after looking the kernel up. */
template <auto KERNEL> static cudaError_t launch(const CUlaunchConfig &config, void **params)
{
    static std::atomic<decltype(&cuLaunchKernelEx)> found{nullptr};
    decltype(&cuLaunchKernelEx) launch_kernel;
    cudaError_t error = find_in_driver("cuLaunchKernelEx", found, &launch_kernel);
    if (error != cudaSuccess) return error;
    static std::atomic<cudaKernel_t> known{nullptr};
    cudaKernel_t kernel = known.load(std::memory_order_relaxed);
    if (kernel == nullptr) {
        error = cudaGetKernel(&kernel, KERNEL);
        if (error != cudaSuccess) return error;
        known.store(kernel, std::memory_order_relaxed);
    }
    return call_driver([&] { return launch_kernel(&config, (CUfunction)kernel, params, nullptr); });
}

/* KERNEL: void (Params), its Params a __grid_constant__. */
template <auto KERNEL, class Params>
static cudaError_t launch(const launch_shape &shape, void *stream, const Params &params)
{
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = ready_kernel<KERNEL>(device, shape.most_smem_bytes);
    if (error != cudaSuccess) return error;
    CUlaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (shape.cluster > 1) {
        attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[count++].value.clusterDim = {(unsigned)shape.cluster, 1, 1};
    }
    const graph_place place = shape.is_dependent ? place_in_graph((cudaStream_t)stream) : graph_place();
    if (shape.is_dependent && should_depend(place)) {
        attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[count++].value.programmaticStreamSerializationAllowed = 1;
    }
    CUlaunchConfig config = {};
    config.gridDimX = (unsigned)shape.blocks;
    config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = (unsigned)shape.threads;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = (unsigned)shape.smem_bytes;
    config.hStream = (CUstream)stream;
    config.attrs = attributes;
    config.numAttrs = count;
    void *pointers[] = {const_cast<Params *>(&params)};
    error = launch<KERNEL>(config, pointers);
    if (place.capture != 0 && error == cudaSuccess) last_in_graph = place_in_graph((cudaStream_t)stream);
    return error;
}

} // namespace fc

#endif /* FC_COMMON_LAUNCH_CUH */
