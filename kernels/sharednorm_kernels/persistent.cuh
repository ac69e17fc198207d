// Ticketed kernels: the work of the split kernels in one launch, for maps that fit neither a block nor a cluster. The
// order lets the second read of a map find it in the L2 cache: two trips to memory instead of three, and three instead
// of five for a backward.
//
// A task is one part of one map: its sums, or its result. Blocks draw tasks by an integer ticket, in the order
// sums(0), ..., sums(lag - 1), then sums(lag), result(0), sums(lag + 1), result(1), ... and what is left of the results.
// The block that brings the last sums of a map merges its parts, in fixed order, and writes the coefficients; a result
// waits for that.
//
// A block draws its next ticket when it begins a task, so that the answer is there when it ends it.
//
// No deadlock, however few blocks are on the device at a time: tickets are handed out in order, only to blocks that
// run, a block does its own in order, and all sums of a map have smaller tickets than its results. So of the tasks that
// are not done, the one with the smallest ticket has been begun, and waits for nothing that is not done. One block
// alone does all tasks without ever waiting.
//
// Which block does what, and when, is left to chance, and no bit depends on it: a part's sums go to the part's own slot,
// and all parts of a map have been written before somebody merges them.
#pragma once

#include "multi_pass.cuh"

namespace sharednorm {

constexpr int TICKETED_THREADS = 256;  // of a block, at most

struct Task {
    int map, part;
    bool sums;
};

// The task of a ticket below 2 * maps * parts; lag is 1 to maps.
__device__ __forceinline__ Task task_of(long long ticket, int parts, int maps, int lag) {
    const int place = static_cast<int>(ticket / parts), part = static_cast<int>(ticket % parts);
    if (place < lag) return Task{place, part, true};
    const int after = place - lag, paired = maps - lag;
    if (after < 2 * paired) return Task{after % 2 == 0 ? lag + after / 2 : after / 2, part, after % 2 == 0};
    return Task{after - paired, part, false};
}

// Draws tasks until there are none left, in all threads of the block alike. Of the counters the first hands out the
// tickets; the others count, for each map, the parts that are done, and one more once they are merged.
template <class T, class Sums, class Finish, class Result>
__device__ __forceinline__ void do_tasks(unsigned *counters, const Shape &shape, const Sharing &sharing, int lag,
                                         double *scratch, Sums sums, Finish finish, Result result) {
    unsigned *board = reinterpret_cast<unsigned *>(scratch + EXCHANGE);  // what the first thread tells the others
    const long long end = 2ll * shape.maps * sharing.parts();
    const unsigned parts = static_cast<unsigned>(sharing.parts());
    unsigned next = threadIdx.x == 0 ? add_one(counters) : 0;
    for (;;) {
        if (threadIdx.x == 0) board[0] = next;
        block_barrier();
        const long long ticket = board[0];
        if (ticket >= end) break;  // for the whole block
        if (threadIdx.x == 0) next = add_one(counters);  // on its way while the block does what it has drawn
        const Task task = task_of(ticket, sharing.parts(), shape.maps, lag);
        const Share share = share_of<T>(shape, sharing, task.map, task.part);
        unsigned *done = counters + 1 + task.map;
        if (task.sums) {
            sums(share);  // its first thread writes the part's slot
            if (threadIdx.x == 0) {
                device_fence();
                board[1] = add_one(done) + 1 == parts;
                device_fence();
            }
            block_barrier();
            if (board[1] != 0) {
                finish(task.map);  // every warp merges, so that no thread is left out; the first thread writes
                if (threadIdx.x == 0) {
                    device_fence();
                    add_one(done);
                }
            }
        } else {
            if (threadIdx.x == 0) {
                wait_for(done, parts + 1);
                device_fence();
            }
            block_barrier();
            result(share);
        }
    }
}

// moments: float64 (2, maps): mean, m2; coefficients: float32 (3, maps); parts: float64 (maps, parts, 2)
template <class T>
__device__ __forceinline__ void forward_ticketed(const typename T::Raw *x, typename T::Raw *y,
                                                 const Parameters &parameters, const Statistics &statistics,
                                                 double *to_moments, float *coefficients, double *parts,
                                                 unsigned *counters, const Shape &shape, const Sharing &sharing,
                                                 int lag, double *scratch) {
    do_tasks<T>(
        counters, shape, sharing, lag, scratch,
        [&](const Share &share) { moments<T>(x, parts, share, shape, sharing, scratch); },
        [&](int map) {
            finish_forward_map<T>(parts, parameters, statistics, to_moments, coefficients, shape, sharing, map,
                                  threadIdx.x == 0);
        },
        [&](const Share &share) {
            apply<T>(x, y, read_affine(coefficients, shape.maps, share), share, shape, sharing);
        });
}

// coefficients: float32 (4, maps); parts: float64 (maps, parts, 2)
template <class T>
__device__ __forceinline__ void backward_ticketed(const typename T::Raw *x, const typename T::Raw *grad,
                                                  typename T::Raw *dx, const double *moments,
                                                  const Parameters &parameters, float *coefficients,
                                                  const ParameterGradients &gradients, double *parts,
                                                  unsigned *counters, const Shape &shape, const Sharing &sharing,
                                                  int lag, double *scratch) {
    const double count = static_cast<double>(shape.images) * shape.area;
    do_tasks<T>(
        counters, shape, sharing, lag, scratch,
        [&](const Share &share) { backward_sums<T>(x, grad, moments, parts, share, shape, sharing, scratch); },
        [&](int map) {
            finish_backward_map(parts, sharing.parts(), moments, count, parameters, coefficients, gradients, shape.maps,
                                map, threadIdx.x == 0);
        },
        [&](const Share &share) { backward_apply<T>(x, grad, coefficients, dx, share, shape, sharing); });
}

}  // namespace sharednorm
