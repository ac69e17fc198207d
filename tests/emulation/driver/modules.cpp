// Modules, functions and launches. An image is a shared object; what a launch asks for is held against the device.
//
//   SHAREDNORM_EMULATED_IMAGES   a directory to leave images in: a sanitizer then names lines, which it cannot of an image
//                                that is gone

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include "driver.h"

namespace emulated {

namespace {

// An image comes without its length, which its own headers tell.
std::size_t image_bytes(const void *image) {
    const auto header = static_cast<const Elf64_Ehdr *>(image);
    if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_ident[EI_CLASS] != ELFCLASS64) {
        const bool fatbin = std::memcmp(image, "\x50\xed\x55\xba", 4) == 0;
        refuse("cuModuleLoadDataEx", fatbin ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_ERROR_INVALID_IMAGE,
               "this driver runs images for the host only");
    }
    return header->e_shoff + std::size_t{header->e_shentsize} * header->e_shnum;
}

void write_all(int file, const char *data, std::size_t bytes) {
    while (bytes > 0) {
        const ssize_t written = write(file, data, bytes);
        if (written < 0) refuse("cuModuleLoadDataEx", CUDA_ERROR_OUT_OF_MEMORY, "cannot write the image");
        data += written;
        bytes -= static_cast<std::size_t>(written);
    }
}

void *open_library(const void *image) {
    const std::size_t bytes = image_bytes(image);
    const char *directory = std::getenv("SHAREDNORM_EMULATED_IMAGES");
    const bool keep = directory != nullptr && *directory != '\0';
    // A name that no other image has had: the linker takes a library that it knows by its name for the same one.
    std::string path = std::string(keep ? directory : "/tmp") + "/emulated-image-XXXXXX";
    const int file = mkstemp(path.data());
    if (file < 0) refuse("cuModuleLoadDataEx", CUDA_ERROR_OUT_OF_MEMORY, "no file for the image");
    write_all(file, static_cast<const char *>(image), bytes);
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!keep) unlink(path.c_str());
    const std::string problem = library == nullptr ? dlerror() : "";
    close(file);
    if (library == nullptr) refuse("cuModuleLoadDataEx", CUDA_ERROR_INVALID_IMAGE, problem);
    return library;
}

CUresult load(const char *name, CUmodule *module, const void *image) {
    return call_in_context(name, [&](Driver &d, CUcontext context) {
        auto loaded = std::make_unique<CUmod_st>();
        loaded->context = context;
        loaded->library = open_library(image);
        loaded->find = reinterpret_cast<decltype(&emu_find)>(dlsym(loaded->library, "emu_find"));
        loaded->run = reinterpret_cast<decltype(&emu_run)>(dlsym(loaded->library, "emu_run"));
        loaded->rest = reinterpret_cast<decltype(&emu_rest)>(dlsym(loaded->library, "emu_rest"));
        if (loaded->find == nullptr || loaded->run == nullptr || loaded->rest == nullptr) throw Failure{CUDA_ERROR_INVALID_IMAGE};
        *module = loaded.release();
        d.modules.insert(*module);
    });
}

// The arguments of a launch, each where its type may stand.
struct Arguments {
    std::vector<std::unique_ptr<char[]>> storage;
    std::vector<void *> pointers;

    void add(const EmuParameter &parameter, const char *from) {
        storage.emplace_back(new char[parameter.size + parameter.alignment]);
        char *place = storage.back().get();
        place += (parameter.alignment - reinterpret_cast<std::uintptr_t>(place) % parameter.alignment) % parameter.alignment;
        std::memcpy(place, from, parameter.size);
        pointers.push_back(place);
    }
};

void unpack_buffer(const EmuKernel &kernel, void **extra, Arguments &arguments) {
    const char *buffer = nullptr;
    std::size_t bytes = 0;
    for (; extra != nullptr && *extra != CU_LAUNCH_PARAM_END; extra += 2) {
        if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = static_cast<const char *>(extra[1]);
        if (*extra == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<std::size_t *>(extra[1]);
    }
    std::size_t offset = 0;
    for (std::size_t i = 0; i < kernel.parameter_count; ++i) {
        const EmuParameter &parameter = kernel.parameters[i];
        offset = (offset + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
        if (offset + parameter.size <= bytes) arguments.add(parameter, buffer + offset);
        offset += parameter.size;
    }
    if (arguments.pointers.size() == kernel.parameter_count && offset == bytes) return;
    refuse("cuLaunchKernel", CUDA_ERROR_INVALID_VALUE, std::string("kernel ") + kernel.name + " takes " +
               std::to_string(offset) + " bytes of arguments, not " + std::to_string(bytes));
}

void check_limits(const Driver &d, CUfunction function, const EmuLaunch &launch) {
    const auto &attributes = d.devices[static_cast<std::size_t>(function->module->context->device)].attributes;
    const CUdevice_attribute blocks[] = {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y,
                                         CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z};
    const CUdevice_attribute grids[] = {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y,
                                        CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z};
    const auto beyond = [&](unsigned value, CUdevice_attribute limit) {
        return value < 1 || value > static_cast<unsigned>(attributes.at(limit));
    };
    unsigned long long threads = 1;
    for (int axis = 0; axis < 3; ++axis) {
        threads *= launch.block[axis];
        if (beyond(launch.block[axis], blocks[axis]) || beyond(launch.grid[axis], grids[axis])) {
            refuse("cuLaunchKernel", CUDA_ERROR_INVALID_VALUE, "a block or grid beyond the device's limits");
        }
    }
    if (threads > static_cast<unsigned>(attributes.at(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK))) {
        refuse("cuLaunchKernel", CUDA_ERROR_INVALID_VALUE, std::to_string(threads) + " threads in a block");
    }
    if (launch.shared_bytes > function->dynamic_shared) {
        refuse("cuLaunchKernel", CUDA_ERROR_INVALID_VALUE, std::to_string(launch.shared_bytes) +
                   " bytes of shared memory, where " + std::to_string(function->dynamic_shared) +
                   " are allowed: MAX_DYNAMIC_SHARED_SIZE_BYTES raises that");
    }
    const unsigned cluster = function->kernel->cluster;
    if (cluster > 1 && attributes.at(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) == 0) throw Failure{CUDA_ERROR_NO_BINARY_FOR_GPU};
    if (cluster > 8 || launch.grid[0] % cluster != 0) {
        refuse("cuLaunchKernel", CUDA_ERROR_INVALID_CLUSTER_SIZE, "clusters of " + std::to_string(cluster) +
                   " blocks in a grid of " + std::to_string(launch.grid[0]));
    }
}

}  // namespace

}  // namespace emulated

using namespace emulated;

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return load("cuModuleLoadData", module, image); }

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) {
    return load("cuModuleLoadDataEx", module, image);
}

CUresult cuModuleUnload(CUmodule module) {
    return call_in_context("cuModuleUnload", [&](Driver &d, CUcontext) {
        if (d.modules.count(module) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        finish_all(module->context);
        d.modules.erase(module);
        module->rest();  // the stacks of its threads are many mappings, of which a process has only so many
        delete module;   // the library stays: a sanitizer may still have to name its lines
    });
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return call_in_context("cuModuleGetFunction", [&](Driver &d, CUcontext) {
        if (d.modules.count(module) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        auto &known = module->functions[name];
        if (known == nullptr) {
            const EmuKernel *kernel = module->find(name);
            if (kernel == nullptr) throw Failure{CUDA_ERROR_NOT_FOUND};
            known = std::make_unique<CUfunc_st>();
            known->module = module;
            known->kernel = kernel;
        }
        *function = known.get();
    });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return call_in_context("cuFuncSetAttribute", [&](Driver &d, CUcontext context) {
        const auto &attributes = d.devices[static_cast<std::size_t>(context->device)].attributes;
        const int most = attributes.at(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) return;
        if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > most) {
            throw Failure{CUDA_ERROR_INVALID_VALUE};
        }
        function->dynamic_shared = static_cast<std::size_t>(value);
    });
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    return call_in_context("cuFuncGetAttribute", [&](Driver &, CUcontext) {
        switch (attribute) {
            case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; return;
            case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = static_cast<int>(function->dynamic_shared); return;
            case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; return;
            case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
            case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
            case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; return;
            default: throw Failure{CUDA_ERROR_INVALID_VALUE};
        }
    });
}

// PyCUDA calls these before each launch, which brings both again.
CUresult cuFuncSetBlockShape(CUfunction, int, int, int) {
    return call_in_context("cuFuncSetBlockShape", [](Driver &, CUcontext) {});
}

CUresult cuFuncSetSharedSize(CUfunction, unsigned) {
    return call_in_context("cuFuncSetSharedSize", [](Driver &, CUcontext) {});
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
    return call_in_context("cuFuncSetCacheConfig", [](Driver &, CUcontext) {});
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
    return call_in_context("cuLaunchKernel", [&](Driver &d, CUcontext) {
        ++d.counts["launches"];
        EmuLaunch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, nullptr};
        check_limits(d, function, launch);
        const auto arguments = std::make_shared<Arguments>();
        const EmuKernel *kernel = function->kernel;
        if (parameters != nullptr) {
            for (std::size_t i = 0; i < kernel->parameter_count; ++i) {
                arguments->add(kernel->parameters[i], static_cast<const char *>(parameters[i]));
            }
        } else {
            unpack_buffer(*kernel, extra, *arguments);
        }
        if (fails("launch")) throw Failure{CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES};
        const bool faults = fails("fault");
        const auto run = function->module->run;
        submit(resolve(stream), [=] {
            if (faults) {
                driver().lost = CUDA_ERROR_ILLEGAL_ADDRESS;
                return;
            }
            EmuLaunch it = launch;
            it.arguments = arguments->pointers.data();
            run(kernel, &it);
            check_guards(kernel->name);
        });
    });
}
