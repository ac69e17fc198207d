// Resident kernels: a map's values stay in shared memory between the sums and the result, so that the tensor is read
// once and written once. Everything that a training forward does, and a backward, is one launch.
//
// BLOCKS = 1: a map belongs to one group; a block of several groups takes several small maps.
// BLOCKS = 2, 4, 8: a map belongs to a cluster of that many blocks, each with one part of it. The blocks read each
// other's moments through distributed shared memory and merge them in the order of their ranks.
//
// A thread reads back only what it wrote itself: no barrier is needed for the tiles, and the 16 bytes of
// neighbouring threads lie side by side, so no banks collide.
#pragma once

#include "multi_pass.cuh"

namespace sharednorm {

// Place of a thread's k-th tile.
__device__ __forceinline__ uint4 *own_tile(uint4 *memory, int k) {
    return memory + RESERVED + k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
}

// How many tiles a thread has under way, of a forward's tensor and of each of a backward's two.
constexpr int AHEAD = 4;

// Begins to bring a tile to its place; nothing where there is no tile.
template <class T>
__device__ __forceinline__ void begin_tile(Copies &copies, uint4 *place, const typename T::Raw *tensor,
                                           const Tile &tile, long long size) {
    const long long first = tile.number * PER_TILE<T>;
    if (tile.valid == 0) return;
    if (first + PER_TILE<T> <= size) {
        copies.begin(place, tensor + first);
    } else {
        *place = load_tile<T, Again::NO>(tensor, tile, size);
    }
}

// Puts three numbers of each block where the others see them, and calls use(numbers) for each rank in order.
template <int BLOCKS, class Use>
__device__ __forceinline__ void exchange(double *scratch, const Moments &mine, Use use) {
#ifdef SHAREDNORM_CLUSTERS
    if (threadIdx.x == 0) {
        scratch[EXCHANGE] = mine.count;
        scratch[EXCHANGE + 1] = mine.mean;
        scratch[EXCHANGE + 2] = mine.m2;
    }
    cluster_barrier();
    UNROLLED
    for (int rank = 0; rank < BLOCKS; ++rank) {
        const double *other = shared_of_block(scratch + EXCHANGE, rank);
        use(Moments{other[0], other[1], other[2]});
    }
    cluster_barrier();  // a block that ends takes its shared memory with it
#endif
}

// The moments of the whole map from those of the block's part.
template <int BLOCKS>
__device__ __forceinline__ Moments moments_of_map(double *scratch, const Moments &mine) {
    if constexpr (BLOCKS == 1) {
        return mine;
    } else {
        Moments total{0.0, 0.0, 0.0};
        exchange<BLOCKS>(scratch, mine, [&](const Moments &each) { total = merged(total, each); });
        return total;
    }
}

template <int BLOCKS>
__device__ __forceinline__ Pair sums_of_map(double *scratch, const Pair &mine) {
    if constexpr (BLOCKS == 1) {
        return mine;
    } else {
        Pair total{0.0, 0.0};
        exchange<BLOCKS>(scratch, Moments{0.0, mine.first, mine.second}, [&](const Moments &each) {
            total.first += each.mean;
            total.second += each.m2;
        });
        return total;
    }
}

// moments: float64 (2, maps): mean, m2
template <class T, int BLOCKS>
__device__ __forceinline__ void forward_resident(const typename T::Raw *x, typename T::Raw *y,
                                                 const Parameters &parameters, const Statistics &statistics,
                                                 double *moments, const Shape &shape, const Sharing &sharing,
                                                 uint4 *memory) {
    const Share share = my_share<T>(shape, sharing);
    const double shift = shift_of<T>(x, shape, share);
    Copies copies;
    Walk<T> coming(shape, share, sharing);
    for (int i = 0; i < AHEAD; ++i) {
        begin_tile<T>(copies, own_tile(memory, i), x, coming.take(), shape.size());
        copies.end_step();
    }
    Pair sums{0.0, 0.0};
    int k = 0;
    for (Walk<T> walk(shape, share, sharing); walk.more(); ++k) {
        const Tile tile = walk.take();
        copies.wait_for_all_but<AHEAD - 1>();
        add_deviations<T>(sums, unpack<T>(*own_tile(memory, k)), tile, shift);
        begin_tile<T>(copies, own_tile(memory, k + AHEAD), x, coming.take(), shape.size());
        copies.end_step();
    }
    double *scratch = scratch_of(memory);
    const Moments part = moments_of(share.count(), shift, group_sum(sums, sharing.group, scratch));
    const Moments batch = moments_of_map<BLOCKS>(scratch, part);
    const bool there = share.map < shape.maps;
    if (there && share.part == 0 && threadIdx.x % sharing.group == 0) {
        moments[share.map] = batch.mean;
        moments[shape.maps + share.map] = batch.m2;
        update_statistics(statistics, share.map, batch);
    }
    const Affine affine = affine_of(batch.mean, batch.m2 / batch.count, there ? parameters.scale[share.map] : 0.0f,
                                    there ? parameters.bias[share.map] : 0.0f, parameters.epsilon);
    k = 0;
    for (Walk<T> walk(shape, share, sharing); walk.more(); ++k) {
        const Tile tile = walk.take();
        Values<T> values = unpack<T>(*own_tile(memory, k));
        UNROLLED
        for (int j = 0; j < PER_TILE<T>; ++j) values.of[j] = affine(values.of[j]);
        store_tile<T>(y, tile, values);
    }
}

// Two tiles a place: the input's at 2 k, the gradient's at 2 k + 1.
template <class T, int BLOCKS>
__device__ __forceinline__ void backward_resident(const typename T::Raw *x, const typename T::Raw *grad,
                                                  typename T::Raw *dx, const double *moments,
                                                  const Parameters &parameters, const ParameterGradients &gradients,
                                                  const Shape &shape, const Sharing &sharing, uint4 *memory) {
    const Share share = my_share<T>(shape, sharing);
    const bool there = share.map < shape.maps;
    const Moments batch{static_cast<double>(shape.images) * shape.area, there ? moments[share.map] : 0.0,
                        there ? moments[shape.maps + share.map] : 0.0};
    const float hi = static_cast<float>(batch.mean);
    Copies copies;
    Walk<T> coming(shape, share, sharing);
    const auto begin_both = [&](int place) {
        const Tile tile = coming.take();
        begin_tile<T>(copies, own_tile(memory, 2 * place), x, tile, shape.size());
        begin_tile<T>(copies, own_tile(memory, 2 * place + 1), grad, tile, shape.size());
        copies.end_step();
    };
    for (int i = 0; i < AHEAD; ++i) begin_both(i);
    Pair sums{0.0, 0.0};
    int k = 0;
    for (Walk<T> walk(shape, share, sharing); walk.more(); ++k) {
        const Tile tile = walk.take();
        copies.wait_for_all_but<AHEAD - 1>();
        add_products<T>(sums, unpack<T>(*own_tile(memory, 2 * k)), unpack<T>(*own_tile(memory, 2 * k + 1)), tile, hi);
        begin_both(k + AHEAD);
    }
    double *scratch = scratch_of(memory);
    const Pair total = sums_of_map<BLOCKS>(scratch, group_sum(sums, sharing.group, scratch));
    const Gradients result = gradients_of(batch, total, there ? parameters.scale[share.map] : 0.0f,
                                          parameters.epsilon);
    if (there && share.part == 0 && threadIdx.x % sharing.group == 0) {
        gradients.scale[share.map] = result.scale;
        gradients.bias[share.map] = result.bias;
    }
    k = 0;
    for (Walk<T> walk(shape, share, sharing); walk.more(); ++k) {
        const Tile tile = walk.take();
        const Values<T> input = unpack<T>(*own_tile(memory, 2 * k));
        Values<T> values = unpack<T>(*own_tile(memory, 2 * k + 1));
        UNROLLED
        for (int j = 0; j < PER_TILE<T>; ++j) values.of[j] = result.input(input.of[j], values.of[j]);
        store_tile<T>(dx, tile, values);
    }
}

}  // namespace sharednorm
