/*
 * ptx.cuh - one PTX instruction per function, under the instruction's name.
 */
#ifndef FC_COMMON_PTX_CUH
#define FC_COMMON_PTX_CUH

#include <cuda.h>
#include <stdint.h>

/* ex2.approx.ftz.f32 d, a;  2^a within 2 ulp, the same unit and error as exp2f. A result under 2^-126 becomes 0;
 * -inf gives 0, NaN gives NaN. */
static __device__ __forceinline__ float ex2_approx_ftz(float a)
{
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

/* rcp.approx.ftz.f32 d, a;  1 / a within 1 ulp. */
static __device__ __forceinline__ float rcp_approx_ftz(float a)
{
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

/* Two float32 rounded to 16 bits each, the first in the upper half. */
static __device__ __forceinline__ uint32_t cvt_rn_f16x2(float high, float low)
{
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
static __device__ __forceinline__ uint32_t cvt_rn_bf16x2(float high, float low)
{
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

/* Four matrices of 8 x 8 16-bit numbers: lane 8 m + i gives the address of row i of matrix m, and gets of each matrix
 * the pair in row lane / 4, columns 2 (lane % 4) and the next. */
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

/*
 * ---- sm_90: matrices to shared memory, barriers in shared memory, the copy engine (TMA), register shares ----
 *
 * Shared memory is addressed by its 32-bit address in the block's own window (shared_address below); what the launch
 * asked for begins at dynamic_shared().
 */

static __device__ __forceinline__ unsigned char *dynamic_shared()
{
    extern __shared__ __align__(1024) unsigned char dynamic_smem[];
    return dynamic_smem;
}
static __device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* ldmatrix_x4 the other way round: what a lane has of each matrix goes to the rows at the addresses given. */
static __device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&d)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(d[0]),
                 "r"(d[1]), "r"(d[2]), "r"(d[3])
                 : "memory");
}

/* A barrier that completes a phase after `count` arrivals (and, with expect_tx, that many bytes). */
static __device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/* Makes this thread's mbarrier_init visible to the copy engine, and to the other blocks of a cluster. */
static __device__ __forceinline__ void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and keeps the phase open until copies have brought `bytes` more. */
static __device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Waits until the phase of this parity has completed. A new barrier counts as having completed one of parity 1. */
static __device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "retry:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra retry;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* Whether it has, now. */
static __device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

/* Copies the box at (column, row, head, batch) of a tensor to shared memory; reports its bytes to the barrier. */
static __device__ __forceinline__ void cp_async_bulk_tensor(uint32_t target, const CUtensorMap *map, uint32_t barrier,
                                                            int column, int row, int head, int batch)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

/* Copies such a box from shared memory to a tensor; what lies outside the tensor is not written. The thread's stores
 * so far are one group; and it waits until the copy engine has read what its groups store. */
static __device__ __forceinline__ void cp_async_bulk_tensor_store(const CUtensorMap *map, uint32_t source, int column,
                                                                  int row, int head, int batch)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(source), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_bulk_commit_group()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
static __device__ __forceinline__ void cp_async_bulk_wait_group_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* This thread's stores to shared memory come before what the copy engine then reads. */
static __device__ __forceinline__ void fence_proxy_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Brings the same box into the L2 cache. A hint: it says nothing of the values. */
static __device__ __forceinline__ void cp_async_bulk_prefetch_tensor(const CUtensorMap *map, int column, int row,
                                                                     int head, int batch)
{
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(column),
                 "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

static __device__ __forceinline__ void prefetch_tensormap(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Clusters: the address of block `rank`'s variable, from that of one's own; a store to such an address that reports its
 * 16 bytes to a barrier of the same block; and a barrier of all threads of all blocks, which orders no memory. */
static __device__ __forceinline__ uint32_t mapa(uint32_t address, int rank)
{
    uint32_t d;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(address), "r"(rank));
    return d;
}
static __device__ __forceinline__ void st_async(uint32_t address, uint32_t barrier, float x, float y, float z, float w)
{
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
        "r"(barrier), "f"(x), "f"(y), "f"(z), "f"(w)
        : "memory");
}
static __device__ __forceinline__ void barrier_cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ __forceinline__ void barrier_cluster_wait()
{
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/* As many multiprocessors as the GPU has, or more. */
static __device__ __forceinline__ uint32_t nsmid()
{
    uint32_t d;
    asm("mov.u32 %0, %%nsmid;" : "=r"(d));
    return d;
}

/* True in one lane of the warp, of which the compiler knows that it is one. */
static __device__ __forceinline__ bool elect_sync()
{
    uint32_t elected;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(elected));
    return elected != 0;
}

/* Dependent launch: this block no longer keeps the next kernel from being set up; and: waits for the end of the kernels
 * that this one depends on, whose writes it then sees. */
static __device__ __forceinline__ void griddepcontrol_launch_dependents()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
static __device__ __forceinline__ void griddepcontrol_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* A warpgroup's share of the block's registers, per thread. All its warps call it, at one place. */
template <int COUNT> static __device__ __forceinline__ void setmaxnreg_inc()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> static __device__ __forceinline__ void setmaxnreg_dec()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* What stands before stays before, and what stands behind, behind. The assembler moves waits up over arithmetic that
 * does not need them, so that nothing overlaps any more, but not past the end of a basic block, as this is. (It says
 * then, C7517, that it waits for products before this itself, where the caller does behind. In hopper_short it moves
 * that wait up in turn: look at the machine code.) never: false, but nothing that the compiler can know. */
static __device__ __forceinline__ void keep_order(bool never)
{
    if (never) asm volatile("exit;");
}

/* Named barriers 0 to 15 of a block (0 is __syncthreads): `threads` of them arrive, of which some also wait. */
static __device__ __forceinline__ void bar_sync(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
static __device__ __forceinline__ void bar_arrive(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* They wait as in bar_sync, and hear whether x is true in any of them. */
static __device__ __forceinline__ bool bar_any(int barrier, int threads, bool x)
{
    uint32_t any;
    asm volatile("{\n"
                 ".reg .pred own, all;\n"
                 "setp.ne.u32 own, %3, 0;\n"
                 "bar.red.or.pred all, %1, %2, own;\n"
                 "selp.u32 %0, 1, 0, all;\n"
                 "}"
                 : "=r"(any)
                 : "r"(barrier), "r"(threads), "r"((uint32_t)x)
                 : "memory");
    return any != 0;
}

#endif /* FC_COMMON_PTX_CUH */
