// Sums over a group of threads, and the moments made of them.
//
// Deviations are taken in float64 from a shift K, a value of the same share: `first` sums x - K and `second` sums
// (x - K)^2. Since K is one of n values, n * (K - mean)^2 <= m2 + n * (K - mean)^2 <= (n + 1) * m2: what cancels in
// m2 = second - first^2 / n is at most n times what remains. So the relative error of m2 stays below about
// n * 1e-16, whatever the data: a large mean, an outlier, even an outlier as K. Shares are merged by the formula of
// Chan, Golub & LeVeque (1979), which cancels nothing.
//
// Float64 for each value, not for tiles of values summed in float32: the GPUs that this is for have half as many
// float64 as float32 units or more, and the three operations a value hide behind the memory. It is exact to 1e-9
// where a tile that holds an outlier has an error of 1e-7.
#pragma once

#include "tile_walk.cuh"

namespace sharednorm {

struct Pair {
    double first, second;
};

constexpr int SCRATCH = MAX_THREADS / WARP * 2;  // doubles of shared memory that group_sum needs

// The sum over the calling thread's group, the same bits in each of its threads. For all threads of the block, once.
// Order: a butterfly within each warp, then warp by warp.
__device__ __forceinline__ Pair group_sum(Pair value, int group, double *scratch) {
    UNROLLED
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        value.first += shuffle_xor(value.first, mask);
        value.second += shuffle_xor(value.second, mask);
    }
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
        scratch[2 * warp] = value.first;
        scratch[2 * warp + 1] = value.second;
    }
    block_barrier();
    const int begin = threadIdx.x / group * (group / WARP);
    Pair sum{0.0, 0.0};
    for (int each = begin; each < begin + group / WARP; ++each) {
        sum.first += scratch[2 * each];
        sum.second += scratch[2 * each + 1];
    }
    return sum;
}

struct Moments {
    double count, mean, m2;
};

__device__ __forceinline__ Moments moments_of(double count, double shift, const Pair &sums) {
    if (count == 0.0) return Moments{0.0, 0.0, 0.0};
    const double m2 = sums.second - sums.first * sums.first / count;
    return Moments{count, shift + sums.first / count, m2 < 0.0 ? 0.0 : m2};  // a NaN stays one
}

__device__ __forceinline__ Moments merged(const Moments &a, const Moments &b) {
    if (a.count == 0.0) return b;
    if (b.count == 0.0) return a;
    const double count = a.count + b.count, weight = b.count / count, delta = b.mean - a.mean;
    return Moments{count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * (a.count * weight)};
}

// The shift of a share: its first value.
template <class T>
__device__ __forceinline__ double shift_of(const typename T::Raw *x, const Shape &shape, const Share &share) {
    return share.image < share.image_end ? T::widen(x[run_begin(shape, share, share.image)]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void add_deviations(Pair &sums, const Values<T> &values, const Tile &tile, double shift) {
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        if (tile.counts(i)) {
            const double deviation = static_cast<double>(values.of[i]) - shift;
            sums.first += deviation;
            sums.second = fma(deviation, deviation, sums.second);
        }
    }
}

// Adds grad, and grad * (x - centre). The difference too in float64: 16-bit types have few values, and what float32
// rounds off a difference is then the same for many of them and adds up.
template <class T>
__device__ __forceinline__ void add_products(Pair &sums, const Values<T> &x, const Values<T> &grad, const Tile &tile,
                                             float centre) {
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        if (tile.counts(i)) {
            const double value = grad.of[i];
            sums.first += value;
            sums.second = fma(value, static_cast<double>(x.of[i]) - static_cast<double>(centre), sums.second);
        }
    }
}

}  // namespace sharednorm
