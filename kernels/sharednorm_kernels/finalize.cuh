// What happens once a channel, in float64: coefficients, statistics, gradients of parameters.
//
// A normalization is applied in float32 as y = (x - hi) * factor + offset, with the mean as hi + lo: offset takes
// the lo. Rounding the mean to hi alone would cost half a unit of its last place times the factor.
//
// Every kernel gets the same bits from the same moments, whatever the compiler makes of each: where a product meets a
// sum, fma or product_of says how it is rounded. A forward can so be repeated from its moments by another kernel.
#pragma once

#include "group_reduce.cuh"

namespace sharednorm {

struct Parameters {
    const float *scale, *bias;  // (maps,)
    double epsilon;
};

// A tiny epsilon and no variance give factors beyond float32; infinity times a deviation of 0 would be NaN.
__device__ __forceinline__ float clipped(double value) {
    const double least = value < -LARGEST ? -LARGEST : value;  // a NaN stays one
    return static_cast<float>(least > LARGEST ? LARGEST : least);
}

struct Affine {
    float hi, factor, offset;

    __device__ __forceinline__ float operator()(float x) const { return fmaf(x - hi, factor, offset); }
};

__device__ __forceinline__ Affine affine_of(double mean, double var, double scale, double bias, double epsilon) {
    const float factor = clipped(scale / sqrt(var + epsilon));
    const float hi = static_cast<float>(mean);
    return Affine{hi, factor, clipped(fma(static_cast<double>(hi) - mean, static_cast<double>(factor), bias))};
}

// dx = grad * factor + (x - hi) * slope + offset
struct InputGradient {
    float hi, factor, slope, offset;

    __device__ __forceinline__ float operator()(float x, float grad) const {
        return fmaf(grad, factor, fmaf(x - hi, slope, offset));
    }
};

struct Gradients {
    InputGradient input;
    float scale, bias;
};

// The gradients of a training forward (Ioffe & Szegedy 2015, section 3) from the sums of grad and of
// grad * (x - hi), where hi is the mean rounded to float32.
__device__ __forceinline__ Gradients gradients_of(const Moments &batch, const Pair &sums, double scale,
                                                  double epsilon) {
    const float hi = static_cast<float>(batch.mean);
    const double lo = batch.mean - static_cast<double>(hi);
    const double product = fma(-lo, sums.first, sums.second);
    const double inv_std = 1.0 / sqrt(batch.m2 / batch.count + epsilon);
    const double factor = scale * inv_std;
    const float slope = clipped(-factor * inv_std * inv_std * (product / batch.count));
    const float offset = clipped(fma(-lo, static_cast<double>(slope), product_of(-factor, sums.first / batch.count)));
    return Gradients{{hi, clipped(factor), slope, offset}, static_cast<float>(product * inv_std),
                     static_cast<float>(sums.first)};
}

// What a training forward does to a channel's statistics. The new ones go to their own vectors, so that a caller
// takes them over only once the whole batch is known to be finite.
struct Statistics {
    const float *old_mean, *old_var;
    float *new_mean, *new_var;
    double weight;  // of the batch; the running statistics weigh 1 - weight
};

// The same bits as `step` of the client library gives. A weight of exactly 0 or 1 must not let a value of the other
// side through that is not finite.
__device__ __forceinline__ float averaged(float old, double batch, double weight) {
    if (weight == 0.0) return old;
    if (weight == 1.0) return static_cast<float>(batch);
    return static_cast<float>(sum_of(product_of(1.0 - weight, old), product_of(weight, batch)));
}

__device__ __forceinline__ void update_statistics(const Statistics &to, int map, const Moments &batch) {
    // One value has no unbiased variance; a caller refuses such a batch, and NaN would be the honest result.
    const double var = batch.m2 / (batch.count - 1.0);
    to.new_mean[map] = averaged(to.old_mean[map], batch.mean, to.weight);
    to.new_var[map] = averaged(to.old_var[map], var, to.weight);
}

}  // namespace sharednorm
