/*
 * ptx.cuh - in place of kernels/common/ptx.cuh: what each instruction does, on fibers.
 *
 * A shared address is the offset in the cluster's shared memory. A barrier in it is known by its address.
 */
#ifndef FC_COMMON_PTX_CUH
#define FC_COMMON_PTX_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <vector>

inline float ex2_approx_ftz(float a)
{
    const float d = exp2f(a);
    return d < 1.17549435e-38f ? 0 : d;
}
inline float rcp_approx_ftz(float a)
{
    return 1 / a;
}
inline uint32_t cvt_rn_f16x2(float high, float low)
{
    return (uint32_t)__half_as_ushort(__float2half_rn(high)) << 16 | __half_as_ushort(__float2half_rn(low));
}
inline uint32_t cvt_rn_bf16x2(float high, float low)
{
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16 |
           __bfloat16_as_ushort(__float2bfloat16_rn(low));
}

inline unsigned char *dynamic_shared()
{
    return dynamic_smem + emulator_rank * EMULATOR_SMEM_BYTES;
}
inline uint32_t shared_address(const void *pointer)
{
    return (uint32_t)((const unsigned char *)pointer - dynamic_smem);
}
inline uint32_t mapa(uint32_t address, int rank)
{
    return address % EMULATOR_SMEM_BYTES + (uint32_t)rank * EMULATOR_SMEM_BYTES;
}

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t address)
{
    for (int m = 0; m < 4; m++) {
        const uint32_t row =
            emulator_exchange(address, [=](const uint32_t *all, int lane) { return all[8 * m + lane / 4]; });
        memcpy(&d[m], dynamic_smem + row + threadIdx.x % 4 * 4, 4);
    }
}

inline void stmatrix_x4(uint32_t address, const uint32_t (&d)[4])
{
    for (int m = 0; m < 4; m++) {
        const uint32_t row =
            emulator_exchange(address, [=](const uint32_t *all, int lane) { return all[8 * m + lane / 4]; });
        memcpy(dynamic_smem + row + threadIdx.x % 4 * 4, &d[m], 4);
    }
}

struct emulator_mbarrier {
    uint32_t count = 0, arrived = 0, phase = 0;
    int64_t bytes = 0; /* still to come */

    void settle()
    {
        if (arrived == count && bytes == 0) arrived = 0, phase++, emulator_progress();
    }
};
inline std::map<uint32_t, emulator_mbarrier> emulator_mbarriers; /* of the block that runs */
inline std::map<int, emulator_meeting> emulator_named_barriers;
inline int emulator_named(int barrier)
{
    return barrier + 1000 * emulator_rank;
}

inline void mbarrier_init(uint32_t barrier, uint32_t count)
{
    emulator_mbarriers[barrier] = {count, 0, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier)
{
    emulator_mbarrier &it = emulator_mbarriers.at(barrier);
    it.arrived++;
    it.settle();
}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes)
{
    emulator_mbarriers.at(barrier).bytes += bytes;
    mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity)
{
    while ((emulator_mbarriers.at(barrier).phase & 1) == parity) emulator_yield();
}
inline bool mbarrier_test(uint32_t barrier, uint32_t parity)
{
    return (emulator_mbarriers.at(barrier).phase & 1) != parity;
}

/* Of rows of 128 bytes, or 64: a 16-byte piece's place in its row, by the row. */
inline uint32_t emulator_swizzle(uint32_t address, int row_bytes = 128)
{
    return address ^ (address >> 3 & (row_bytes == 128 ? 0x70 : 0x30));
}
/* Calls each(in shared memory, in the tensor or NULL outside) for every number of the box at (column, row, head,
 * batch), of which shared memory has a copy at `box`. */
template <class Each>
void emulator_box(uint32_t box, const CUtensorMap *map, int column, int row, int head, int batch, Each each)
{
    const int columns = map->box_bytes / map->number_bytes;
    for (int r = 0; r < map->box_rows; r++) {
        for (int c = 0; c < columns; c++) {
            const int64_t at[4] = {column + c, row + r, head, batch};
            bool inside = true;
            int64_t offset = 0;
            for (int i = 0; i < 4; i++) {
                inside &= 0 <= at[i] && at[i] < map->sizes[i];
                offset += at[i] * map->strides[i];
            }
            const uint32_t place =
                emulator_swizzle(box + (uint32_t)(map->box_bytes * r + map->number_bytes * c), map->box_bytes);
            each(dynamic_smem + place, inside ? map->data + offset : nullptr);
        }
    }
}
inline void cp_async_bulk_tensor(uint32_t target, const CUtensorMap *map, uint32_t barrier, int column, int row,
                                 int head, int batch)
{
    emulator_box(target, map, column, row, head, batch, [=](unsigned char *to, const unsigned char *from) {
        memset(to, 0, (size_t)map->number_bytes);
        if (from != nullptr) memcpy(to, from, (size_t)map->number_bytes);
    });
    emulator_mbarrier &it = emulator_mbarriers.at(barrier);
    it.bytes -= map->box_bytes * map->box_rows;
    it.settle();
}

/* Copies the other way are made as late as they may be: when their thread waits, and after all others have run on. */
struct emulator_store {
    const CUtensorMap *map;
    uint32_t source;
    int column, row, head, batch;
};
inline std::map<int, std::vector<emulator_store>> emulator_stores; /* of a thread of the cluster */
inline std::vector<emulator_store> &emulator_own_stores()
{
    return emulator_stores[emulator_rank * 1024 + (int)threadIdx.x];
}
inline void cp_async_bulk_tensor_store(const CUtensorMap *map, uint32_t source, int column, int row, int head,
                                       int batch)
{
    emulator_own_stores().push_back({map, source, column, row, head, batch});
}
inline void cp_async_bulk_commit_group() {}
inline void cp_async_bulk_wait_group_read()
{
    emulator_give_way();
    for (const emulator_store &it : emulator_own_stores())
        emulator_box(it.source, it.map, it.column, it.row, it.head, it.batch,
                     [&](const unsigned char *from, const unsigned char *to) {
                         if (to != nullptr) memcpy((void *)to, from, (size_t)it.map->number_bytes);
                     });
    emulator_own_stores().clear();
}
inline void fence_proxy_async() {}
inline void prefetch_tensormap(const CUtensorMap *) {}
inline void cp_async_bulk_prefetch_tensor(const CUtensorMap *, int, int, int, int) {}

inline void st_async(uint32_t address, uint32_t barrier, float x, float y, float z, float w)
{
    const float four[] = {x, y, z, w};
    memcpy(dynamic_smem + address, four, sizeof four);
    emulator_mbarrier &it = emulator_mbarriers.at(barrier);
    it.bytes -= sizeof four;
    it.settle();
}
inline uint32_t nsmid()
{
    return 132;
}
inline bool elect_sync()
{
    __syncwarp();
    return threadIdx.x % 32 == 7; /* any one will do */
}
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void keep_order(bool) {}

template <int COUNT> void setmaxnreg_inc() {}
template <int COUNT> void setmaxnreg_dec() {}

/* Arrivals that somebody waits for and such that nobody does count alike. */
inline void bar_arrive(int barrier, int threads)
{
    emulator_meeting &it = emulator_named_barriers[emulator_named(barrier)];
    if (++it.arrived == threads) it.arrived = 0, it.generation++, emulator_progress();
}
inline void bar_sync(int barrier, int threads)
{
    emulator_meet(emulator_named_barriers[emulator_named(barrier)], threads, [] {});
}
inline bool bar_any(int barrier, int threads, bool x)
{
    emulator_meeting &it = emulator_named_barriers[emulator_named(barrier)];
    it.any_so_far |= x;
    emulator_meet(it, threads, [&] { it.any = it.any_so_far, it.any_so_far = false; });
    return it.any;
}

#endif /* FC_COMMON_PTX_CUH */
