// Copies and fills. An asynchronous copy reads and writes pinned memory when it runs, and not before; memory that is not
// pinned is read at once, and written before the call returns, as the real driver does.

#include <algorithm>
#include <cstring>

#include "driver.h"

namespace emulated {

namespace {

char *host(CUdeviceptr address) { return reinterpret_cast<char *>(address); }

void need_host(const char *call, const void *address, std::size_t bytes) {
    if (address == nullptr && bytes > 0) refuse(call, CUDA_ERROR_INVALID_VALUE, "the host's address is null");
}

void to_device(const char *name, CUdeviceptr to, const void *from, std::size_t bytes, CUstream stream, bool wait) {
    check_device_range(name, to, bytes);
    need_host(name, from, bytes);
    ++driver().counts["copies"];
    if (is_pinned(from, bytes)) {
        const RecordPtr done = submit(stream, [=] { std::memcpy(host(to), from, bytes); }, from, bytes);
        if (wait) finish(done);
        return;
    }
    const auto staged = std::make_shared<std::vector<char>>(static_cast<const char *>(from),
                                                            static_cast<const char *>(from) + bytes);
    const RecordPtr done = submit(stream, [=] { std::memcpy(host(to), staged->data(), bytes); });
    if (wait) finish(done);
}

void to_host(const char *name, void *to, CUdeviceptr from, std::size_t bytes, CUstream stream, bool wait) {
    check_device_range(name, from, bytes);
    need_host(name, to, bytes);
    ++driver().counts["copies"];
    const bool pinned = is_pinned(to, bytes);
    const RecordPtr done = submit(stream, [=] { std::memcpy(to, host(from), bytes); }, pinned ? to : nullptr, bytes);
    if (wait || !pinned) finish(done);
}

// On the device nobody waits, not even in the call without a stream.
void on_device(const char *name, CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
    check_device_range(name, to, bytes);
    check_device_range(name, from, bytes);
    ++driver().counts["copies"];
    submit(stream, [=] { std::memmove(host(to), host(from), bytes); });
}

template <class T>
CUresult fill(const char *name, CUdeviceptr to, T value, std::size_t count, CUstream stream) {
    return call_in_context(name, [&](Driver &, CUcontext) {
        if (to % sizeof(T) != 0) throw Failure{CUDA_ERROR_INVALID_VALUE};
        check_device_range(name, to, count * sizeof(T));
        submit(resolve(stream), [=] { std::fill_n(reinterpret_cast<T *>(to), count, value); });
    });
}

}  // namespace

}  // namespace emulated

using namespace emulated;

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    return call_in_context("cuMemcpyHtoD", [&](Driver &, CUcontext context) {
        to_device("cuMemcpyHtoD", to, from, bytes, context->legacy, true);
    });
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    return call_in_context("cuMemcpyHtoDAsync", [&](Driver &, CUcontext) {
        to_device("cuMemcpyHtoDAsync", to, from, bytes, resolve(stream), false);
    });
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    return call_in_context("cuMemcpyDtoH", [&](Driver &, CUcontext context) {
        to_host("cuMemcpyDtoH", to, from, bytes, context->legacy, true);
    });
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call_in_context("cuMemcpyDtoHAsync", [&](Driver &, CUcontext) {
        to_host("cuMemcpyDtoHAsync", to, from, bytes, resolve(stream), false);
    });
}

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return call_in_context("cuMemcpyDtoD", [&](Driver &, CUcontext context) {
        on_device("cuMemcpyDtoD", to, from, bytes, context->legacy);
    });
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return call_in_context("cuMemcpyDtoDAsync", [&](Driver &, CUcontext) {
        on_device("cuMemcpyDtoDAsync", to, from, bytes, resolve(stream));
    });
}

CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    return fill("cuMemsetD8", to, value, count, nullptr);
}

CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) {
    return fill("cuMemsetD16", to, value, count, nullptr);
}

CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) {
    return fill("cuMemsetD32", to, value, count, nullptr);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill("cuMemsetD8Async", to, value, count, stream);
}

CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    return fill("cuMemsetD16Async", to, value, count, stream);
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return fill("cuMemsetD32Async", to, value, count, stream);
}
