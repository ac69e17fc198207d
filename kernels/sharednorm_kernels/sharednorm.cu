// The entries: every kernel under a plain name, for each element type.
//
// Versions of a training forward, from the simplest to the fastest; a backward has the same four. (A fifth, with one
// thread a map, is the reference that the tests compare them with.)
//   split     multi_pass.cuh  moments, then finish, then apply: three trips over the tensor, for every shape
//   ticketed  persistent.cuh  the same work in one launch, ordered so that the second read finds the cache: for maps
//                             that fit neither a block nor a cluster
//   resident  resident.cuh    one group keeps a map in shared memory: two trips, for maps up to what a block can hold
//   cluster   resident.cuh    a cluster of blocks keeps a map: two trips, on compute capability 9.0 and later
// Which one serves which shape, and with how many threads, is said by plan() in launch_config.py.
//
// Names end with the element type: f32, f16, bf16. Tensors are (images, maps, area), C-contiguous, at multiples of 16
// bytes, and no output overlaps an input. Parameters and statistics are float32 (maps,). moments: float64 (2, maps):
// mean and m2, the sum of squared deviations. coefficients: float32 (3, maps) of a forward: hi, factor, offset;
// (4, maps) of a backward: hi, factor, slope, offset. parts: float64 (maps, parts, 2). weight: what the batch
// weighs in the running statistics. counters: unsigned (1 + maps), which a caller sets to 0 before each launch.
// lag: how many maps the sums of a ticketed kernel are ahead. group of a ticketed kernel: all threads of a block.
// Kernels with parts, and resident ones, need RESERVED * 16 bytes of dynamic shared memory, and the latter their tiles.

#include "resident.cuh"
#include "persistent.cuh"

using namespace sharednorm;

#define ENTRY extern "C" __global__ void __launch_bounds__(MAX_THREADS)
#define STATISTICS_ARGUMENTS const float *old_mean, const float *old_var, float *new_mean, float *new_var, double weight
#define STATISTICS Statistics{old_mean, old_var, new_mean, new_var, weight}

// ---- once a map; one warp a map where parts are merged, one thread a map where not

ENTRY finish_backward(const double *parts, int number, const double *moments, double count, const float *scale,
                      double epsilon, float *coefficients, float *scale_grad, float *bias_grad, int maps) {
    finish_backward_map(parts, number, moments, count, Parameters{scale, nullptr, epsilon}, coefficients,
                        ParameterGradients{scale_grad, bias_grad}, maps, my_map(), threadIdx.x % WARP == 0);
}
SHAREDNORM_KERNEL(finish_backward);

ENTRY affine_of_moments(const double *moments, double count, const float *scale, const float *bias, double epsilon,
                        float *coefficients, int maps) {
    const long long map = my_number();
    if (map < maps) {
        const double var = moments[maps + map] / count;
        write_affine(coefficients, maps, map, affine_of(moments[map], var, scale[map], bias[map], epsilon));
    }
}
SHAREDNORM_KERNEL(affine_of_moments);

// ---- for each element type

#define SPLIT_ENTRIES(T, suffix)                                                                                    \
    ENTRY moments_##suffix(const T::Raw *x, double *parts, int images, int maps, int area, int image_parts,         \
                           int area_parts, int group, int lanes) {                                                  \
        SHARED_MEMORY(memory);                                                                                      \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        moments<T>(x, parts, my_share<T>(shape, sharing), shape, sharing, scratch_of(memory));                      \
    }                                                                                                               \
    SHAREDNORM_KERNEL(moments_##suffix);                                                                            \
    ENTRY finish_moments_##suffix(const double *parts, double *moments, int images, int maps, int area,             \
                                  int image_parts, int area_parts) {                                                \
        finish_moments<T>(parts, moments, Shape{images, maps, area}, Sharing{image_parts, area_parts, WARP, 1});    \
    }                                                                                                               \
    SHAREDNORM_KERNEL(finish_moments_##suffix);                                                                     \
    ENTRY finish_forward_##suffix(const double *parts, const float *scale, const float *bias, double epsilon,       \
                                  STATISTICS_ARGUMENTS, double *moments, float *coefficients, int images, int maps, \
                                  int area, int image_parts, int area_parts) {                                      \
        finish_forward_map<T>(parts, Parameters{scale, bias, epsilon}, STATISTICS, moments, coefficients,           \
                              Shape{images, maps, area}, Sharing{image_parts, area_parts, WARP, 1}, my_map(),       \
                              threadIdx.x % WARP == 0);                                                             \
    }                                                                                                               \
    SHAREDNORM_KERNEL(finish_forward_##suffix);                                                                     \
    ENTRY apply_##suffix(const T::Raw *x, const float *coefficients, T::Raw *y, int images, int maps, int area,     \
                         int image_parts, int area_parts, int group, int lanes) {                                   \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        const Share share = my_share<T>(shape, sharing);                                                            \
        apply<T>(x, y, read_affine(coefficients, maps, share), share, shape, sharing);                              \
    }                                                                                                               \
    SHAREDNORM_KERNEL(apply_##suffix);                                                                              \
    ENTRY evaluate_##suffix(const T::Raw *x, const float *mean, const float *var, const float *scale,               \
                            const float *bias, double epsilon, T::Raw *y, int images, int maps, int area,           \
                            int image_parts, int area_parts, int group, int lanes) {                                \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        const Share share = my_share<T>(shape, sharing);                                                            \
        Affine affine{0.0f, 0.0f, 0.0f};                                                                            \
        if (share.map < maps) {                                                                                     \
            affine = affine_of(mean[share.map], var[share.map], scale[share.map], bias[share.map], epsilon);        \
        }                                                                                                           \
        apply<T>(x, y, affine, share, shape, sharing);                                                              \
    }                                                                                                               \
    SHAREDNORM_KERNEL(evaluate_##suffix);                                                                           \
    ENTRY normalize_##suffix(const T::Raw *x, const double *moments, double count, const float *scale,              \
                             const float *bias, double epsilon, T::Raw *y, int images, int maps, int area,          \
                             int image_parts, int area_parts, int group, int lanes) {                               \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        const Share share = my_share<T>(shape, sharing);                                                            \
        Affine affine{0.0f, 0.0f, 0.0f};                                                                            \
        if (share.map < maps) {                                                                                     \
            affine = affine_of(moments[share.map], moments[maps + share.map] / count, scale[share.map],             \
                               bias[share.map], epsilon);                                                           \
        }                                                                                                           \
        apply<T>(x, y, affine, share, shape, sharing);                                                              \
    }                                                                                                               \
    SHAREDNORM_KERNEL(normalize_##suffix);                                                                          \
    ENTRY backward_sums_##suffix(const T::Raw *x, const T::Raw *grad, const double *moments, double *parts,         \
                                 int images, int maps, int area, int image_parts, int area_parts, int group,        \
                                 int lanes) {                                                                       \
        SHARED_MEMORY(memory);                                                                                      \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        backward_sums<T>(x, grad, moments, parts, my_share<T>(shape, sharing), shape, sharing,                      \
                         scratch_of(memory));                                                                       \
    }                                                                                                               \
    SHAREDNORM_KERNEL(backward_sums_##suffix);                                                                      \
    ENTRY backward_apply_##suffix(const T::Raw *x, const T::Raw *grad, const float *coefficients, T::Raw *dx,       \
                                  int images, int maps, int area, int image_parts, int area_parts, int group,       \
                                  int lanes) {                                                                      \
        const Shape shape{images, maps, area};                                                                      \
        const Sharing sharing{image_parts, area_parts, group, lanes};                                               \
        backward_apply<T>(x, grad, coefficients, dx, my_share<T>(shape, sharing), shape, sharing);                  \
    }                                                                                                               \
    SHAREDNORM_KERNEL(backward_apply_##suffix)

// image_parts * area_parts is the number of blocks: each block of a cluster has one part of the map.
#define RESIDENT_ENTRIES(T, suffix, kind, blocks, bounds)                                                           \
    extern "C" __global__ void bounds forward_##kind##_##suffix(                                                    \
        const T::Raw *x, T::Raw *y, const float *scale, const float *bias, double epsilon, STATISTICS_ARGUMENTS,    \
        double *moments, int images, int maps, int area, int image_parts, int area_parts, int group, int lanes) {   \
        SHARED_MEMORY(memory);                                                                                      \
        forward_resident<T, blocks>(x, y, Parameters{scale, bias, epsilon}, STATISTICS, moments,                    \
                                    Shape{images, maps, area}, Sharing{image_parts, area_parts, group, lanes},      \
                                    memory);                                                                        \
    }                                                                                                               \
    SHAREDNORM_CLUSTER_KERNEL(forward_##kind##_##suffix, blocks);                                                   \
    extern "C" __global__ void bounds backward_##kind##_##suffix(                                                   \
        const T::Raw *x, const T::Raw *grad, T::Raw *dx, const double *moments, const float *scale, double epsilon, \
        float *scale_grad, float *bias_grad, int images, int maps, int area, int image_parts, int area_parts,       \
        int group, int lanes) {                                                                                     \
        SHARED_MEMORY(memory);                                                                                      \
        backward_resident<T, blocks>(x, grad, dx, moments, Parameters{scale, nullptr, epsilon},                     \
                                     ParameterGradients{scale_grad, bias_grad}, Shape{images, maps, area},          \
                                     Sharing{image_parts, area_parts, group, lanes}, memory);                       \
    }                                                                                                               \
    SHAREDNORM_CLUSTER_KERNEL(backward_##kind##_##suffix, blocks)

#define BLOCK_BOUNDS __launch_bounds__(MAX_THREADS, 2)
#ifdef SHAREDNORM_EMULATED
#define CLUSTER_BOUNDS(blocks)  // the announcement says how large a cluster is
#else
#define CLUSTER_BOUNDS(blocks) __cluster_dims__(blocks, 1, 1) __launch_bounds__(MAX_THREADS, 2)
#endif

// Room for three blocks leaves 85 registers to a thread; 64, for four, would spill.
#define TICKETED_BOUNDS __launch_bounds__(TICKETED_THREADS, 3)

#define TICKETED_ENTRIES(T, suffix)                                                                                 \
    extern "C" __global__ void TICKETED_BOUNDS forward_ticketed_##suffix(                                              \
        const T::Raw *x, T::Raw *y, const float *scale, const float *bias, double epsilon, STATISTICS_ARGUMENTS,    \
        double *moments, float *coefficients, double *parts, unsigned *counters, int images, int maps, int area,    \
        int image_parts, int area_parts, int group, int lanes, int lag) {                                           \
        SHARED_MEMORY(memory);                                                                                      \
        forward_ticketed<T>(x, y, Parameters{scale, bias, epsilon}, STATISTICS, moments, coefficients, parts,       \
                            counters, Shape{images, maps, area}, Sharing{image_parts, area_parts, group, lanes},    \
                            lag, scratch_of(memory));                                                               \
    }                                                                                                               \
    SHAREDNORM_KERNEL(forward_ticketed_##suffix);                                                                   \
    extern "C" __global__ void TICKETED_BOUNDS backward_ticketed_##suffix(                                             \
        const T::Raw *x, const T::Raw *grad, T::Raw *dx, const double *moments, const float *scale, double epsilon, \
        float *scale_grad, float *bias_grad, float *coefficients, double *parts, unsigned *counters, int images,    \
        int maps, int area, int image_parts, int area_parts, int group, int lanes, int lag) {                       \
        SHARED_MEMORY(memory);                                                                                      \
        backward_ticketed<T>(x, grad, dx, moments, Parameters{scale, nullptr, epsilon}, coefficients,               \
                             ParameterGradients{scale_grad, bias_grad}, parts, counters,                            \
                             Shape{images, maps, area}, Sharing{image_parts, area_parts, group, lanes}, lag,        \
                             scratch_of(memory));                                                                   \
    }                                                                                                               \
    SHAREDNORM_KERNEL(backward_ticketed_##suffix)

#define TYPE_ENTRIES(T, suffix)                                         \
    SPLIT_ENTRIES(T, suffix);                                           \
    TICKETED_ENTRIES(T, suffix);                                        \
    RESIDENT_ENTRIES(T, suffix, resident, 1, BLOCK_BOUNDS)

TYPE_ENTRIES(Float32, f32);
TYPE_ENTRIES(Float16, f16);
TYPE_ENTRIES(BFloat16, bf16);

#ifdef SHAREDNORM_CLUSTERS
#define CLUSTER_ENTRIES(T, suffix)                                      \
    RESIDENT_ENTRIES(T, suffix, cluster2, 2, CLUSTER_BOUNDS(2));        \
    RESIDENT_ENTRIES(T, suffix, cluster4, 4, CLUSTER_BOUNDS(4));        \
    RESIDENT_ENTRIES(T, suffix, cluster8, 8, CLUSTER_BOUNDS(8))

CLUSTER_ENTRIES(Float32, f32);
CLUSTER_ENTRIES(Float16, f16);
CLUSTER_ENTRIES(BFloat16, bf16);
#endif
