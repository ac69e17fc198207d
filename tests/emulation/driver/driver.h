// The state of the emulated driver, and the frame of every call.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../image.h"

namespace emulated {

// What a call throws to end with that status.
struct Failure {
    CUresult status;
};

// A point in a stream, reached or not.
struct Record {
    CUstream stream = nullptr;
    bool done = false;
    double milliseconds = 0;  // when it was reached
};
using RecordPtr = std::shared_ptr<Record>;

struct Operation {
    std::function<void()> run;
    std::vector<RecordPtr> after;  // what has to be done before, in other streams
    RecordPtr done;
    const char *host = nullptr;  // the pinned memory that it will touch
    std::size_t host_bytes = 0;
};

struct Allocation {
    std::size_t bytes = 0;
    CUcontext context = nullptr;
    char *block = nullptr;  // with its guards
};

struct Pinned {
    std::size_t bytes = 0;
    CUcontext context = nullptr;
    bool registered = false;  // the caller's own memory
    unsigned flags = 0;
};

struct Device {
    std::string name = "Emulated H200";
    std::size_t memory = std::size_t{2} << 30;
    std::map<int, int> attributes;
};

struct Failures;  // which calls are to fail

}  // namespace emulated

// The handles of cuda.h are pointers to these.
struct CUctx_st {
    CUdevice device = 0;
    bool primary = false;
    int uses = 1;
    CUstream legacy = nullptr;
    std::map<int, std::size_t> limits;
};

struct CUstream_st {
    CUcontext context = nullptr;
    bool blocking = true;  // with respect to the legacy stream
    bool legacy = false;
    std::deque<emulated::Operation> operations;
};

struct CUevent_st {
    CUcontext context = nullptr;
    bool timing = true;
    emulated::RecordPtr record;
};

struct CUfunc_st {
    CUmodule module = nullptr;
    const EmuKernel *kernel = nullptr;
    std::size_t dynamic_shared = 48 * 1024;
};

struct CUmod_st {
    CUcontext context = nullptr;
    void *library = nullptr;
    decltype(&emu_find) find = nullptr;
    decltype(&emu_run) run = nullptr;
    decltype(&emu_rest) rest = nullptr;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

namespace emulated {

struct Driver {
    Driver();

    std::recursive_mutex mutex;
    bool initialized = false;
    CUresult lost = CUDA_SUCCESS;  // what every call answers once the device is lost
    std::shared_ptr<Failures> failures;  // read from the environment at the first call

    std::vector<Device> devices;
    std::map<CUdevice, CUcontext> primary;
    std::set<CUcontext> contexts;
    std::set<CUstream> streams;  // the legacy ones too
    std::set<CUevent> events;
    std::set<CUmodule> modules;
    std::map<std::uintptr_t, Allocation> allocations;
    std::map<std::uintptr_t, Pinned> pinned;

    std::map<std::string, long long> counts;  // calls, launches, copies, allocations, in all
};

Driver &driver();
std::vector<CUcontext> &context_stack();  // of the calling thread

void note(const char *call, const std::string &what);        // one line on stderr
[[noreturn]] void refuse(const char *call, CUresult status, const std::string &why);
[[noreturn]] void die(const std::string &what);

CUcontext current();  // throws CUDA_ERROR_INVALID_CONTEXT where the thread has none
CUresult begin(const char *name);  // counts a call; not CUDA_SUCCESS where it is to fail
void set_failures(const char *text);
bool fails(const char *kind);  // whether this one, the nth of its kind, is to fail

// Streams.
CUstream resolve(CUstream handle);
RecordPtr submit(CUstream stream, std::function<void()> run, const void *host = nullptr, std::size_t host_bytes = 0);
void finish(const RecordPtr &record);
void finish(CUstream stream);
void finish_all(CUcontext context);
void make_progress();  // what the device may do by itself at any time
bool run_next(CUstream stream);
double now();

// Memory.
void check_device_range(const char *call, CUdeviceptr address, std::size_t bytes);
void check_guards(const char *kernel);
bool is_pinned(const void *address, std::size_t bytes);
void forget_context(CUcontext context);
std::size_t used_bytes(CUdevice device);
bool address_sanitizer();

template <class Body>
CUresult call(const char *name, Body body) {
    Driver &d = driver();
    const std::lock_guard<std::recursive_mutex> lock(d.mutex);
    const CUresult status = begin(name);
    if (status != CUDA_SUCCESS) return status;
    try {
        body(d);
    } catch (const Failure &failure) {
        return failure.status;
    }
    return d.lost;  // a fault while the body waited for the device
}

// The same for what needs a context: nothing works in a thread that has none.
template <class Body>
CUresult call_in_context(const char *name, Body body) {
    return call(name, [&](Driver &d) {
        const CUcontext context = current();
        make_progress();
        body(d, context);
    });
}

}  // namespace emulated
