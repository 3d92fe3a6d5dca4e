/*
 * dependent.cuh - host side of dependent launch: when a kernel is launched so that the one before it lets it in early.
 *
 * That pays behind our own kernels of this sort alone, which let the next one in as soon as they run. Behind any other
 * there is nothing to gain, and a dependent launch begins 0.2 to 0.5 us later than a plain one (docs/hopper_short.md).
 * In a graph the kernel before is known. In a stream it is not; there launches are dependent, since calls that follow
 * each other gain 1 us, and where the host is slower than the GPU neither matters.
 */
#ifndef FC_COMMON_DEPENDENT_CUH
#define FC_COMMON_DEPENDENT_CUH

#include <cuda_runtime.h>

namespace fc {

/* Where a stream that is being captured stands: behind one node of a graph, or behind none or several (nullptr). */
struct graph_place {
    unsigned long long capture = 0; /* 0: the stream is not being captured */
    cudaGraphNode_t node = nullptr;
};

static graph_place place_in_graph(cudaStream_t stream)
{
#if CUDART_VERSION >= 13000
    const auto get_info = cudaStreamGetCaptureInfo;
#else
    const auto get_info = cudaStreamGetCaptureInfo_v3;
#endif
    cudaStreamCaptureStatus status;
    unsigned long long capture;
    const cudaGraphNode_t *nodes;
    const cudaGraphEdgeData *edges;
    size_t count;
    if (get_info(stream, &status, &capture, nullptr, &nodes, &edges, &count) != cudaSuccess) {
        cudaGetLastError(); /* the launch will say it again */
        return {};
    }
    if (status != cudaStreamCaptureStatusActive) return {};
    return {capture, count == 1 ? nodes[0] : nullptr};
}

/* Where this thread's last kernel that lets the next one in stands in a graph. */
inline thread_local graph_place last_in_graph;

static bool should_depend(const graph_place &place)
{
    if (place.capture == 0) return true;
    return place.node && place.node == last_in_graph.node && place.capture == last_in_graph.capture;
}

} // namespace fc

#endif /* FC_COMMON_DEPENDENT_CUH */
