/*
 * measure.c - fc_attention_measure: how long a call takes, for tuning. The only file that reads a clock.
 *
 * A short call is over before the host has launched the next, so on a GPU the calls are captured into a graph, which
 * is launched as one.
 */
#include <inttypes.h>
#include <time.h>

#include "internal.h"

enum { MOST_CALLS = 10000 }; /* nodes of a graph take host memory, and time to prepare */

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

static fc_status time_on_cpu(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                             int32_t num_calls, double *microseconds)
{
    /* the first call wakes threads and fetches the arrays */
    fc_status status = fc_attention_forward(problem, workspace, workspace_bytes, NULL);
    double begin = now_us();
    for (int32_t i = 0; i < num_calls && status == FC_OK; i++)
        status = fc_attention_forward(problem, workspace, workspace_bytes, NULL);
    if (status == FC_OK) *microseconds = (now_us() - begin) / num_calls;
    return status;
}

#ifdef FC_WITH_CUDA

#include <cuda_runtime_api.h>

typedef struct gpu_timer {
    cudaStream_t stream; /* of its own: what is on the caller's is not timed */
    cudaGraph_t graph;
    cudaGraphExec_t calls;
    cudaEvent_t begin, end;
} gpu_timer;

static fc_status enqueue(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                         int32_t num_calls, cudaStream_t stream)
{
    fc_status status = FC_OK;
    for (int32_t i = 0; i < num_calls && status == FC_OK; i++)
        status = fc_attention_forward(problem, workspace, workspace_bytes, stream);
    return status;
}

static fc_status prepare(gpu_timer *timer, const fc_attention_problem *problem, void *workspace,
                         uint64_t workspace_bytes, void *after, int32_t num_calls)
{
    int error = cudaStreamSynchronize(after);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&timer->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreate(&timer->begin);
    if (error == cudaSuccess) error = cudaEventCreate(&timer->end);
    if (error != cudaSuccess) return fc_cuda_fail(error, "preparing to measure");
    /* A kernel's first launch loads it, which a capture does not allow. */
    fc_status status = enqueue(problem, workspace, workspace_bytes, 1, timer->stream);
    if (status != FC_OK) return status;
    error = cudaStreamSynchronize(timer->stream);
    if (error == cudaSuccess) error = cudaStreamBeginCapture(timer->stream, cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) return fc_cuda_fail(error, "beginning to capture the calls to measure");
    status = enqueue(problem, workspace, workspace_bytes, num_calls, timer->stream);
    error = cudaStreamEndCapture(timer->stream, &timer->graph); /* also after a failure: it ends the capture */
    if (status != FC_OK) return status;
    if (error == cudaSuccess) error = cudaGraphInstantiate(&timer->calls, timer->graph, 0);
    return fc_cuda_fail(error, "capturing the calls to measure");
}

/* The graph twice: while the first runs, which brings clocks and caches up, the host gets ahead. */
static fc_status run_timed(gpu_timer *timer, double *microseconds)
{
    float milliseconds = 0;
    int error = cudaGraphLaunch(timer->calls, timer->stream);
    if (error == cudaSuccess) error = cudaEventRecord(timer->begin, timer->stream);
    if (error == cudaSuccess) error = cudaGraphLaunch(timer->calls, timer->stream);
    if (error == cudaSuccess) error = cudaEventRecord(timer->end, timer->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(timer->stream);
    if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, timer->begin, timer->end);
    *microseconds = 1e3 * (double)milliseconds;
    return fc_cuda_fail(error, "measuring");
}

static fc_status time_on_gpu(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                             void *stream, int32_t num_calls, double *microseconds)
{
    gpu_timer timer = {0};
    int32_t previous;
    double all_us = 0;
    fc_status status = fc_device_enter(problem->device_id, &previous);
    if (status != FC_OK) return status;
    status = prepare(&timer, problem, workspace, workspace_bytes, stream, num_calls);
    if (status == FC_OK) status = run_timed(&timer, &all_us);
    if (status == FC_OK) *microseconds = all_us / num_calls;
    if (timer.calls != NULL) cudaGraphExecDestroy(timer.calls);
    if (timer.graph != NULL) cudaGraphDestroy(timer.graph);
    if (timer.end != NULL) cudaEventDestroy(timer.end);
    if (timer.begin != NULL) cudaEventDestroy(timer.begin);
    if (timer.stream != NULL) cudaStreamDestroy(timer.stream);
    if (status != FC_OK) cudaGetLastError(); /* the runtime remembers it; a later launch must not report it */
    fc_device_leave(problem->device_id, previous);
    return status;
}

#else

static fc_status time_on_gpu(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                             void *stream, int32_t num_calls, double *microseconds)
{
    (void)num_calls, (void)microseconds;
    return fc_attention_forward(problem, workspace, workspace_bytes, stream); /* says why it cannot */
}

#endif

fc_status fc_attention_measure(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                               void *stream, int32_t num_calls, double *microseconds)
{
    if (num_calls < 1 || num_calls > MOST_CALLS)
        return fc_fail(FC_INVALID, "num_calls is %" PRId32 "; allowed: 1 to %d", num_calls, MOST_CALLS);
    if (problem == NULL || microseconds == NULL)
        return fc_fail(FC_INVALID, "%s is NULL", problem == NULL ? "fc_attention_problem" : "microseconds");
    return problem->device_type == FC_CUDA
               ? time_on_gpu(problem, workspace, workspace_bytes, stream, num_calls, microseconds)
               : time_on_cpu(problem, workspace, workspace_bytes, num_calls, microseconds);
}
