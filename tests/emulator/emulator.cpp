/*
 * emulator.cpp - the fibers of emulator.h, and the way in for the tests.
 */
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "common/ptx.cuh"
extern "C" {
#include "internal.h"
}

dim3 threadIdx, blockIdx, gridDim;
int emulator_rank;
constexpr int MOST_BLOCKS = 8; /* of a cluster */
alignas(1024) unsigned char dynamic_smem[MOST_BLOCKS * EMULATOR_SMEM_BYTES];

namespace {

constexpr int STACK_BYTES = 64 * 1024, PATIENCE = 20; /* rounds through all fibers in which nothing happens */

/* A fiber begins by its context and then jumps: swapcontext() would ask the kernel for the signal mask each time. */
struct fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
    bool begun, ended;
};

std::vector<fiber> fibers;
std::vector<emulator_warp> warps;
std::vector<emulator_warpgroup> warpgroups;
emulator_meeting all_threads[MOST_BLOCKS];
int num_threads, num_fibers, current; /* of a block; of a cluster; the fiber that runs */
unsigned first_block;                 /* of the cluster */
long cluster_arrivals;
std::vector<long> own_arrivals;
bool progress;
jmp_buf scheduler;
void (*kernel)(const void *);
const void *kernel_params;

void run_fiber()
{
    kernel(kernel_params);
    fibers[current].ended = progress = true;
    _longjmp(scheduler, 1);
}

/* Who and where the fiber is, for its kernel to read. */
void enter(int index)
{
    current = index;
    emulator_rank = index / num_threads;
    threadIdx.x = (unsigned)(index % num_threads);
    blockIdx.x = first_block + (unsigned)emulator_rank;
}

/* Until it yields or ends. */
void resume(fiber &it)
{
    if (_setjmp(scheduler)) return;
    if (it.begun) _longjmp(it.place, 1);
    it.begun = true;
    setcontext(&it.context);
}

bool run_cluster()
{
    emulator_mbarriers.clear();
    emulator_named_barriers.clear();
    emulator_stores.clear();
    memset(dynamic_smem, 0xff, (size_t)(num_fibers / num_threads) * EMULATOR_SMEM_BYTES); /* NaN */
    cluster_arrivals = 0;
    own_arrivals.assign((size_t)num_fibers, 0);
    for (fiber &it : fibers) {
        it.begun = it.ended = false;
        getcontext(&it.context);
        it.context.uc_stack.ss_sp = it.stack.get();
        it.context.uc_stack.ss_size = STACK_BYTES;
        it.context.uc_link = nullptr;
        makecontext(&it.context, run_fiber, 0);
    }
    for (int left = num_fibers, idle = 0; left > 0;) {
        progress = false;
        for (int i = 0; i < num_fibers; i++) {
            if (fibers[i].ended) continue;
            enter(i);
            resume(fibers[i]);
            left -= fibers[i].ended;
        }
        idle = progress ? 0 : idle + 1;
        if (idle == PATIENCE) return false;
    }
    for (const emulator_warpgroup &it : warpgroups)
        if (!it.groups.empty() || !it.issued.empty()) return false; /* nobody waited for a product */
    return true;
}

} // namespace

void emulator_yield()
{
    const int self = current;
    if (!_setjmp(fibers[self].place)) _longjmp(scheduler, 1);
    enter(self);
}
void emulator_progress()
{
    progress = true;
}
void emulator_give_way()
{
    for (int round = 0; round < 3; round++) {
        emulator_progress();
        emulator_yield();
    }
}
emulator_warp &emulator_this_warp()
{
    return warps[current / 32];
}
emulator_warpgroup &emulator_this_warpgroup()
{
    return warpgroups[current / 128];
}
void __syncthreads()
{
    emulator_meet(all_threads[emulator_rank], num_threads, [] {});
}
int __syncthreads_or(int mine)
{
    static int so_far[MOST_BLOCKS], all[MOST_BLOCKS];
    const int rank = emulator_rank;
    so_far[rank] |= mine;
    emulator_meet(all_threads[rank], num_threads, [=] { all[rank] = so_far[rank], so_far[rank] = 0; });
    const int any = all[rank];
    __syncthreads(); /* all have read */
    return any;
}
void barrier_cluster_arrive_relaxed()
{
    own_arrivals[(size_t)current]++;
    cluster_arrivals++;
    emulator_progress();
}
void barrier_cluster_wait()
{
    while (cluster_arrivals < own_arrivals[(size_t)current] * num_fibers) emulator_yield();
}

cudaError_t emulator_run(int blocks, int cluster, int threads, int smem_bytes, void (*run)(const void *),
                         const void *params)
{
    if (smem_bytes > EMULATOR_SMEM_BYTES - 1024 || cluster > MOST_BLOCKS || blocks % cluster != 0)
        return cudaErrorLaunchFailure;
    num_threads = threads, num_fibers = cluster * threads, kernel = run, kernel_params = params;
    fibers.resize((size_t)num_fibers);
    gridDim.x = (unsigned)blocks;
    for (int block = 0; block < blocks; block += cluster) {
        warps.assign((size_t)num_fibers / 32, {});
        warpgroups.assign((size_t)num_fibers / 128, {});
        first_block = (unsigned)block;
        if (!run_cluster()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

/* The launcher's error negated; -1 where kernels wrote outside their workspace, which is full of NaN. */
template <class Launch> static int with_workspace(const fc_plan &plan, Launch launch)
{
    constexpr size_t GUARD = 256;
    std::vector<unsigned char> workspace(plan.workspace_bytes + 2 * GUARD + 256, 0xff);
    unsigned char *start = workspace.data() + GUARD;
    start += -(uintptr_t)start % 256;
    const int error = launch(start);
    std::fill(start, start + plan.workspace_bytes, 0xff);
    if (std::any_of(workspace.begin(), workspace.end(), [](unsigned char x) { return x != 0xff; })) return -1;
    return -error;
}

static int check_and_plan(const fc_attention_problem *given, bool need_data, const fc_device *device, int32_t preferred,
                          fc_forward_args *args, fc_launch *launch)
{
    fc_attention_problem problem;
    const int status = fc_check(given, need_data, &problem, args);
    return status == FC_OK ? fc_plan_forward(&problem, args, device, preferred, launch) : status;
}

/* As fc_attention_plan, and what only a launcher is told; or with a kernel preferred, as fc_attention_run plans. */
extern "C" __attribute__((visibility("default"))) int
fc_emulate_plan(const fc_attention_problem *given, const fc_device *device, int32_t preferred, fc_launch *launch)
{
    fc_forward_args args;
    return check_and_plan(given, false, device, preferred, &args, launch);
}

/* As fc_attention_forward, on arrays in ordinary memory and a device that is only described. 0, an fc_status, or what
 * with_workspace() returns. */
extern "C" __attribute__((visibility("default"))) int fc_emulate(const fc_attention_problem *given,
                                                                 const fc_device *device, fc_launch *launch)
{
    fc_forward_args args;
    const int status = check_and_plan(given, true, device, -1, &args, launch);
    if (status != FC_OK || launch->plan.num_tiles == 0) return status;
    const auto launcher = fc_kernels[launch->plan.kernel].launcher;
    return with_workspace(launch->plan, [&](void *workspace) { return launcher(&args, launch, workspace, nullptr); });
}

/* The same for fc_attention_backward. */
extern "C" __attribute__((visibility("default"))) int fc_emulate_backward(const fc_backward_problem *given,
                                                                          const fc_device *device)
{
    fc_backward_problem problem;
    fc_attention_problem forward;
    fc_backward_args args;
    fc_plan plan = {};
    plan.struct_size = sizeof plan;
    int status = fc_check_backward(given, true, &problem, &forward, &args);
    if (status == FC_OK) status = fc_plan_backward(&problem, &forward, &args, device, &plan);
    if (status != FC_OK || plan.num_tiles == 0) return status;
    plan.num_blocks = std::min<int64_t>(plan.num_blocks, 7); /* each takes several tiles in turn */

    return with_workspace(
        plan, [&](void *workspace) { return fc_backward_launcher_of(plan.kernel)(&args, &plan, workspace, nullptr); });
}

/* The planner's tables name kernels that are not in this library, too: these stand in for them. */
#define STUB(name, args, plan)                                                                                         \
    extern "C" __attribute__((weak)) int name(const args *, const plan *, void *, void *)                              \
    {                                                                                                                  \
        return cudaErrorLaunchFailure;                                                                                 \
    }
#define FC_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                                     \
    STUB(fc_##family##_forward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n, fc_forward_args, fc_launch)
#define FC_BACKWARD_VARIANT(family, dtype, head_dim, mask, block_m, block_n, threads, arch)                            \
    STUB(fc_##family##_backward_##dtype##_d##head_dim##_##mask##_##block_m##x##block_n, fc_backward_args, fc_plan)
#include "variants.def"
