// The kernels of the product, and beside them the naive ones, which the tests compare them with.
#include "../../kernels/sharednorm_kernels/sharednorm.cu"
#include "naive.cuh"

#define NAIVE_ENTRIES(T, suffix)                                                                                    \
    ENTRY naive_moments_##suffix(const T::Raw *x, double *moments, int images, int maps, int area) {                \
        naive_moments<T>(x, moments, Shape{images, maps, area});                                                    \
    }                                                                                                               \
    SHAREDNORM_KERNEL(naive_moments_##suffix);                                                                      \
    ENTRY naive_backward_sums_##suffix(const T::Raw *x, const T::Raw *grad, const double *moments, double *sums,    \
                                       int images, int maps, int area) {                                            \
        naive_backward_sums<T>(x, grad, moments, sums, Shape{images, maps, area});                                  \
    }                                                                                                               \
    SHAREDNORM_KERNEL(naive_backward_sums_##suffix);                                                                \
    ENTRY naive_apply_##suffix(const T::Raw *x, const float *coefficients, T::Raw *y, int images, int maps,         \
                               int area) {                                                                          \
        naive_apply<T>(x, coefficients, y, Shape{images, maps, area});                                              \
    }                                                                                                               \
    SHAREDNORM_KERNEL(naive_apply_##suffix);                                                                        \
    ENTRY naive_backward_apply_##suffix(const T::Raw *x, const T::Raw *grad, const float *coefficients, T::Raw *dx, \
                                        int images, int maps, int area) {                                           \
        naive_backward_apply<T>(x, grad, coefficients, dx, Shape{images, maps, area});                              \
    }                                                                                                               \
    SHAREDNORM_KERNEL(naive_backward_apply_##suffix)

NAIVE_ENTRIES(Float32, f32);
NAIVE_ENTRIES(Float16, f16);
NAIVE_ENTRIES(BFloat16, bf16);
