/*
 * emulator.h - runs a CUDA kernel on the CPU, cluster by cluster, so that kernels are tested where there is no GPU.
 *
 * The kernel's own source is compiled for the CPU with this folder before kernels/ on the include path, which replaces
 * the headers of instructions (common/ptx.cuh, hopper/wgmma.cuh) and of the host's calls. Each thread of a block is a
 * fiber; a fiber that waits for a barrier, for a copy or for the other lanes of its warp lets the next one run. What is
 * checked is therefore results, index arithmetic and the protocol of barriers: where no fiber can go on, the block
 * is stuck, and the run ends with an error. Products run when they are waited for, on what their registers and their
 * shared memory hold then: so whatever is overwritten too early, or read, shows. What is not checked: speed.
 */
#ifndef FC_EMULATOR_H
#define FC_EMULATOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

/* Of the fiber that runs. */
extern dim3 threadIdx, blockIdx, gridDim;
extern int emulator_rank; /* of its block in the cluster */

/* One block's share after another; 227 KiB of each are a block's to ask for. */
constexpr int EMULATOR_SMEM_BYTES = 228 * 1024;
extern unsigned char dynamic_smem[];

/* Lets the others run. progress: whether anything has changed since; when nothing has for long, nothing will. */
void emulator_yield();
void emulator_progress();
void emulator_give_way(); /* lets the others run on, as far as a few rounds take them */

/* Waits until all `members` fibers that name the same meeting have come; the last to come calls meet() first. */
struct emulator_meeting {
    int arrived = 0;
    unsigned generation = 0;
    bool any_so_far = false, any = false; /* bar_any's */
};
template <class Meet> void emulator_meet(emulator_meeting &meeting, int members, Meet meet)
{
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == members) {
        meet();
        meeting.arrived = 0;
        meeting.generation++;
        emulator_progress();
    }
    while (meeting.generation == generation) emulator_yield();
}

/* The lanes of this fiber's warp, and the four warps of its warpgroup. */
struct emulator_warp {
    emulator_meeting meeting;
    uint64_t given[32], taken[32];
};
struct emulator_warpgroup {
    emulator_meeting meeting;
    std::array<float *, 128> d;
    std::array<const uint32_t *, 128> a;
    std::vector<std::function<void()>> issued;             /* products, not yet of a group */
    std::deque<std::vector<std::function<void()>>> groups; /* not yet waited for, the oldest first */
    std::array<size_t, 128> pending = {};                  /* of these, by each fiber */
};
emulator_warp &emulator_this_warp();
emulator_warpgroup &emulator_this_warpgroup();

/* Every lane gives x and gets take(all 32, its own lane). */
template <class X, class Take> auto emulator_exchange(X x, Take take)
{
    emulator_warp &warp = emulator_this_warp();
    const int lane = threadIdx.x % 32;
    memcpy(&warp.given[lane], &x, sizeof x);
    emulator_meet(warp.meeting, 32, [&] { memcpy(warp.taken, warp.given, sizeof warp.taken); });
    X all[32];
    for (int i = 0; i < 32; i++) memcpy(&all[i], &warp.taken[i], sizeof x);
    const auto result = take(all, lane);
    emulator_meet(warp.meeting, 32, [] {}); /* all have read */
    return result;
}

template <class X> X __shfl_xor_sync(unsigned, X x, int mask)
{
    return emulator_exchange(x, [=](const X *all, int lane) { return all[lane ^ mask]; });
}
template <class X> X __shfl_sync(unsigned, X x, int from)
{
    return emulator_exchange(x, [=](const X *all, int) { return all[from % 32]; });
}
inline unsigned __ballot_sync(unsigned, bool x)
{
    return emulator_exchange(x, [](const bool *all, int) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) bits |= (unsigned)all[i] << i;
        return bits;
    });
}
inline bool __any_sync(unsigned all, bool x)
{
    return __ballot_sync(all, x) != 0;
}
inline bool __all_sync(unsigned all, bool x)
{
    return __ballot_sync(all, x) == 0xffffffffu;
}
inline void __syncwarp()
{
    __ballot_sync(0xffffffffu, true);
}
void __syncthreads();
int __syncthreads_or(int mine);

/* Of a cluster's threads. */
void barrier_cluster_arrive_relaxed();
void barrier_cluster_wait();

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> shift % 32);
}
inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
inline int __ffs(unsigned x)
{
    return __builtin_ffs((int)x);
}
inline int __clz(unsigned x)
{
    return x == 0 ? 32 : __builtin_clz(x);
}
inline uint32_t __vminu4(uint32_t a, uint32_t b)
{
    uint32_t least = 0;
    for (int i = 0; i < 32; i += 8) least |= min(a >> i & 0xff, b >> i & 0xff) << i;
    return least;
}

using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

/* Runs every block of a grid, those of a cluster together and one cluster after another; cudaErrorLaunchFailure where
 * one is stuck. */
cudaError_t emulator_run(int blocks, int cluster, int threads, int smem_bytes, void (*kernel)(const void *),
                         const void *params);

#endif /* FC_EMULATOR_H */
