// The host's version of what a kernel may use. A kernel's .cu file, compiled by g++ with this header instead of CUDA's
// device functions, becomes an image that the emulated driver runs: one fiber for each thread of a block.
//
// Barriers and shuffles are for whole blocks and whole warps: everything else aborts with the kernel, block and thread.
// Under ThreadSanitizer only barriers, and atomics with the fences around them, order memory, as on a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include <vector_types.h>
#include <vector_functions.h>

#include "image.h"

#undef __shared__
#define __shared__ static_assert(false, "shared memory is dynamic here: emu_dynamic_shared()");

namespace emu {

struct Thread {
    uint3 thread;
    uint3 block;
    dim3 block_size;
    dim3 grid_size;
    unsigned cluster_size;
    unsigned cluster_rank;
    void *shared;
};

extern const Thread *current;  // set by the scheduler before a thread goes on

void block_barrier(const char *file, int line);
void cluster_barrier(const char *file, int line);
void warp_barrier(unsigned mask, const char *file, int line);
std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned lane, const char *file, int line);
unsigned lane();
void *map_shared(void *address, unsigned rank);
void pause();
void fence();
void before_atomic(const void *address);
void after_atomic(const void *address);
void add_kernel(const EmuKernel *kernel);

template <class T>
T shuffle(unsigned mask, T value, unsigned from, const char *file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves four or eight bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, from, file, line);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Relaxed, as CUDA's atomics are; a fence before it or after it orders what stands around it. Stricter than CUDA: a
// fence serves the next atomic after it only, so each atomic that publishes something needs its own.
template <class T, class Operation>
T atomic(T *address, Operation operation) {
    before_atomic(address);
    T old = operation();
    after_atomic(address);
    return old;
}

template <auto function>
struct Entry;

template <class... P, void (*function)(P...)>
struct Entry<function> {
    static constexpr EmuParameter parameters[sizeof...(P) + 1] = {{sizeof(P), alignof(P)}..., {0, 1}};

    template <std::size_t... I>
    static void call(void *const *arguments, std::index_sequence<I...>) {
        (void)arguments;
        function(*static_cast<const P *>(arguments[I])...);
    }

    static void invoke(void *const *arguments) { call(arguments, std::index_sequence_for<P...>{}); }

    static EmuKernel describe(const char *name, unsigned cluster) {
        return {name, &invoke, parameters, sizeof...(P), cluster};
    }
};

class Registration {
public:
    explicit Registration(const EmuKernel &kernel) : kernel_(kernel) { add_kernel(&kernel_); }

private:
    EmuKernel kernel_;
};

}  // namespace emu

// After the definition of an extern "C" kernel, at namespace scope: an image finds it by this name. With nvcc define
// both to nothing.
#define SHAREDNORM_KERNEL(name) SHAREDNORM_CLUSTER_KERNEL(name, 1)
// The same for a kernel that is compiled with __cluster_dims__(blocks, 1, 1).
#define SHAREDNORM_CLUSTER_KERNEL(name, blocks) \
    static const emu::Registration emu_registration_of_##name{emu::Entry<&name>::describe(#name, blocks)}

#define threadIdx (emu::current->thread)
#define blockIdx (emu::current->block)
#define blockDim (emu::current->block_size)
#define gridDim (emu::current->grid_size)
#define warpSize 32

// The builtins say where a call stands in the source, for the messages and to tell one barrier from another.
inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    emu::block_barrier(file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    emu::warp_barrier(mask, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emu::shuffle(mask, value, static_cast<unsigned>(from) % 32, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    const unsigned from = emu::lane() ^ static_cast<unsigned>(bits);
    return emu::shuffle(mask, value, from < 32 ? from : emu::lane(), file, line);
}

// A lane without a source keeps its own value, as on a GPU.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, const char *file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    const unsigned from = emu::lane() + by;
    return emu::shuffle(mask, value, from < 32 ? from : emu::lane(), file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, const char *file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
    const unsigned lane = emu::lane();
    return emu::shuffle(mask, value, lane >= by ? lane - by : lane, file, line);
}

inline unsigned atomicAdd(unsigned *address, unsigned value) {
    return emu::atomic(address, [=] { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); });
}

inline unsigned atomicOr(unsigned *address, unsigned value) {
    return emu::atomic(address, [=] { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); });
}

inline unsigned atomicExch(unsigned *address, unsigned value) {
    return emu::atomic(address, [=] { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); });
}

// Another fence than CUDA's would be stronger than the kernel may rely on: it orders atomics only.
inline void __threadfence() { emu::fence(); }

// A loop that waits for another block calls this, and lets other threads go on.
inline void __nanosleep(unsigned) { emu::pause(); }

// The block's dynamic shared memory, as many bytes as the launch asked for. It begins full of NaN.
inline void *emu_dynamic_shared() { return emu::current->shared; }

// Clusters: what cooperative_groups offers, for one dimension.
inline unsigned emu_cluster_rank() { return emu::current->cluster_rank; }
inline unsigned emu_cluster_size() { return emu::current->cluster_size; }
inline void emu_cluster_sync(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    emu::cluster_barrier(file, line);
}
// The same place in the shared memory of another block of the cluster.
template <class T>
T *emu_map_shared(T *address, unsigned rank) {
    return static_cast<T *>(emu::map_shared(address, rank));
}
// An atomic read, for a flag that another block sets.
inline unsigned emu_load(const unsigned *address) {
    const unsigned value = __atomic_load_n(address, __ATOMIC_RELAXED);
    emu::after_atomic(address);
    return value;
}
