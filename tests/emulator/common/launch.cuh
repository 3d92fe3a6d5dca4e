/* launch.cuh - in place of kernels/common/launch.cuh: runs the grid before it returns. */
#ifndef FC_COMMON_LAUNCH_CUH
#define FC_COMMON_LAUNCH_CUH

#include "emulator.h"

namespace fc {

struct launch_shape {
    int64_t blocks;
    int threads, smem_bytes, most_smem_bytes, cluster = 1;
    bool is_dependent = false;
};

template <class Params> void prefetch_params(const Params &, volatile uint32_t &) {}

template <auto KERNEL, class Params> cudaError_t launch(const launch_shape &shape, void *, const Params &params)
{
    return emulator_run((int)shape.blocks, shape.cluster, shape.threads, shape.smem_bytes,
                        [](const void *p) { KERNEL(*(const Params *)p); }, &params);
}

} // namespace fc

#endif /* FC_COMMON_LAUNCH_CUH */
