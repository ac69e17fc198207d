// What statuses are called.

#include <cuda.h>

namespace {

struct Status {
    CUresult status;
    const char *name;
    const char *text;
};

#define STATUS(name, text) {name, #name, text}

constexpr Status statuses[] = {
    STATUS(CUDA_SUCCESS, "no error"),
    STATUS(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    STATUS(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    STATUS(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    STATUS(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    STATUS(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    STATUS(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    STATUS(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    STATUS(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    STATUS(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    STATUS(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    STATUS(CUDA_ERROR_NOT_READY, "device not ready"),
    STATUS(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    STATUS(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    STATUS(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    STATUS(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    STATUS(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    STATUS(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    STATUS(CUDA_ERROR_INVALID_CLUSTER_SIZE, "invalid cluster size"),
};

}  // namespace

CUresult cuGetErrorString(CUresult status, const char **text) {
    for (const Status &known : statuses) {
        if (known.status == status) {
            *text = known.text;
            return CUDA_SUCCESS;
        }
    }
    *text = "unrecognized error code";  // PyCUDA builds a string of it, whatever the answer
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorName(CUresult status, const char **name) {
    for (const Status &known : statuses) {
        if (known.status == status) {
            *name = known.name;
            return CUDA_SUCCESS;
        }
    }
    *name = "CUDA_ERROR_UNKNOWN";
    return CUDA_ERROR_INVALID_VALUE;
}
