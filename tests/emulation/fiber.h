// Fibers, shared memory, and what the sanitizers have to be told about both.
//
// EMULATION_ADDRESS and EMULATION_THREAD say which sanitizer the kernels were compiled with; EMULATION_UCONTEXT takes
// the portable switch also on x86-64, where the one written by hand is faster: it makes no system call.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#ifdef EMULATION_ADDRESS
extern "C" void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, std::size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void *fake_stack, const void **old_bottom, std::size_t *old_size);
#endif
#ifdef EMULATION_THREAD
extern "C" void *__tsan_get_current_fiber();
extern "C" void *__tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void *fiber);
extern "C" void __tsan_switch_to_fiber(void *fiber, unsigned flags);
extern "C" void __tsan_acquire(void *address);
extern "C" void __tsan_release(void *address);
#endif

namespace {

#if defined(EMULATION_ADDRESS) || defined(EMULATION_THREAD)
constexpr std::size_t stack_bytes = 256 * 1024;
#else
constexpr std::size_t stack_bytes = 64 * 1024;
#endif

[[noreturn]] inline void out_of_memory() {
    std::fprintf(stderr, "emulated CUDA: the host has no memory left for the threads of a block\n");
    std::abort();
}

inline char *map_pages(std::size_t bytes) {
    void *pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) out_of_memory();
    return static_cast<char *>(pages);
}

struct Fiber {
    char *stack = nullptr;
    void (*entry)(void *) = nullptr;
#ifdef EMULATION_UCONTEXT
    ucontext_t context;
#else
    void *stack_pointer = nullptr;
#endif
#ifdef EMULATION_ADDRESS
    void *fake_stack = nullptr;
#endif
#ifdef EMULATION_THREAD
    void *tsan = nullptr;
#endif
};

// The thread of the host that runs the grid: where every fiber goes back to.
struct Host {
    Fiber fiber;
    std::vector<Fiber *> idle;
#ifdef EMULATION_ADDRESS
    const void *stack = nullptr;
    std::size_t stack_bytes = 0;
#endif
};

inline Host &host() {
    static Host *it = new Host;  // outlives every destructor at exit
    return *it;
}

#ifdef EMULATION_UCONTEXT

inline void switch_stacks(Fiber &from, Fiber &to) {
    swapcontext(&from.context, &to.context);
}

inline Fiber *&starting() {
    static Fiber *it = nullptr;
    return it;
}

inline void start_fiber() {
    Fiber *fiber = starting();
    fiber->entry(fiber);
}

inline void prepare(Fiber &fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start_fiber, 0);
}

#else

// Saves the registers that a function must keep, changes the stack, and takes the other's registers from it.
extern "C" void emu_switch_stacks(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .p2align 4
    .hidden emu_switch_stacks
    .globl emu_switch_stacks
    .type emu_switch_stacks, @function
emu_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch_stacks, .-emu_switch_stacks
)");

inline void switch_stacks(Fiber &from, Fiber &to) { emu_switch_stacks(&from.stack_pointer, to.stack_pointer); }

inline Fiber *&starting() {
    static Fiber *it = nullptr;
    return it;
}

inline void start_fiber() {
    Fiber *fiber = starting();
    fiber->entry(fiber);
    std::abort();  // an entry leaves for good
}

inline void prepare(Fiber &fiber) {
    void **top = reinterpret_cast<void **>(fiber.stack + stack_bytes);
    *--top = nullptr;  // as if start_fiber had been called: the stack is 8 off a multiple of 16
    *--top = reinterpret_cast<void *>(&start_fiber);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
}

#endif

inline Fiber *take_fiber(void (*entry)(void *)) {
    auto &idle = host().idle;
    Fiber *fiber;
    if (idle.empty()) {
        fiber = new Fiber;
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        char *pages = map_pages(page + stack_bytes);
        if (mprotect(pages, page, PROT_NONE) != 0) out_of_memory();  // an overflow faults
        fiber->stack = pages + page;
    } else {
        fiber = idle.back();
        idle.pop_back();
    }
    fiber->entry = entry;
#ifdef EMULATION_THREAD
    fiber->tsan = __tsan_create_fiber(0);
#endif
    prepare(*fiber);
    return fiber;
}

inline void free_fiber(Fiber *fiber) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    munmap(fiber->stack - page, page + stack_bytes);
    delete fiber;
}

inline void return_fiber(Fiber *fiber) {
#ifdef EMULATION_THREAD
    // The stack goes with its fiber. Another fiber on the same pages would race with this one, as ThreadSanitizer sees it;
    // and to order the two would order their blocks, and hide races between those.
    __tsan_destroy_fiber(fiber->tsan);
    free_fiber(fiber);
#else
    host().idle.push_back(fiber);
#endif
}

inline void free_idle_fibers() {
    for (Fiber *fiber : host().idle) free_fiber(fiber);
    host().idle.clear();
}

// From the host to a fiber; returns when it switches back or leaves.
inline void switch_to(Fiber &fiber) {
    starting() = &fiber;
#ifdef EMULATION_ADDRESS
    void *fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, stack_bytes);
#endif
#ifdef EMULATION_THREAD
    host().fiber.tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.tsan, 1);  // 1: the switch orders nothing
#endif
    switch_stacks(host().fiber, fiber);
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a fiber does.
inline void after_switch(Fiber &fiber) {
    (void)fiber;
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(nullptr, &host().stack, &host().stack_bytes);
#endif
}

inline void switch_to_host(Fiber &fiber) {
#ifdef EMULATION_ADDRESS
    __sanitizer_start_switch_fiber(&fiber.fake_stack, host().stack, host().stack_bytes);
#endif
#ifdef EMULATION_THREAD
    __tsan_switch_to_fiber(host().fiber.tsan, 1);
#endif
    switch_stacks(fiber, host().fiber);
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &host().stack, &host().stack_bytes);
#endif
}

// The last thing that a fiber does.
[[noreturn]] inline void leave(Fiber &fiber) {
#ifdef EMULATION_ADDRESS
    __sanitizer_start_switch_fiber(nullptr, host().stack, host().stack_bytes);
#endif
#ifdef EMULATION_THREAD
    __tsan_switch_to_fiber(host().fiber.tsan, 1);
#endif
    switch_stacks(fiber, host().fiber);
    std::abort();
}

inline void release_tag(const void *tag) {
    (void)tag;
#ifdef EMULATION_THREAD
    if (tag != nullptr) __tsan_release(const_cast<void *>(tag));
#endif
}

inline void acquire_tag(const void *tag) {
    (void)tag;
#ifdef EMULATION_THREAD
    if (tag != nullptr) __tsan_acquire(const_cast<void *>(tag));
#endif
}

// Addresses that stand for barriers. No two barriers of a grid share one: its order would leak from block to block.
class Tags {
public:
    explicit Tags(std::size_t pairs) {
#ifdef EMULATION_THREAD
        tags_.resize(16 * pairs);
#else
        (void)pairs;
#endif
    }

    const char *pair(std::size_t index) const { return tags_.empty() ? nullptr : tags_.data() + 16 * index; }

    alignas(8) char end = 0;  // of every thread of the grid, and then of the host

private:
    std::vector<char> tags_;
};

// The dynamic shared memory of one block: full of NaN at first, with a guard behind it. AddressSanitizer has guards of
// its own; ThreadSanitizer gets fresh pages, which no earlier block has touched.
class SharedMemory {
public:
    void allocate(std::size_t bytes) {
        bytes_ = bytes;
        const std::size_t all = bytes + guard_bytes();
#ifdef EMULATION_THREAD
        memory_ = map_pages(all);
#else
        void *memory = nullptr;
        if (posix_memalign(&memory, 128, all) != 0) out_of_memory();
        memory_ = static_cast<char *>(memory);
#endif
        // Not by memset: ThreadSanitizer would see it.
        for (std::size_t i = 0; i < all; ++i) const_cast<volatile char &>(memory_[i]) = static_cast<char>(0xff);
    }

    void release() {
#ifdef EMULATION_THREAD
        munmap(memory_, bytes_ + guard_bytes());
#else
        std::free(memory_);
#endif
        memory_ = nullptr;
    }

    char *data() const { return memory_; }

    bool overrun() const {
        for (std::size_t i = 0; i < guard_bytes(); ++i) {
            if (memory_[bytes_ + i] != static_cast<char>(0xff)) return true;
        }
        return false;
    }

private:
    static std::size_t guard_bytes() {
#ifdef EMULATION_ADDRESS
        return 0;
#else
        return 256;
#endif
    }

    char *memory_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace
