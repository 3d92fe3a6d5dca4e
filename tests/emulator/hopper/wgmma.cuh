/*
 * wgmma.cuh - in place of kernels/hopper/wgmma.cuh: d [64, N] += a [64, 16] @ b [16, N] by the 128 fibers of a
 * warpgroup.
 *
 * Tiles lie in slabs of 64 columns, rows of 128 bytes, swizzled. A descriptor is a shared address and how far apart
 * the slabs are. The layout of d and of an a in registers is that of the real header. What is issued runs when its
 * group is waited for, as late as it may, and after all others have run on.
 */
#ifndef FC_HOPPER_WGMMA_CUH
#define FC_HOPPER_WGMMA_CUH

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/variant.h"

namespace fc {

inline void wgmma_fence() {}
inline void wgmma_commit()
{
    emulator_warpgroup &all = emulator_this_warpgroup();
    all.pending[threadIdx.x % 128]++;
    emulator_meet(all.meeting, 128, [&] {
        all.groups.push_back(std::move(all.issued));
        all.issued.clear();
    });
}
/* Waits have no partners: a warp may wait again for what it has waited for. */
template <int PENDING> void wgmma_wait()
{
    emulator_warpgroup &all = emulator_this_warpgroup();
    size_t &pending = all.pending[threadIdx.x % 128];
    if (pending <= PENDING) return;
    pending = PENDING;
    emulator_give_way();
    emulator_meet(all.meeting, 128, [&] {
        for (; all.groups.size() > PENDING; all.groups.pop_front())
            for (const auto &product : all.groups.front()) product();
    });
}
template <class X, int COUNT> void hold(X (&)[COUNT]) {}

inline uint64_t tile_descriptor(uint32_t smem, uint32_t slab_bytes)
{
    return (uint64_t)slab_bytes << 32 | smem;
}
inline uint64_t advance(uint64_t descriptor, uint32_t bytes)
{
    return descriptor + bytes;
}

inline float emulator_number(uint32_t address)
{
    uint16_t x;
    memcpy(&x, dynamic_smem + emulator_swizzle(address), 2);
    return FC_DTYPE::to_float(x);
}

template <int N, bool A_IN_REGISTERS, bool B_TRANSPOSED, int ACCUMULATE, class A>
void emulator_multiply(const std::array<float *, 128> &d, const std::array<const uint32_t *, 128> &registers, A a,
                       uint64_t b)
{
    float left[64][16], right[16][N];
    for (int row = 0; row < 64; row++) {
        for (int k = 0; k < 16; k++) {
            if constexpr (A_IN_REGISTERS) {
                const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
                const uint32_t pair = registers[thread][row % 16 / 8 + k / 8 * 2];
                left[row][k] = FC_DTYPE::to_float((uint16_t)(pair >> 16 * (k % 2)));
            } else {
                left[row][k] = emulator_number((uint32_t)a + 128 * row + 2 * k);
            }
        }
    }
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < N; n++) {
            const uint32_t slab = n / 64 * (uint32_t)(b >> 32);
            right[k][n] = B_TRANSPOSED ? emulator_number((uint32_t)b + slab + 128 * k + n % 64 * 2)
                                       : emulator_number((uint32_t)b + 128 * n + 2 * k);
        }
    }
    for (int row = 0; row < 64; row++) {
        float sums[N] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < N; n++) sums[n] += left[row][k] * right[k][n];
        for (int n = 0; n < N; n++) {
            float &x = d[row / 16 * 32 + row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
            x = (ACCUMULATE ? x : 0) + sums[n];
        }
    }
}

template <int N, bool A_IN_REGISTERS, bool B_TRANSPOSED, int ACCUMULATE, class A>
void emulator_wgmma(float *d, A a, uint64_t b)
{
    emulator_warpgroup &all = emulator_this_warpgroup();
    all.d[threadIdx.x % 128] = d;
    if constexpr (A_IN_REGISTERS) all.a[threadIdx.x % 128] = a;
    emulator_meet(all.meeting, 128, [&] {
        all.issued.push_back([a, b, d = all.d, registers = all.a] {
            emulator_multiply<N, A_IN_REGISTERS, B_TRANSPOSED, ACCUMULATE>(d, registers, a, b);
        });
    });
}

template <int ACCUMULATE, int D> void wgmma_ss(float (&d)[D], uint64_t a, uint64_t b)
{
    emulator_wgmma<2 * D, false, false, ACCUMULATE>(d, a, b);
}
template <int ACCUMULATE, int D> void wgmma_rs(float (&d)[D], const uint32_t *a, uint64_t b)
{
    emulator_wgmma<2 * D, true, true, ACCUMULATE>(d, a, b);
}

} // namespace fc

#endif /* FC_HOPPER_WGMMA_CUH */
