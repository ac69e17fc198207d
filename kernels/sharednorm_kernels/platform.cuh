// Everything that a GPU offers beyond C++, in one place.
//
// The kernels use these names and no intrinsic of their own. With SHAREDNORM_EMULATED the same kernels compile
// with a host compiler: emulated_cuda.h stands in for the machine, and this header hides the difference.
//
// Rules that the rest follows: shuffles and barriers are reached by every thread of the block, so no thread
// returns early; shared memory comes through SHARED_MEMORY alone; no atomics on floating-point numbers.
#pragma once

#ifdef SHAREDNORM_EMULATED
#include "emulated_cuda.h"

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define UNROLLED  // a matter of registers only
#define SHARED_MEMORY(name) uint4 *const name = static_cast<uint4 *>(emu_dynamic_shared())
#else
#include <cooperative_groups.h>

// Before a loop with constant bounds: its arrays live in registers only if it is unrolled.
#define UNROLLED _Pragma("unroll")
#define SHARED_MEMORY(name) extern __shared__ uint4 name[]
// Announces an entry by its name; a GPU needs no such announcement.
#define SHAREDNORM_KERNEL(name) static_assert(true)
#define SHAREDNORM_CLUSTER_KERNEL(name, blocks) static_assert(true)
#endif

// Clusters begin with compute capability 9.0; images for older GPUs are without those entries.
#if defined(SHAREDNORM_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SHAREDNORM_CLUSTERS 1
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sharednorm {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 512;  // of a block; leaves 128 registers to each thread
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr double LARGEST = 3.4028234663852886e38;  // float32

// Waits for every thread of the block; what was written to shared memory before is seen after.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ double shuffle_xor(double value, int mask) {
    return __shfl_xor_sync(FULL_WARP, value, mask);
}

__device__ __forceinline__ double shuffle_down(double value, int distance) {
    return __shfl_down_sync(FULL_WARP, value, distance);
}

#ifdef SHAREDNORM_CLUSTERS
// Waits for every thread of the cluster; what was written to shared memory before is seen by all of them after.
__device__ __forceinline__ void cluster_barrier() {
#ifdef SHAREDNORM_EMULATED
    emu_cluster_sync();
#else
    cooperative_groups::this_cluster().sync();
#endif
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ const double *shared_of_block(double *address, unsigned rank) {
#ifdef SHAREDNORM_EMULATED
    return emu_map_shared(address, rank);
#else
    return cooperative_groups::this_cluster().map_shared_rank(address, rank);
#endif
}
#endif

// Operations that the compiler must not contract into one with a single rounding. On the host the kernels are
// compiled so that it never does.
#ifdef SHAREDNORM_EMULATED
__device__ __forceinline__ double product_of(double a, double b) { return a * b; }
__device__ __forceinline__ double sum_of(double a, double b) { return a + b; }
#else
__device__ __forceinline__ double product_of(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double sum_of(double a, double b) { return __dadd_rn(a, b); }
#endif

// Atomics, on integers only: the order of arrival leaves no trace in a result.
__device__ __forceinline__ unsigned add_one(unsigned *counter) { return atomicAdd(counter, 1u); }

// Orders what the thread wrote before with what it does to a counter after, and what it saw of a counter with what it
// reads after: for the whole device.
__device__ __forceinline__ void device_fence() { __threadfence(); }

// Waits until a counter has reached a number; other blocks are what makes it grow.
__device__ __forceinline__ void wait_for(const unsigned *counter, unsigned number) {
#ifdef SHAREDNORM_EMULATED
    while (emu_load(counter) < number) __nanosleep(100);
#else
    while (*static_cast<const volatile unsigned *>(counter) < number) __nanosleep(100);
#endif
}

// 16 bytes at an address that is a multiple of 16.
__device__ __forceinline__ uint4 load_16_bytes(const void *from) {
#ifdef SHAREDNORM_EMULATED
    uint4 bytes;
    std::memcpy(&bytes, __builtin_assume_aligned(from, 16), sizeof(bytes));
    return bytes;
#else
    return *static_cast<const uint4 *>(from);
#endif
}

// The same for what is read for the last time: it makes room in the caches first.
__device__ __forceinline__ uint4 load_last_16_bytes(const void *from) {
#ifdef SHAREDNORM_EMULATED
    return load_16_bytes(from);
#else
    return __ldcs(static_cast<const uint4 *>(from));
#endif
}

// Writes what nobody reads soon: it makes room in the caches first, and leaves them to what is read again.
__device__ __forceinline__ void store_16_bytes(void *to, const uint4 &bytes) {
#ifdef SHAREDNORM_EMULATED
    std::memcpy(__builtin_assume_aligned(to, 16), &bytes, sizeof(bytes));
#else
    __stcs(static_cast<uint4 *>(to), bytes);
#endif
}

// What a thread copies to shared memory while it goes on, in steps: it reads what a step has brought once it has waited
// for it. Needs no registers, and so can have many bytes under way. On the host a copy happens when it is waited for,
// so that whoever reads too soon reads what was there before.
class Copies {
   public:
    // 16 bytes, both at multiples of 16.
    __device__ __forceinline__ void begin(uint4 *to, const void *from) {
#ifdef SHAREDNORM_EMULATED
        step_.emplace_back(to, from);
#else
        const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
#endif
    }

    // Ends a step; it may be empty.
    __device__ __forceinline__ void end_step() {
#ifdef SHAREDNORM_EMULATED
        steps_.push_back(std::move(step_));
        step_.clear();
#else
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Waits for all steps but the last `STEPS`.
    template <int STEPS>
    __device__ __forceinline__ void wait_for_all_but() {
#ifdef SHAREDNORM_EMULATED
        for (; steps_.size() > STEPS; steps_.pop_front()) {
            for (const auto &[to, from] : steps_.front()) *to = load_16_bytes(from);
        }
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STEPS) : "memory");
#endif
    }

#ifdef SHAREDNORM_EMULATED
   private:
    using Step = std::vector<std::pair<uint4 *, const void *>>;
    Step step_;
    std::deque<Step> steps_;
#endif
};

__device__ __forceinline__ float float_of_bits(unsigned bits) {
#ifdef SHAREDNORM_EMULATED
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
#else
    return __uint_as_float(bits);
#endif
}

__device__ __forceinline__ unsigned bits_of_float(float value) {
#ifdef SHAREDNORM_EMULATED
    unsigned bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
#else
    return __float_as_uint(value);
#endif
}

__device__ __forceinline__ float widen_float16(unsigned short bits) { return __half2float(__half(__half_raw{bits})); }

__device__ __forceinline__ float widen_bfloat16(unsigned short bits) {
    return float_of_bits(static_cast<unsigned>(bits) << 16);  // a bfloat16 is the upper half of a float32
}

__device__ __forceinline__ unsigned short narrow_float16(float value) {
    return static_cast<__half_raw>(__float2half_rn(value)).x;
}

__device__ __forceinline__ unsigned short narrow_bfloat16(float value) {
    return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x;
}

}  // namespace sharednorm
