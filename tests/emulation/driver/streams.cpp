// Streams are queues of operations that run when somebody waits for them, so that work that nobody waited for is seen to
// be missing.
//
//   SHAREDNORM_EMULATED_STREAMS   lazy (the default): nothing runs before a synchronization needs it;
//                                 eager: everything at once;
//                                 random:SEED: at every call some operations run, in an order that the seed chooses

#include <chrono>
#include <cstdlib>

#include "driver.h"

namespace emulated {

namespace {

class Progress {
public:
    Progress() {
        const char *text = std::getenv("SHAREDNORM_EMULATED_STREAMS");
        const std::string mode = text != nullptr && *text != '\0' ? text : "lazy";
        eager = mode == "eager";
        if (mode.rfind("random:", 0) == 0) {
            random = true;
            state_ = 2 * std::strtoull(mode.c_str() + 7, nullptr, 10) + 1;
        } else if (!eager && mode != "lazy") {
            die("SHAREDNORM_EMULATED_STREAMS is '" + mode + "' (expected: lazy, eager, random:SEED)");
        }
    }

    std::size_t below(std::size_t count) {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<std::size_t>(state_ >> 33) % count;
    }

    bool eager = false;
    bool random = false;

private:
    unsigned long long state_ = 1;
};

Progress &progress() {
    static Progress it;
    return it;
}

std::vector<CUstream> busy(CUcontext context) {
    std::vector<CUstream> found;
    for (CUstream stream : driver().streams) {
        if ((context == nullptr || stream->context == context) && !stream->operations.empty()) found.push_back(stream);
    }
    return found;
}

}  // namespace

double now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(since).count();
}

// The legacy stream of the current context stands for a null handle.
CUstream resolve(CUstream handle) {
    const CUcontext context = current();
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return context->legacy;
    if (driver().streams.count(handle) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
    return handle;
}

RecordPtr submit(CUstream stream, std::function<void()> run, const void *host, std::size_t host_bytes) {
    Operation operation;
    operation.run = std::move(run);
    operation.host = static_cast<const char *>(host);
    operation.host_bytes = host_bytes;
    operation.done = std::make_shared<Record>();
    operation.done->stream = stream;
    for (CUstream other : driver().streams) {
        // Work in the legacy stream waits for all that is in the blocking ones, and they for it.
        const bool ordered = (stream->legacy && other->blocking) || (other->legacy && stream->blocking);
        if (other != stream && other->context == stream->context && ordered && !other->operations.empty()) {
            operation.after.push_back(other->operations.back().done);
        }
    }
    RecordPtr done = operation.done;
    stream->operations.push_back(std::move(operation));
    if (progress().eager) finish(stream);
    return done;
}

bool run_next(CUstream stream) {
    if (stream->operations.empty()) return false;
    const std::vector<RecordPtr> after = stream->operations.front().after;
    for (const RecordPtr &record : after) finish(record);
    Operation operation = std::move(stream->operations.front());
    stream->operations.pop_front();
    if (driver().lost == CUDA_SUCCESS) operation.run();
    operation.done->milliseconds = now();
    operation.done->done = true;
    return true;
}

void finish(const RecordPtr &record) {
    while (!record->done) run_next(record->stream);
}

void finish(CUstream stream) {
    while (run_next(stream)) {
    }
}

// All streams of a context, or with nullptr of all.
void finish_all(CUcontext context) {
    for (auto waiting = busy(context); !waiting.empty(); waiting = busy(context)) {
        run_next(progress().random ? waiting[progress().below(waiting.size())] : waiting.front());
    }
}

void make_progress() {
    if (!progress().random) return;
    for (auto waiting = busy(nullptr); !waiting.empty() && progress().below(2) == 0; waiting = busy(nullptr)) {
        run_next(waiting[progress().below(waiting.size())]);
    }
}

}  // namespace emulated

using namespace emulated;

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    return call_in_context("cuStreamCreate", [&](Driver &d, CUcontext context) {
        *stream = new CUstream_st;
        (*stream)->context = context;
        (*stream)->blocking = (flags & CU_STREAM_NON_BLOCKING) == 0;
        d.streams.insert(*stream);
    });
}

CUresult cuStreamDestroy(CUstream stream) {
    return call_in_context("cuStreamDestroy", [&](Driver &d, CUcontext) {
        if (stream == nullptr || d.streams.count(stream) == 0 || stream->legacy) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        finish(stream);
        d.streams.erase(stream);
        delete stream;
    });
}

CUresult cuStreamSynchronize(CUstream stream) {
    return call_in_context("cuStreamSynchronize", [&](Driver &d, CUcontext context) {
        CUstream it = resolve(stream);
        if (it->legacy) {
            for (CUstream other : d.streams) {
                if (other->context == context && other->blocking) finish(other);
            }
        }
        finish(it);
    });
}

// A query lets one operation run, or a caller that polls would wait for ever.
CUresult cuStreamQuery(CUstream stream) {
    return call_in_context("cuStreamQuery", [&](Driver &, CUcontext) {
        CUstream it = resolve(stream);
        if (it->operations.empty()) return;
        run_next(it);
        throw Failure{CUDA_ERROR_NOT_READY};
    });
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    return call_in_context("cuStreamWaitEvent", [&](Driver &d, CUcontext) {
        CUstream it = resolve(stream);
        if (d.events.count(event) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        if (event->record == nullptr || event->record->done) return;
        const RecordPtr record = event->record;
        submit(it, [record] { finish(record); });
    });
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    return call_in_context("cuEventCreate", [&](Driver &d, CUcontext context) {
        *event = new CUevent_st;
        (*event)->context = context;
        (*event)->timing = (flags & CU_EVENT_DISABLE_TIMING) == 0;
        d.events.insert(*event);
    });
}

CUresult cuEventDestroy(CUevent event) {
    return call_in_context("cuEventDestroy", [&](Driver &d, CUcontext) {
        if (d.events.erase(event) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        delete event;
    });
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    return call_in_context("cuEventRecord", [&](Driver &d, CUcontext) {
        if (d.events.count(event) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        event->record = submit(resolve(stream), [] {});
    });
}

CUresult cuEventSynchronize(CUevent event) {
    return call_in_context("cuEventSynchronize", [&](Driver &d, CUcontext) {
        if (d.events.count(event) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        if (event->record != nullptr) finish(event->record);
    });
}

CUresult cuEventQuery(CUevent event) {
    return call_in_context("cuEventQuery", [&](Driver &d, CUcontext) {
        if (d.events.count(event) == 0) throw Failure{CUDA_ERROR_INVALID_HANDLE};
        if (event->record == nullptr || event->record->done) return;
        run_next(event->record->stream);
        throw Failure{CUDA_ERROR_NOT_READY};
    });
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    return call_in_context("cuEventElapsedTime", [&](Driver &d, CUcontext) {
        for (CUevent event : {start, end}) {
            if (d.events.count(event) == 0 || !event->timing || event->record == nullptr) {
                throw Failure{CUDA_ERROR_INVALID_HANDLE};
            }
        }
        if (!start->record->done || !end->record->done) throw Failure{CUDA_ERROR_NOT_READY};
        *milliseconds = static_cast<float>(end->record->milliseconds - start->record->milliseconds);
    });
}
