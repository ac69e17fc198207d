// Kernels that break a rule, one each, and a few that keep it: the checks must tell them apart.
#include "emulated_cuda.h"

namespace {

float *shared() { return static_cast<float *>(emu_dynamic_shared()); }

}  // namespace

// y[i] = what the next thread wrote to shared memory; BARRIER leaves the barrier out.
template <bool barrier>
static void neighbour(float *y, unsigned n) {
    (void)n;
    shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier) __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = shared()[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void with_barrier(float *y, unsigned n) { neighbour<true>(y, n); }
SHAREDNORM_KERNEL(with_barrier);
extern "C" __global__ void missing_barrier(float *y, unsigned n) { neighbour<false>(y, n); }
SHAREDNORM_KERNEL(missing_barrier);

// Each thread has an array of its own, in memory: blocks that come one after the other find it at the same addresses.
__attribute__((noinline)) static void fill(float *values, unsigned n) {
    for (unsigned i = 0; i < 8; ++i) values[i] = static_cast<float>(n + i);
}

extern "C" __global__ void own_array(float *y, unsigned n) {
    float values[8];
    fill(values, n);
    y[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x % 8];
}
SHAREDNORM_KERNEL(own_array);

// Every block writes the same place.
extern "C" __global__ void racing_blocks(float *y, unsigned n) {
    (void)n;
    if (threadIdx.x == 0) y[0] = static_cast<float>(blockIdx.x);
}
SHAREDNORM_KERNEL(racing_blocks);

// The last block adds up what all blocks wrote; y[n - 1] counts them. A fence before an earlier atomic does not count.
template <bool fence>
static void last_block(float *y, unsigned n) {
    unsigned *counter = reinterpret_cast<unsigned *>(y + n - 1);
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(counter - 1, 1u);
    y[blockIdx.x] = 1.0f;
    if (fence) __threadfence();
    if (atomicAdd(counter, 1u) + 1 != gridDim.x) return;
    if (fence) __threadfence();
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += y[block];
    y[gridDim.x] = sum;
}

extern "C" __global__ void with_fence(float *y, unsigned n) { last_block<true>(y, n); }
SHAREDNORM_KERNEL(with_fence);
extern "C" __global__ void missing_fence(float *y, unsigned n) { last_block<false>(y, n); }
SHAREDNORM_KERNEL(missing_fence);

extern "C" __global__ void write_behind(float *y, unsigned n) {
    if (threadIdx.x == 0) y[n] = 1.0f;
}
SHAREDNORM_KERNEL(write_behind);

extern "C" __global__ void write_before(float *y, unsigned n) {
    (void)n;
    if (threadIdx.x == 0) y[-1] = 1.0f;
}
SHAREDNORM_KERNEL(write_before);

extern "C" __global__ void read_behind(float *y, unsigned n) {
    if (threadIdx.x == 0) y[0] = y[n];
}
SHAREDNORM_KERNEL(read_behind);

// For a launch with 4 bytes a thread.
extern "C" __global__ void shared_behind(float *y, unsigned n) {
    (void)n;
    shared()[threadIdx.x + 1] = 0.0f;
    __syncthreads();
    y[threadIdx.x] = shared()[threadIdx.x];
}
SHAREDNORM_KERNEL(shared_behind);

extern "C" __global__ void uninitialized_shared(float *y, unsigned n) {
    (void)n;
    y[threadIdx.x] = shared()[threadIdx.x];
}
SHAREDNORM_KERNEL(uninitialized_shared);

extern "C" __global__ void misaligned(float *y, unsigned n) {
    (void)n;
    if (threadIdx.x == 0) *reinterpret_cast<float4 *>(y + 1) = float4{};
}
SHAREDNORM_KERNEL(misaligned);

extern "C" __global__ void early_return(float *y, unsigned n) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    y[threadIdx.x] = static_cast<float>(n);
}
SHAREDNORM_KERNEL(early_return);

extern "C" __global__ void two_barriers(float *y, unsigned n) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        y[0] = static_cast<float>(n);
        __syncthreads();
    }
}
SHAREDNORM_KERNEL(two_barriers);

extern "C" __global__ void barrier_and_shuffle(float *y, unsigned n) {
    if (threadIdx.x == 7) {
        __syncthreads();
    } else {
        y[0] = __shfl_xor_sync(0xffffffffu, static_cast<float>(n), 1);
    }
}
SHAREDNORM_KERNEL(barrier_and_shuffle);

extern "C" __global__ void half_a_warp(float *y, unsigned n) {
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<float>(n), 1);
}
SHAREDNORM_KERNEL(half_a_warp);

// Waits for the block before it.
extern "C" __global__ void wait_for_another(float *y, unsigned n) {
    unsigned *flag = reinterpret_cast<unsigned *>(y);
    (void)n;
    if (blockIdx.x == 0) {
        while (emu_load(flag) == 0) __nanosleep(100);
    } else {
        atomicExch(flag, 1u);
    }
}
SHAREDNORM_KERNEL(wait_for_another);

// y = the rank of the next block of the cluster, from its shared memory.
template <bool barrier>
static void cluster_neighbour(float *y) {
    shared()[threadIdx.x] = static_cast<float>(emu_cluster_rank());
    if (barrier) emu_cluster_sync();
    const unsigned next = (emu_cluster_rank() + 1) % emu_cluster_size();
    y[blockIdx.x * blockDim.x + threadIdx.x] = emu_map_shared(shared(), next)[threadIdx.x];
    emu_cluster_sync();
}

extern "C" __global__ void cluster_with_barrier(float *y, unsigned n) {
    (void)n;
    cluster_neighbour<true>(y);
}
SHAREDNORM_CLUSTER_KERNEL(cluster_with_barrier, 4);
extern "C" __global__ void cluster_missing_barrier(float *y, unsigned n) {
    (void)n;
    cluster_neighbour<false>(y);
}
SHAREDNORM_CLUSTER_KERNEL(cluster_missing_barrier, 4);

// Every shuffle, and what each lane got: y[kind * 32 + lane].
extern "C" __global__ void shuffles(float *y, unsigned n) {
    (void)n;
    const int lane = static_cast<int>(threadIdx.x);
    y[lane] = __shfl_sync(0xffffffffu, static_cast<float>(lane), 3);
    y[32 + lane] = static_cast<float>(__shfl_xor_sync(0xffffffffu, static_cast<double>(lane), 5));
    y[64 + lane] = static_cast<float>(__shfl_down_sync(0xffffffffu, lane, 4));
    y[96 + lane] = static_cast<float>(__shfl_up_sync(0xffffffffu, static_cast<unsigned>(lane), 4));
    __syncwarp();
}
SHAREDNORM_KERNEL(shuffles);

// y[i] = the order in which the threads came here: what a schedule decides.
extern "C" __global__ void arrivals(float *y, unsigned n) {
    unsigned *counter = reinterpret_cast<unsigned *>(y + n - 1);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = static_cast<float>(atomicAdd(counter, 1u));
}
SHAREDNORM_KERNEL(arrivals);
