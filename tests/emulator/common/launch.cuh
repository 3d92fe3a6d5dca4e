/* launch.cuh - in place of kernels/common/launch.cuh: runs the grid before it returns. */
#ifndef FC_COMMON_LAUNCH_CUH
#define FC_COMMON_LAUNCH_CUH

#include "emulator.h"

namespace fc {

template <auto KERNEL, class Params>
cudaError_t launch(int64_t blocks, int threads, int smem_bytes, void *, const Params &params)
{
    return emulator_run((int)blocks, threads, smem_bytes, [](const void *p) { KERNEL(*(const Params *)p); }, &params);
}

} // namespace fc

#endif /* FC_COMMON_LAUNCH_CUH */
