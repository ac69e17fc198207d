// A kernel that uses what kernels use: a barrier, a shuffle, dynamic shared memory, and a tail that is not full.
#include "emulated_cuda.h"

// out[block] = the sum of the block's part of x, in a fixed order; y = factor * x.
extern "C" __global__ void scale_and_sum(const float *x, float *y, double *out, float factor, unsigned n) {
    double *partial = static_cast<double *>(emu_dynamic_shared());
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    double sum = i < n ? static_cast<double>(x[i]) : 0.0;
    if (i < n) y[i] = factor * x[i];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
        out[blockIdx.x] = total;
    }
}
SHAREDNORM_KERNEL(scale_and_sum);
