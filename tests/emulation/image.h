// What a compiled image and the emulated driver tell each other. An image is a shared object that g++ made from the
// kernels' own .cu files; it exports the functions below.
#pragma once

#include <cstddef>

struct EmuParameter {
    std::size_t size;
    std::size_t alignment;
};

struct EmuKernel {
    const char *name;
    void (*invoke)(void *const *arguments);  // runs the kernel as the current thread
    const EmuParameter *parameters;
    std::size_t parameter_count;
    unsigned cluster;  // blocks of a cluster along x, 1 where the kernel has no clusters
};

struct EmuLaunch {
    unsigned grid[3];
    unsigned block[3];
    std::size_t shared_bytes;
    void *const *arguments;  // one pointer for each parameter
};

extern "C" {
// The kernel of that name, or nullptr.
const EmuKernel *emu_find(const char *name);
// Runs the whole grid on the calling thread, and aborts the process with a message where the kernel breaks a rule.
void emu_run(const EmuKernel *kernel, const EmuLaunch *launch);
// Gives back the stacks of the threads that ran: nothing runs now, and the image's module is gone.
void emu_rest();
}
