// The driver itself, devices and contexts.
//
//   SHAREDNORM_EMULATED_DEVICES   how many devices there are (the default is 1)
//   SHAREDNORM_EMULATED_DEVICE    what they are, where not an H200: memory=BYTES,multiprocessors=N,capability=8.0,
//                                 shared=BYTES (what a block may opt in to)

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace emulated {

namespace {

Device h200() {
    Device device;
    device.attributes = {
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
        {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024},
        {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
        {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
        {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
        {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 3201000},
        {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 6144},
        {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
        {CU_DEVICE_ATTRIBUTE_GPU_OVERLAP, 1},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
        {CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT, 0},
        {CU_DEVICE_ATTRIBUTE_INTEGRATED, 0},
        {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, CU_COMPUTEMODE_DEFAULT},
        {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
        {CU_DEVICE_ATTRIBUTE_ECC_ENABLED, 1},
        {CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, 0},
        {CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, 0},
        {CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, 0},
        {CU_DEVICE_ATTRIBUTE_TCC_DRIVER, 0},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 62914560},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
        {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
        {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
        {CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, 1},
    };
    return device;
}

void apply(Device &device, const std::string &key, const std::string &value) {
    auto &attributes = device.attributes;
    if (key == "memory") {
        device.memory = std::strtoull(value.c_str(), nullptr, 10);
    } else if (key == "multiprocessors") {
        attributes[CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] = std::atoi(value.c_str());
    } else if (key == "shared") {
        attributes[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN] = std::atoi(value.c_str());
    } else if (key == "capability" && value.find('.') != std::string::npos) {
        const int major = std::atoi(value.c_str());
        attributes[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] = major;
        attributes[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR] = std::atoi(value.c_str() + value.find('.') + 1);
        attributes[CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH] = major >= 9;
        device.name = "Emulated device of capability " + value;
    } else {
        die("SHAREDNORM_EMULATED_DEVICE: '" + key + "=" + value + "' is not known");
    }
}

Device configured() {
    Device device = h200();
    const char *text = std::getenv("SHAREDNORM_EMULATED_DEVICE");
    const std::string all = text != nullptr ? text : "";
    for (std::size_t start = 0; start < all.size();) {
        const std::size_t end = std::min(all.find(',', start), all.size());
        const std::size_t equals = std::min(all.find('=', start), end);
        apply(device, all.substr(start, equals - start), all.substr(std::min(equals + 1, end), end - std::min(equals + 1, end)));
        start = end + 1;
    }
    return device;
}

Device &device_of(Driver &d, CUdevice device) {
    if (device < 0 || static_cast<std::size_t>(device) >= d.devices.size()) throw Failure{CUDA_ERROR_INVALID_DEVICE};
    return d.devices[static_cast<std::size_t>(device)];
}

CUcontext make_context(Driver &d, CUdevice device, bool primary) {
    const auto context = new CUctx_st;
    context->device = device;
    context->primary = primary;
    context->legacy = new CUstream_st;
    context->legacy->context = context;
    context->legacy->legacy = true;
    d.contexts.insert(context);
    d.streams.insert(context->legacy);
    return context;
}

// What is left in a context goes with it; memory among it is a leak.
void destroy_context(Driver &d, CUcontext context) {
    finish_all(context);
    forget_context(context);
    for (auto it = d.streams.begin(); it != d.streams.end();) {
        if ((*it)->context != context) {
            ++it;
        } else {
            delete *it;
            it = d.streams.erase(it);
        }
    }
    d.contexts.erase(context);  // its memory stays: a thread may still have it on its stack
}

}  // namespace

Driver::Driver() {
    const char *text = std::getenv("SHAREDNORM_EMULATED_DEVICES");
    devices.assign(text != nullptr && *text != '\0' ? std::strtoul(text, nullptr, 10) : 1, configured());
}

}  // namespace emulated

using namespace emulated;

CUresult cuInit(unsigned) {
    return call("cuInit", [](Driver &d) {
        if (d.devices.empty()) throw Failure{CUDA_ERROR_NO_DEVICE};
        d.initialized = true;
    });
}

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    return call("cuDeviceGetCount", [&](Driver &d) { *count = static_cast<int>(d.devices.size()); });
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    return call("cuDeviceGet", [&](Driver &d) {
        device_of(d, ordinal);
        *device = ordinal;
    });
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    return call("cuDeviceGetName", [&](Driver &d) {
        if (length < 1) throw Failure{CUDA_ERROR_INVALID_VALUE};
        std::strncpy(name, device_of(d, device).name.c_str(), static_cast<std::size_t>(length) - 1);
        name[length - 1] = '\0';
    });
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    return call("cuDeviceTotalMem", [&](Driver &d) { *bytes = device_of(d, device).memory; });
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return call("cuDeviceGetAttribute", [&](Driver &d) {
        const auto &attributes = device_of(d, device).attributes;
        const auto found = attributes.find(attribute);
        if (found == attributes.end()) throw Failure{CUDA_ERROR_INVALID_VALUE};
        *value = found->second;
    });
}

CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    return call("cuDeviceComputeCapability", [&](Driver &d) {
        const auto &attributes = device_of(d, device).attributes;
        *major = attributes.at(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        *minor = attributes.at(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    });
}

CUresult cuDeviceGetPCIBusId(char *id, int length, CUdevice device) {
    return call("cuDeviceGetPCIBusId", [&](Driver &d) {
        device_of(d, device);
        const std::string text = "0000:0" + std::to_string(device % 10) + ":00.0";
        if (static_cast<std::size_t>(std::max(length, 0)) <= text.size()) throw Failure{CUDA_ERROR_INVALID_VALUE};
        std::strcpy(id, text.c_str());
    });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return call("cuDevicePrimaryCtxRetain", [&](Driver &d) {
        device_of(d, device);
        const auto found = d.primary.find(device);
        if (found == d.primary.end()) {
            d.primary[device] = make_context(d, device, true);
        } else {
            ++found->second->uses;
        }
        *context = d.primary[device];
    });
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    return call("cuDevicePrimaryCtxRelease", [&](Driver &d) {
        const auto found = d.primary.find(device);
        if (found == d.primary.end()) throw Failure{CUDA_ERROR_INVALID_CONTEXT};
        if (--found->second->uses > 0) return;
        destroy_context(d, found->second);
        d.primary.erase(found);
    });
}

CUresult cuCtxCreate(CUcontext *context, CUctxCreateParams *, unsigned, CUdevice device) {
    return call("cuCtxCreate", [&](Driver &d) {
        device_of(d, device);
        *context = make_context(d, device, false);
        context_stack().push_back(*context);
    });
}

CUresult cuCtxAttach(CUcontext *context, unsigned) {
    return call("cuCtxAttach", [&](Driver &) {
        *context = current();
        ++(*context)->uses;
    });
}

CUresult cuCtxDetach(CUcontext context) {
    return call("cuCtxDetach", [&](Driver &d) {
        if (d.contexts.count(context) == 0 || context->primary) throw Failure{CUDA_ERROR_INVALID_CONTEXT};
        if (--context->uses > 0) return;
        auto &stack = context_stack();
        if (!stack.empty() && stack.back() == context) stack.pop_back();
        destroy_context(d, context);
    });
}

CUresult cuCtxPushCurrent(CUcontext context) {
    return call("cuCtxPushCurrent", [&](Driver &d) {
        if (d.contexts.count(context) == 0) throw Failure{CUDA_ERROR_INVALID_CONTEXT};
        context_stack().push_back(context);
    });
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    return call("cuCtxPopCurrent", [&](Driver &) {
        auto &stack = context_stack();
        if (stack.empty()) throw Failure{CUDA_ERROR_INVALID_CONTEXT};
        if (context != nullptr) *context = stack.back();
        stack.pop_back();
    });
}

CUresult cuCtxGetDevice(CUdevice *device) {
    return call_in_context("cuCtxGetDevice", [&](Driver &, CUcontext context) { *device = context->device; });
}

CUresult cuCtxGetApiVersion(CUcontext, unsigned *version) {
    return call("cuCtxGetApiVersion", [&](Driver &) { *version = 3020; });
}

CUresult cuCtxSynchronize() {
    return call_in_context("cuCtxSynchronize", [](Driver &, CUcontext context) { finish_all(context); });
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    return call_in_context("cuCtxSetLimit", [&](Driver &, CUcontext context) { context->limits[limit] = value; });
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    return call_in_context("cuCtxGetLimit", [&](Driver &, CUcontext context) { *value = context->limits[limit]; });
}
