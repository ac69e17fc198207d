// Split kernels: one kernel reduces, a small one finishes the channels, one applies. For every shape; also what
// reduces only, or applies only, where the moments travel.
//
// moments, backward_sums: each group reduces one part of one map and writes two float64 to the part's own slot.
// finish_forward, finish_backward: one warp a map merges the parts in fixed order. No atomics on values anywhere.
// apply, backward_apply: each group goes over one part of one map again; the parts are cut anew, since nothing has
// to be merged.
//
// A thread reads UNROLL tiles before it uses the first, so that enough bytes are under way.
#pragma once

#include "finalize.cuh"

namespace sharednorm {

constexpr int UNROLL = 4;

// Shared memory: what group_sum needs, four float64 for what blocks or threads tell each other, then any tiles.
constexpr int EXCHANGE = SCRATCH;                 // in doubles
constexpr int RESERVED = (SCRATCH + 4) * 8 / 16;  // in tiles

__device__ __forceinline__ double *scratch_of(uint4 *memory) { return reinterpret_cast<double *>(memory); }

// parts: float64 (maps, parts, 2): mean and m2
template <class T>
__device__ __forceinline__ void moments(const typename T::Raw *x, double *parts, const Share &share,
                                        const Shape &shape, const Sharing &sharing, double *scratch) {
    const double shift = shift_of<T>(x, shape, share);
    Pair sums{0.0, 0.0};
    for (Walk<T> walk(shape, share, sharing); walk.more();) {
        Tile tiles[UNROLL];
        uint4 bytes[UNROLL];
        UNROLLED
        for (int i = 0; i < UNROLL; ++i) {
            tiles[i] = walk.take();
            bytes[i] = load_tile<T, Again::YES>(x, tiles[i], shape.size());
        }
        UNROLLED
        for (int i = 0; i < UNROLL; ++i) add_deviations<T>(sums, unpack<T>(bytes[i]), tiles[i], shift);
    }
    const Moments result = moments_of(share.count(), shift, group_sum(sums, sharing.group, scratch));
    if (threadIdx.x % sharing.group == 0 && share.map < shape.maps) {
        const long long slot = static_cast<long long>(share.map) * sharing.parts() + share.part;
        parts[2 * slot] = result.mean;
        parts[2 * slot + 1] = result.m2;
    }
}

// The map of the calling warp, in the kernels that finish; there may be none of that number.
__device__ __forceinline__ long long my_map() {
    return static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
}

// The number of the calling thread among all, in kernels with one thread a map or a value; it may be beyond the last.
__device__ __forceinline__ long long my_number() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// The moments of a map from its parts; complete in the first thread of the warp.
template <class T>
__device__ __forceinline__ Moments merge_parts(const double *parts, const Shape &shape, const Sharing &sharing,
                                               long long map) {
    Moments total{0.0, 0.0, 0.0};
    for (int part = threadIdx.x % WARP; part < sharing.parts() && map < shape.maps; part += WARP) {
        const long long slot = map * sharing.parts() + part;
        const Share share = share_of<T>(shape, sharing, static_cast<int>(map), part);
        total = merged(total, Moments{share.count(), parts[2 * slot], parts[2 * slot + 1]});
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const Moments other{shuffle_down(total.count, distance), shuffle_down(total.mean, distance),
                            shuffle_down(total.m2, distance)};
        total = merged(total, other);
    }
    return total;
}

template <class T>
__device__ __forceinline__ void finish_moments(const double *parts, double *moments, const Shape &shape,
                                               const Sharing &sharing) {
    const long long map = my_map();
    const Moments batch = merge_parts<T>(parts, shape, sharing, map);
    if (map < shape.maps && threadIdx.x % WARP == 0) {
        moments[map] = batch.mean;
        moments[shape.maps + map] = batch.m2;
    }
}

// The two sums of a map from its parts; complete in the first thread of the warp.
__device__ __forceinline__ Pair add_parts(const double *parts, int number, int maps, long long map) {
    Pair total{0.0, 0.0};
    for (int part = threadIdx.x % WARP; part < number && map < maps; part += WARP) {
        total.first += parts[2 * (map * number + part)];
        total.second += parts[2 * (map * number + part) + 1];
    }
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        total.first += shuffle_down(total.first, distance);
        total.second += shuffle_down(total.second, distance);
    }
    return total;
}

// coefficients: float32 (3, maps): hi, factor, offset
__device__ __forceinline__ void write_affine(float *coefficients, int maps, long long map, const Affine &affine) {
    coefficients[map] = affine.hi;
    coefficients[maps + map] = affine.factor;
    coefficients[2ll * maps + map] = affine.offset;
}

__device__ __forceinline__ Affine read_affine(const float *coefficients, int maps, const Share &share) {
    if (share.map >= maps) return Affine{0.0f, 0.0f, 0.0f};
    return Affine{coefficients[share.map], coefficients[maps + share.map], coefficients[2ll * maps + share.map]};
}

// Merges the parts of a map, and writes what follows from them if the calling thread is the one that writes.
template <class T>
__device__ __forceinline__ void finish_forward_map(const double *parts, const Parameters &parameters,
                                                   const Statistics &statistics, double *moments, float *coefficients,
                                                   const Shape &shape, const Sharing &sharing, long long map,
                                                   bool writes) {
    const Moments batch = merge_parts<T>(parts, shape, sharing, map);
    if (map < shape.maps && writes) {
        moments[map] = batch.mean;
        moments[shape.maps + map] = batch.m2;
        update_statistics(statistics, static_cast<int>(map), batch);
        const Affine affine = affine_of(batch.mean, batch.m2 / batch.count, parameters.scale[map],
                                        parameters.bias[map], parameters.epsilon);
        write_affine(coefficients, shape.maps, map, affine);
    }
}

template <class T>
__device__ __forceinline__ void apply(const typename T::Raw *x, typename T::Raw *y, const Affine &affine,
                                      const Share &share, const Shape &shape, const Sharing &sharing) {
    for (Walk<T> walk(shape, share, sharing); walk.more();) {
        Tile tiles[UNROLL];
        uint4 bytes[UNROLL];
        UNROLLED
        for (int i = 0; i < UNROLL; ++i) {
            tiles[i] = walk.take();
            bytes[i] = load_tile<T, Again::NO>(x, tiles[i], shape.size());
        }
        UNROLLED
        for (int i = 0; i < UNROLL; ++i) {
            Values<T> values = unpack<T>(bytes[i]);
            UNROLLED
            for (int j = 0; j < PER_TILE<T>; ++j) values.of[j] = affine(values.of[j]);
            store_tile<T>(y, tiles[i], values);
        }
    }
}

// parts: float64 (maps, parts, 2): sums of grad and of grad * (x - hi); mean: float64 (maps,)
template <class T>
__device__ __forceinline__ void backward_sums(const typename T::Raw *x, const typename T::Raw *grad,
                                              const double *mean, double *parts, const Share &share,
                                              const Shape &shape, const Sharing &sharing, double *scratch) {
    const float hi = share.map < shape.maps ? static_cast<float>(mean[share.map]) : 0.0f;
    Pair sums{0.0, 0.0};
    for (Walk<T> walk(shape, share, sharing); walk.more();) {
        Tile tiles[UNROLL / 2];
        uint4 inputs[UNROLL / 2], gradients[UNROLL / 2];
        UNROLLED
        for (int i = 0; i < UNROLL / 2; ++i) {
            tiles[i] = walk.take();
            inputs[i] = load_tile<T, Again::YES>(x, tiles[i], shape.size());
            gradients[i] = load_tile<T, Again::YES>(grad, tiles[i], shape.size());
        }
        UNROLLED
        for (int i = 0; i < UNROLL / 2; ++i) {
            add_products<T>(sums, unpack<T>(inputs[i]), unpack<T>(gradients[i]), tiles[i], hi);
        }
    }
    const Pair total = group_sum(sums, sharing.group, scratch);
    if (threadIdx.x % sharing.group == 0 && share.map < shape.maps) {
        const long long slot = static_cast<long long>(share.map) * sharing.parts() + share.part;
        parts[2 * slot] = total.first;
        parts[2 * slot + 1] = total.second;
    }
}

struct ParameterGradients {
    float *scale, *bias;  // (maps,)
};

// Adds the parts of a map, and writes what follows from them if the calling thread is the one that writes.
// coefficients: float32 (4, maps): hi, factor, slope, offset
__device__ __forceinline__ void finish_backward_map(const double *parts, int number, const double *moments, double count,
                                                    const Parameters &parameters, float *coefficients,
                                                    const ParameterGradients &gradients, int maps, long long map,
                                                    bool writes) {
    const Pair sums = add_parts(parts, number, maps, map);
    if (map < maps && writes) {
        const Gradients result = gradients_of(Moments{count, moments[map], moments[maps + map]}, sums,
                                              parameters.scale[map], parameters.epsilon);
        coefficients[map] = result.input.hi;
        coefficients[maps + map] = result.input.factor;
        coefficients[2ll * maps + map] = result.input.slope;
        coefficients[3ll * maps + map] = result.input.offset;
        gradients.scale[map] = result.scale;
        gradients.bias[map] = result.bias;
    }
}

__device__ __forceinline__ InputGradient read_gradient(const float *coefficients, int maps, const Share &share) {
    if (share.map >= maps) return InputGradient{0.0f, 0.0f, 0.0f, 0.0f};
    return InputGradient{coefficients[share.map], coefficients[maps + share.map],
                         coefficients[2ll * maps + share.map], coefficients[3ll * maps + share.map]};
}

template <class T>
__device__ __forceinline__ void backward_apply(const typename T::Raw *x, const typename T::Raw *grad,
                                               const float *coefficients, typename T::Raw *dx, const Share &share,
                                               const Shape &shape, const Sharing &sharing) {
    const InputGradient gradient = read_gradient(coefficients, shape.maps, share);
    for (Walk<T> walk(shape, share, sharing); walk.more();) {
        Tile tiles[UNROLL / 2];
        uint4 inputs[UNROLL / 2], gradients[UNROLL / 2];
        UNROLLED
        for (int i = 0; i < UNROLL / 2; ++i) {
            tiles[i] = walk.take();
            inputs[i] = load_tile<T, Again::NO>(x, tiles[i], shape.size());
            gradients[i] = load_tile<T, Again::NO>(grad, tiles[i], shape.size());
        }
        UNROLLED
        for (int i = 0; i < UNROLL / 2; ++i) {
            const Values<T> input = unpack<T>(inputs[i]);
            Values<T> values = unpack<T>(gradients[i]);
            UNROLLED
            for (int j = 0; j < PER_TILE<T>; ++j) values.of[j] = gradient(input.of[j], values.of[j]);
            store_tile<T>(dx, tiles[i], values);
        }
    }
}

}  // namespace sharednorm
