// Naive kernels: the reference to read, and to compare the others with. One thread a map reduces, value by value and
// in two passes; one thread a value applies. No shared memory, no shuffles, nothing wide.
#pragma once

#include "../../kernels/sharednorm_kernels/multi_pass.cuh"

namespace sharednorm {

__device__ __forceinline__ long long index_of(const Shape &shape, int image, int map, int position) {
    return (static_cast<long long>(image) * shape.maps + map) * shape.area + position;
}

// moments: float64 (2, maps): mean, m2. The second pass corrects what rounding left in the mean of the first.
template <class T>
__device__ __forceinline__ void naive_moments(const typename T::Raw *x, double *moments, const Shape &shape) {
    const long long map = my_number();
    if (map < shape.maps) {
        const double count = static_cast<double>(shape.images) * shape.area;
        const int channel = static_cast<int>(map);
        double sum = 0.0, rest = 0.0, squares = 0.0;
        for (int n = 0; n < shape.images; ++n) {
            for (int s = 0; s < shape.area; ++s) sum += T::widen(x[index_of(shape, n, channel, s)]);
        }
        for (int n = 0; n < shape.images; ++n) {
            for (int s = 0; s < shape.area; ++s) {
                const double deviation = T::widen(x[index_of(shape, n, channel, s)]) - sum / count;
                rest += deviation;
                squares += deviation * deviation;
            }
        }
        moments[map] = sum / count + rest / count;
        moments[shape.maps + map] = squares - rest * rest / count;
    }
}

// sums: float64 (2, maps): grad, and grad * (x - hi) with the mean rounded to float32
template <class T>
__device__ __forceinline__ void naive_backward_sums(const typename T::Raw *x, const typename T::Raw *grad,
                                                    const double *mean, double *sums, const Shape &shape) {
    const long long map = my_number();
    if (map < shape.maps) {
        const float hi = static_cast<float>(mean[map]);
        double first = 0.0, second = 0.0;
        for (int n = 0; n < shape.images; ++n) {
            for (int s = 0; s < shape.area; ++s) {
                const long long at = index_of(shape, n, static_cast<int>(map), s);
                const double value = T::widen(grad[at]);
                first += value;
                second += value * (static_cast<double>(T::widen(x[at])) - hi);
            }
        }
        sums[map] = first;
        sums[shape.maps + map] = second;
    }
}

template <class T>
__device__ __forceinline__ void naive_apply(const typename T::Raw *x, const float *coefficients,
                                            typename T::Raw *y, const Shape &shape) {
    const long long at = my_number();
    if (at < shape.size()) {
        const Share share{static_cast<int>(at / shape.area % shape.maps), 0, 0, 0, 0, 0};
        y[at] = T::narrow(read_affine(coefficients, shape.maps, share)(T::widen(x[at])));
    }
}

template <class T>
__device__ __forceinline__ void naive_backward_apply(const typename T::Raw *x, const typename T::Raw *grad,
                                                     const float *coefficients, typename T::Raw *dx,
                                                     const Shape &shape) {
    const long long at = my_number();
    if (at < shape.size()) {
        const Share share{static_cast<int>(at / shape.area % shape.maps), 0, 0, 0, 0, 0};
        dx[at] = T::narrow(read_gradient(coefficients, shape.maps, share)(T::widen(x[at]), T::widen(grad[at])));
    }
}

}  // namespace sharednorm
