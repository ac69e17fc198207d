// Calls, failures on demand, and what is left at the end.
//
//   SHAREDNORM_EMULATED_FAIL     which calls fail, separated by commas, each counted from 1:
//                                allocation:3  the third allocation is out of memory; allocation:3+ all from the third
//                                              (PyCUDA asks for device memory once more, after collecting garbage)
//                                launch:2      the second launch is refused, and nothing runs
//                                fault:2       the second launch faults when it runs: the device is lost
//                                lost:9        the device is lost from the ninth call on
//   SHAREDNORM_EMULATED_LEAKS    report (the default), fail (the process ends with status 86), or ignore: memory that
//                                nobody freed, at exit

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <unistd.h>

#include "driver.h"

namespace emulated {

struct Failures {
    struct Rule {
        std::string kind;
        long long number;
        bool onwards;
    };
    std::vector<Rule> rules;
    std::map<std::string, long long> seen;
};

namespace {

constexpr int leak_status = 86;

std::string setting(const char *name, const char *otherwise) {
    const char *text = std::getenv(name);
    return text != nullptr && *text != '\0' ? text : otherwise;
}

__attribute__((destructor)) void report_leaks() {
    Driver &d = driver();
    const std::string mode = setting("SHAREDNORM_EMULATED_LEAKS", "report");
    if (mode == "ignore" || d.lost != CUDA_SUCCESS) return;
    std::size_t bytes = 0;
    for (const auto &[address, allocation] : d.allocations) bytes += allocation.bytes;
    for (const auto &[address, pinned] : d.pinned) bytes += pinned.bytes;
    if (bytes == 0) return;
    note("exit", "leak: " + std::to_string(d.allocations.size()) + " device and " + std::to_string(d.pinned.size()) +
                     " pinned allocations, " + std::to_string(bytes) + " bytes");
    if (mode == "fail") _exit(leak_status);
}

}  // namespace

Driver &driver() {
    static Driver *it = new Driver;  // outlives every destructor at exit
    return *it;
}

std::vector<CUcontext> &context_stack() {
    thread_local std::vector<CUcontext> stack;
    return stack;
}

void note(const char *call, const std::string &what) {
    std::fprintf(stderr, "emulated CUDA: %s: %s\n", call, what.c_str());
    std::fflush(stderr);
}

void refuse(const char *call, CUresult status, const std::string &why) {
    note(call, why);
    throw Failure{status};
}

void die(const std::string &what) {
    std::fprintf(stderr, "emulated CUDA: %s\n", what.c_str());
    std::fflush(stderr);
    std::abort();
}

CUcontext current() {
    if (context_stack().empty()) throw Failure{CUDA_ERROR_INVALID_CONTEXT};
    const CUcontext context = context_stack().back();
    if (driver().contexts.count(context) == 0) throw Failure{CUDA_ERROR_CONTEXT_IS_DESTROYED};
    return context;
}

CUresult begin(const char *name) {
    Driver &d = driver();
    if (!d.initialized && std::strcmp(name, "cuInit") != 0) return CUDA_ERROR_NOT_INITIALIZED;
    if (d.failures == nullptr) set_failures(setting("SHAREDNORM_EMULATED_FAIL", "").c_str());
    ++d.counts["calls"];
    if (d.lost == CUDA_SUCCESS && fails("lost")) d.lost = CUDA_ERROR_LAUNCH_FAILED;
    return d.lost;
}

void set_failures(const char *text) {
    auto failures = std::make_shared<Failures>();
    const std::string all = text;
    for (std::size_t start = 0; start < all.size();) {
        const std::size_t end = std::min(all.find(',', start), all.size());
        const std::string rule = all.substr(start, end - start);
        const std::size_t colon = rule.find(':');
        const std::string kind = rule.substr(0, colon);
        const bool known = kind == "allocation" || kind == "launch" || kind == "fault" || kind == "lost";
        const long long number = colon == std::string::npos ? 0 : std::atoll(rule.c_str() + colon + 1);
        if (!known || number < 1) die("SHAREDNORM_EMULATED_FAIL: '" + rule + "' is no KIND:NUMBER");
        failures->rules.push_back({kind, number, rule.back() == '+'});
        start = end + 1;
    }
    driver().failures = std::move(failures);
}

bool fails(const char *kind) {
    Failures &failures = *driver().failures;
    const long long number = ++failures.seen[kind];
    for (const auto &rule : failures.rules) {
        if (rule.kind == kind && (rule.number == number || (rule.onwards && rule.number < number))) return true;
    }
    return false;
}

}  // namespace emulated

// For tests in this process, by ctypes.
extern "C" {

// The number of things of a kind: those that are alive, or in all ("total_..."); -1 for an unknown kind.
long long emu_count(const char *kind) {
    using namespace emulated;
    Driver &d = driver();
    const std::lock_guard<std::recursive_mutex> lock(d.mutex);
    const std::string name = kind;
    if (name == "allocations") return static_cast<long long>(d.allocations.size());
    if (name == "pinned") return static_cast<long long>(d.pinned.size());
    if (name == "streams") return static_cast<long long>(d.streams.size());
    if (name == "events") return static_cast<long long>(d.events.size());
    if (name == "modules") return static_cast<long long>(d.modules.size());
    if (name == "contexts") return static_cast<long long>(d.contexts.size());
    if (name == "bytes") return d.devices.empty() ? 0 : static_cast<long long>(used_bytes(0));
    for (const char *total : {"calls", "launches", "copies", "allocations"}) {
        if (name == std::string("total_") + total) return d.counts[total];
    }
    return -1;
}

// What SHAREDNORM_EMULATED_FAIL does, counted from now on; a lost device comes back.
void emu_fail(const char *rules) {
    using namespace emulated;
    const std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    driver().lost = CUDA_SUCCESS;
    set_failures(rules);
}
}
