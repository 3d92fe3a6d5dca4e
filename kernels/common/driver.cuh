/*
 * driver.cuh - functions of the driver, by name: the library links to no driver, so that it loads where there is none.
 */
#ifndef FC_COMMON_DRIVER_CUH
#define FC_COMMON_DRIVER_CUH

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

namespace fc {

/* The function that CUDA 12.0's drivers have under `name`; `found` keeps it for later calls. */
template <class Function>
static cudaError_t find_in_driver(const char *name, std::atomic<Function> &found, Function *function)
{
    *function = found.load(std::memory_order_relaxed);
    if (*function != nullptr) return cudaSuccess;
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess || entry == nullptr) return cudaErrorSymbolNotFound;
    *function = (Function)entry;
    found.store(*function, std::memory_order_relaxed);
    return cudaSuccess;
}

/* Calls the driver. A thread that has used no GPU yet has no context there; cudaSetDevice makes the device's current.
 * An error has one number in both. */
template <class Call> static cudaError_t call_driver(Call call)
{
    CUresult result = call();
    if (result == CUDA_ERROR_INVALID_CONTEXT) {
        int device;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) error = cudaSetDevice(device);
        if (error != cudaSuccess) return error;
        result = call();
    }
    return (cudaError_t)result;
}

} // namespace fc

#endif /* FC_COMMON_DRIVER_CUH */
