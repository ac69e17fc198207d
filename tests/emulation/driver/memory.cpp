// Device memory is host memory with guards on both sides, full of NaN at first; every copy is checked against it.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>

#include "driver.h"

namespace emulated {

namespace {

constexpr std::size_t guard_bytes = 512;  // a multiple of the 256 bytes that the driver aligns to
constexpr unsigned char fresh = 0xff;     // a NaN in every float format
constexpr unsigned char guard = 0xa5;
constexpr unsigned char freed = 0xdb;

using Poison = void (*)(const volatile void *, std::size_t);

Poison asan(const char *name) { return reinterpret_cast<Poison>(dlsym(RTLD_DEFAULT, name)); }

std::string hex(CUdeviceptr address) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
    return text;
}

// The guards as a sanitizer sees them: without it the bytes tell, after the launch.
char *guarded(std::size_t bytes) {
    void *block = nullptr;
    if (posix_memalign(&block, 256, bytes + 2 * guard_bytes) != 0) throw Failure{CUDA_ERROR_OUT_OF_MEMORY};
    const auto start = static_cast<char *>(block);
    std::memset(start, guard, guard_bytes);
    std::memset(start + guard_bytes, fresh, bytes);
    std::memset(start + guard_bytes + bytes, guard, guard_bytes);
    if (const Poison poison = asan("__asan_poison_memory_region")) {
        poison(start, guard_bytes);
        poison(start + guard_bytes + bytes, guard_bytes);
    }
    return start;
}

void release(const Allocation &allocation) {
    if (const Poison unpoison = asan("__asan_unpoison_memory_region")) {
        unpoison(allocation.block, allocation.bytes + 2 * guard_bytes);
    }
    std::memset(allocation.block, freed, allocation.bytes + 2 * guard_bytes);
    std::free(allocation.block);
}

bool intact(const char *bytes) {
    return std::all_of(bytes, bytes + guard_bytes, [](char c) { return static_cast<unsigned char>(c) == guard; });
}

// Whether work that has not run yet will touch this memory of the host.
bool in_use(const char *start, std::size_t bytes) {
    for (CUstream stream : driver().streams) {
        for (const Operation &operation : stream->operations) {
            if (operation.host != nullptr && operation.host < start + bytes && start < operation.host + operation.host_bytes) {
                return true;
            }
        }
    }
    return false;
}

void forget_pinned(const char *call, void *address, bool registered) {
    Driver &d = driver();
    const auto found = d.pinned.find(reinterpret_cast<std::uintptr_t>(address));
    if (found == d.pinned.end() || found->second.registered != registered) {
        refuse(call, CUDA_ERROR_INVALID_VALUE, "no pinned memory begins there: freed twice?");
    }
    if (in_use(static_cast<char *>(address), found->second.bytes)) {
        die(std::string(call) + ": use after free: a copy that has not run yet will touch this memory");
    }
    d.pinned.erase(found);
}

}  // namespace

bool address_sanitizer() { return asan("__asan_poison_memory_region") != nullptr; }

std::size_t used_bytes(CUdevice device) {
    std::size_t bytes = 0;
    for (const auto &[address, allocation] : driver().allocations) {
        if (allocation.context->device == device) bytes += allocation.bytes;
    }
    return bytes;
}

void check_device_range(const char *call, CUdeviceptr address, std::size_t bytes) {
    if (bytes == 0) return;
    auto &allocations = driver().allocations;
    auto found = allocations.upper_bound(address);
    if (found != allocations.begin()) {
        --found;
        const std::size_t offset = address - found->first;
        if (offset < found->second.bytes && bytes <= found->second.bytes - offset) return;
        if (offset < found->second.bytes) {
            refuse(call, CUDA_ERROR_INVALID_VALUE, "out of bounds: " + std::to_string(bytes) + " bytes at offset " +
                                                       std::to_string(offset) + " of an allocation of " +
                                                       std::to_string(found->second.bytes));
        }
    }
    refuse(call, CUDA_ERROR_INVALID_VALUE, "no allocation holds " + hex(address) + ": out of bounds, or used after free");
}

void check_guards(const char *kernel) {
    if (address_sanitizer()) return;
    for (const auto &[address, allocation] : driver().allocations) {
        const bool before = intact(allocation.block);
        if (before && intact(allocation.block + guard_bytes + allocation.bytes)) continue;
        die(std::string("kernel ") + kernel + ": a write out of bounds, " + (before ? "behind" : "before") +
            " an allocation of " + std::to_string(allocation.bytes) + " bytes");
    }
}

bool is_pinned(const void *address, std::size_t bytes) {
    auto &pinned = driver().pinned;
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    auto found = pinned.upper_bound(start);
    if (found == pinned.begin()) return false;
    --found;
    return start - found->first + bytes <= found->second.bytes;
}

void forget_context(CUcontext context) {
    Driver &d = driver();
    std::size_t count = 0;
    for (auto it = d.allocations.begin(); it != d.allocations.end();) {
        if (it->second.context != context) {
            ++it;
            continue;
        }
        release(it->second);
        it = d.allocations.erase(it);
        ++count;
    }
    if (count > 0) {
        d.counts["leaks"] += static_cast<long long>(count);
        note("context", "leak: destroyed with " + std::to_string(count) + " device allocations");
    }
}

}  // namespace emulated

using namespace emulated;

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    return call_in_context("cuMemAlloc", [&](Driver &d, CUcontext context) {
        if (bytes == 0) throw Failure{CUDA_ERROR_INVALID_VALUE};
        const Device &device = d.devices[static_cast<std::size_t>(context->device)];
        ++d.counts["allocations"];
        if (fails("allocation") || bytes > device.memory - used_bytes(context->device)) {
            throw Failure{CUDA_ERROR_OUT_OF_MEMORY};
        }
        Allocation allocation;
        allocation.bytes = bytes;
        allocation.context = context;
        allocation.block = guarded(bytes);
        *address = reinterpret_cast<CUdeviceptr>(allocation.block + guard_bytes);
        d.allocations[*address] = allocation;
    });
}

// Waits for the device, as the real one does.
CUresult cuMemFree(CUdeviceptr address) {
    return call_in_context("cuMemFree", [&](Driver &d, CUcontext) {
        if (address == 0) return;
        const auto found = d.allocations.find(address);
        if (found == d.allocations.end()) {
            refuse("cuMemFree", CUDA_ERROR_INVALID_VALUE, "no allocation begins at " + hex(address) + ": freed twice?");
        }
        finish_all(found->second.context);
        release(found->second);
        d.allocations.erase(found);
    });
}

CUresult cuMemGetInfo(size_t *available, size_t *total) {
    return call_in_context("cuMemGetInfo", [&](Driver &d, CUcontext context) {
        *total = d.devices[static_cast<std::size_t>(context->device)].memory;
        *available = *total - used_bytes(context->device);
    });
}

CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    return call_in_context("cuMemGetAddressRange", [&](Driver &d, CUcontext) {
        check_device_range("cuMemGetAddressRange", address, 1);
        const auto found = std::prev(d.allocations.upper_bound(address));
        if (base != nullptr) *base = found->first;
        if (bytes != nullptr) *bytes = found->second.bytes;
    });
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    return call_in_context("cuMemHostAlloc", [&](Driver &d, CUcontext context) {
        ++d.counts["allocations"];
        if (bytes == 0) throw Failure{CUDA_ERROR_INVALID_VALUE};
        if (fails("allocation") || posix_memalign(address, 4096, bytes) != 0) throw Failure{CUDA_ERROR_OUT_OF_MEMORY};
        std::memset(*address, fresh, bytes);
        Pinned pinned;
        pinned.bytes = bytes;
        pinned.context = context;
        pinned.flags = flags;
        d.pinned[reinterpret_cast<std::uintptr_t>(*address)] = pinned;
    });
}

CUresult cuMemFreeHost(void *address) {
    return call_in_context("cuMemFreeHost", [&](Driver &, CUcontext) {
        forget_pinned("cuMemFreeHost", address, false);
        std::free(address);
    });
}

CUresult cuMemHostRegister(void *address, size_t bytes, unsigned flags) {
    return call_in_context("cuMemHostRegister", [&](Driver &d, CUcontext context) {
        if (bytes == 0) throw Failure{CUDA_ERROR_INVALID_VALUE};
        if (is_pinned(address, 1)) throw Failure{CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED};
        Pinned pinned;
        pinned.bytes = bytes;
        pinned.context = context;
        pinned.registered = true;
        pinned.flags = flags;
        d.pinned[reinterpret_cast<std::uintptr_t>(address)] = pinned;
    });
}

CUresult cuMemHostUnregister(void *address) {
    return call_in_context("cuMemHostUnregister",
                           [&](Driver &, CUcontext) { forget_pinned("cuMemHostUnregister", address, true); });
}

CUresult cuMemHostGetFlags(unsigned *flags, void *address) {
    return call_in_context("cuMemHostGetFlags", [&](Driver &d, CUcontext) {
        if (!is_pinned(address, 1)) throw Failure{CUDA_ERROR_INVALID_VALUE};
        *flags = std::prev(d.pinned.upper_bound(reinterpret_cast<std::uintptr_t>(address)))->second.flags;
    });
}
