/*
 * device.c - facts of the devices, read once and cached, and the few CUDA runtime calls that are no kernel:
 * making a device current, ordering streams, allocating results.
 *
 * The CUDA runtime is linked statically and opens the driver when first asked, so a build with CUDA
 * works on a machine without a driver; it then has zero devices and says why.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "internal.h"

/* Read once: under a hypervisor cpuid alone costs more than a small attention. */
static fc_device cpu = {.struct_size = sizeof cpu, .type = FC_CPU, .name = "CPU"};

static void read_cpu_facts(void)
{
    cpu.isa = fc_cpu_isa();
    cpu.num_threads = fc_cpu_num_threads();
}

static const fc_device *cpu_facts(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_cpu_facts);
    return &cpu;
}

#ifdef FC_WITH_CUDA

#include <cuda_runtime_api.h>

fc_status fc_cuda_fail(int error, const char *doing)
{
    if (error == cudaSuccess) return FC_OK;
    int driver = 0;
    if (error == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        if (driver == 0) return fc_fail(FC_NO_DEVICE, "no NVIDIA driver is installed; GPU arrays need one");
        return fc_fail(FC_NO_DEVICE,
                       "the NVIDIA driver supports CUDA %d.%d, and this build needs %d.%d or newer; update the driver",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (error == cudaErrorNoDevice) return fc_fail(FC_NO_DEVICE, "no CUDA device was found");
    if (error == cudaErrorMemoryAllocation) return fc_fail(FC_OUT_OF_MEMORY, "out of GPU memory while %s", doing);
    return fc_fail(FC_CUDA_ERROR, "%s: %s while %s", cudaGetErrorName(error), cudaGetErrorString(error), doing);
}

int32_t fc_cuda_device_count(void)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess) return count;
    cudaGetLastError(); /* the runtime remembers it; a later launch must not report it */
    fc_cuda_fail(error, "counting GPUs");
    return 0;
}

/* The runtime's attributes are one cheap call each, but a call on the hot path asks for all of them. */
enum { MAX_CACHED_DEVICES = 64 };
static fc_device cached[MAX_CACHED_DEVICES];
static _Atomic bool is_cached[MAX_CACHED_DEVICES];
static pthread_mutex_t cache_lock = PTHREAD_MUTEX_INITIALIZER;

static fc_status cuda_facts(int32_t id, fc_device *device)
{
    int32_t count = fc_cuda_device_count();
    if (count == 0) return FC_NO_DEVICE; /* with the words of fc_cuda_device_count */
    if (id < 0 || id >= count)
        return fc_fail(FC_NO_DEVICE, "device_id is %" PRId32 "; allowed: 0 to %" PRId32, id, count - 1);
    static const struct {
        enum cudaDeviceAttr attribute;
        size_t field;
    } wanted[] = {
        {cudaDevAttrMultiProcessorCount, offsetof(fc_device, num_sms)},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, offsetof(fc_device, smem_bytes_per_block)},
    };
    int major = 0, minor = 0, l2 = 0, driver = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, id);
    if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0] && error == cudaSuccess; i++)
        error = cudaDeviceGetAttribute((int *)((char *)device + wanted[i].field), wanted[i].attribute, id);
    struct cudaDeviceProp properties;
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, id);
    if (error != cudaSuccess) return fc_cuda_fail(error, "reading the GPU's properties");
    device->type = FC_CUDA;
    device->id = id;
    device->compute_capability = 10 * major + minor;
    device->l2_bytes = l2;
    device->driver_version = driver;
    snprintf(device->name, sizeof device->name, "%.63s", properties.name);
    return FC_OK;
}

static fc_status cached_cuda_facts(int32_t id, fc_device *device)
{
    if (id < 0 || id >= MAX_CACHED_DEVICES) return cuda_facts(id, device);
    if (!is_cached[id]) {
        pthread_mutex_lock(&cache_lock);
        fc_status status = is_cached[id] ? FC_OK : cuda_facts(id, &cached[id]);
        if (status == FC_OK) is_cached[id] = true;
        pthread_mutex_unlock(&cache_lock);
        if (status != FC_OK) return status;
    }
    *device = cached[id];
    return FC_OK;
}

fc_status fc_device_enter(int32_t device_id, int32_t *previous)
{
    int current = -1;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device_id) error = cudaSetDevice(device_id);
    *previous = current;
    return fc_cuda_fail(error, "making the GPU current");
}

void fc_device_leave(int32_t device_id, int32_t previous)
{
    if (previous != device_id) cudaSetDevice(previous);
}

fc_status fc_pointer_device(const void *data, int32_t *device_id)
{
    *device_id = 0;
    if (data == NULL) return FC_OK;
    if (fc_cuda_device_count() == 0) return FC_NO_DEVICE; /* with the words of fc_cuda_device_count */
    struct cudaPointerAttributes attributes;
    cudaError_t error = cudaPointerGetAttributes(&attributes, data);
    if (error != cudaSuccess) return fc_cuda_fail(error, "asking which GPU an address belongs to");
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
        return fc_fail(FC_INVALID, "address %p is no GPU's memory; give an array that a GPU owns", data);
    *device_id = attributes.device;
    return FC_OK;
}

/* The legacy default stream has two spellings. */
static cudaStream_t canonical(void *stream)
{
    return stream == cudaStreamLegacy ? NULL : (cudaStream_t)stream;
}

fc_status fc_stream_order(int32_t device_id, void *earlier, void *later)
{
    if (canonical(earlier) == canonical(later)) return FC_OK;
    int32_t previous;
    fc_status status = fc_device_enter(device_id, &previous);
    if (status != FC_OK) return status;
    cudaEvent_t event = NULL;
    cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventRecord(event, canonical(earlier));
    if (error == cudaSuccess) error = cudaStreamWaitEvent(canonical(later), event, 0);
    if (event != NULL) cudaEventDestroy(event);
    fc_device_leave(device_id, previous);
    return fc_cuda_fail(error, "ordering two streams");
}

static fc_status cuda_malloc(int32_t device_id, uint64_t bytes, void *stream, void **data)
{
    int32_t previous;
    fc_status status = fc_device_enter(device_id, &previous);
    if (status != FC_OK) return status;
    cudaError_t error = cudaMallocAsync(data, bytes, canonical(stream));
    fc_device_leave(device_id, previous);
    return fc_cuda_fail(error, "allocating a result");
}

static fc_status cuda_free(int32_t device_id, void *data, void *stream)
{
    int32_t previous;
    fc_status status = fc_device_enter(device_id, &previous);
    if (status != FC_OK) return status;
    cudaError_t error = cudaFreeAsync(data, canonical(stream));
    fc_device_leave(device_id, previous);
    return fc_cuda_fail(error, "freeing a result");
}

#else /* built without CUDA */

static const char no_cuda[] = "this build of flashcore has the CPU kernels alone; rebuild with nvcc on the PATH, or "
                              "FLASHCORE_CUDA=1 to have pip bring it";

fc_status fc_cuda_fail(int error, const char *doing)
{
    return error == 0 ? FC_OK : fc_fail(FC_CUDA_ERROR, "CUDA error %d while %s", error, doing);
}

int32_t fc_cuda_device_count(void)
{
    fc_fail(FC_NO_DEVICE, "%s", no_cuda);
    return 0;
}

static fc_status cached_cuda_facts(int32_t id, fc_device *device)
{
    (void)id, (void)device;
    return fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

fc_status fc_device_enter(int32_t device_id, int32_t *previous)
{
    *previous = device_id;
    return fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

void fc_device_leave(int32_t device_id, int32_t previous)
{
    (void)device_id, (void)previous;
}

fc_status fc_pointer_device(const void *data, int32_t *device_id)
{
    *device_id = 0;
    return data == NULL ? FC_OK : fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

fc_status fc_stream_order(int32_t device_id, void *earlier, void *later)
{
    (void)device_id;
    return earlier == later ? FC_OK : fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

static fc_status cuda_malloc(int32_t device_id, uint64_t bytes, void *stream, void **data)
{
    (void)device_id, (void)bytes, (void)stream, (void)data;
    return fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

static fc_status cuda_free(int32_t device_id, void *data, void *stream)
{
    (void)device_id, (void)data, (void)stream;
    return fc_fail(FC_NO_DEVICE, "%s", no_cuda);
}

#endif

fc_status fc_device_query(int32_t device_type, int32_t device_id, fc_device *device)
{
    fc_device facts = {.struct_size = sizeof facts};
    if (device == NULL) return fc_fail(FC_INVALID, "fc_device is NULL");
    if (device->struct_size < sizeof facts)
        return fc_fail(FC_INVALID, "fc_device.struct_size is %" PRIu64 "; set it to sizeof(fc_device), at least %zu",
                       device->struct_size, sizeof facts);
    if (device_type == FC_CPU) {
        if (device_id != 0) return fc_fail(FC_NO_DEVICE, "device_id is %" PRId32 "; the CPU has only 0", device_id);
        facts = *cpu_facts();
    } else if (device_type == FC_CUDA) {
        fc_status status = cached_cuda_facts(device_id, &facts);
        if (status != FC_OK) return status;
    } else {
        return fc_fail(FC_INVALID, "device_type is %" PRId32 "; allowed: %d (CPU), %d (CUDA)", device_type, FC_CPU,
                       FC_CUDA);
    }
    facts.struct_size = device->struct_size; /* a newer caller's tail stays as it is */
    memcpy(device, &facts, sizeof facts);
    return FC_OK;
}

/* A cache line, and what XLA asks of buffers it adopts. */
enum { CPU_ALIGNMENT = 64 };

fc_status fc_malloc(int32_t device_type, int32_t device_id, uint64_t bytes, void *stream, void **data)
{
    if (data == NULL) return fc_fail(FC_INVALID, "fc_malloc: data is NULL");
    *data = NULL;
    if (bytes == 0) return FC_OK;
    if (device_type == FC_CUDA) return cuda_malloc(device_id, bytes, stream, data);
    if (device_type != FC_CPU)
        return fc_fail(FC_INVALID, "device_type is %" PRId32 "; allowed: %d (CPU), %d (CUDA)", device_type, FC_CPU,
                       FC_CUDA);
    if (bytes > PTRDIFF_MAX - CPU_ALIGNMENT || posix_memalign(data, CPU_ALIGNMENT, bytes) != 0)
        return fc_fail(FC_OUT_OF_MEMORY, "out of memory for a result of %" PRIu64 " bytes", bytes);
    return FC_OK;
}

fc_status fc_free(int32_t device_type, int32_t device_id, void *data, void *stream)
{
    if (data == NULL) return FC_OK;
    if (device_type == FC_CUDA) return cuda_free(device_id, data, stream);
    if (device_type != FC_CPU)
        return fc_fail(FC_INVALID, "device_type is %" PRId32 "; allowed: %d (CPU), %d (CUDA)", device_type, FC_CPU,
                       FC_CUDA);
    free(data);
    return FC_OK;
}
