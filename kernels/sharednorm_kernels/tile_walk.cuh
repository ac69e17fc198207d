// How a tensor is stored, and how threads share it.
//
// A tensor has the shape (images, maps, area), C-contiguous, and begins at a multiple of 16 bytes. The values of
// one map (a channel) are `images` runs of `area` values, `maps * area` apart.
//
// The unit of access is a tile: 16 bytes at a multiple of 16, so 4 or 8 values. A run need not begin or end at a
// tile; then its first and last tile hold values of its neighbours too, which are read and left out. Only past the
// end of the tensor nothing is read. So loads are 16 bytes wide for every area, and stores wherever a tile is whole.
//
// A group is 32 or more threads of one block, a multiple of 32, that work on one share: one map, or one of its parts
// (a range of images times a range of the area). Its threads stand in rows of `lanes`: a row goes along a run tile
// by tile, and the rows take the images in turn. Which thread takes which value follows from these numbers alone.
#pragma once

#include "platform.cuh"

namespace sharednorm {

// The element types. Raw is what memory holds.
struct Float32 {
    using Raw = float;
    static __device__ __forceinline__ float widen(Raw raw) { return raw; }
    static __device__ __forceinline__ Raw narrow(float value) { return value; }
};

struct Float16 {
    using Raw = unsigned short;
    static __device__ __forceinline__ float widen(Raw raw) { return widen_float16(raw); }
    static __device__ __forceinline__ Raw narrow(float value) { return narrow_float16(value); }
};

struct BFloat16 {
    using Raw = unsigned short;
    static __device__ __forceinline__ float widen(Raw raw) { return widen_bfloat16(raw); }
    static __device__ __forceinline__ Raw narrow(float value) { return narrow_bfloat16(value); }
};

template <class T>
constexpr int PER_TILE = static_cast<int>(16 / sizeof(typename T::Raw));

// The values of a tile, in float32. Loops over them have constant bounds and unroll: all of it lives in registers.
template <class T>
struct Values {
    float of[PER_TILE<T>];
};

template <class T>
__device__ __forceinline__ Values<T> unpack(const uint4 &bytes) {
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    Values<T> values;
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        if constexpr (PER_TILE<T> == 4) {
            values.of[i] = float_of_bits(words[i]);
        } else {
            values.of[i] = T::widen(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2))));
        }
    }
    return values;
}

template <class T>
__device__ __forceinline__ uint4 pack(const Values<T> &values) {
    unsigned words[4] = {0, 0, 0, 0};
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        if constexpr (PER_TILE<T> == 4) {
            words[i] = bits_of_float(values.of[i]);
        } else {
            words[i / 2] |= static_cast<unsigned>(T::narrow(values.of[i])) << (16 * (i % 2));
        }
    }
    return uint4{words[0], words[1], words[2], words[3]};
}

struct Shape {
    int images, maps, area;

    __device__ __forceinline__ long long size() const { return static_cast<long long>(images) * maps * area; }
};

// How a kernel's threads share a tensor; the same numbers in every thread.
struct Sharing {
    int image_parts, area_parts;  // a map is cut into image_parts * area_parts parts
    int group;                    // threads that work on one part: a multiple of 32 that divides the block
    int lanes;                    // threads of a row, 1 to group

    __device__ __forceinline__ int parts() const { return image_parts * area_parts; }
};

// One part of one map. A part of a map that is not there, or that got nothing, has no images.
struct Share {
    int map, part;
    int image, image_end;
    int offset, length;  // its range of the area

    __device__ __forceinline__ double count() const { return static_cast<double>(image_end - image) * length; }
};

// The part `part` of `parts` equal ranges of 0..total: its beginning.
__device__ __forceinline__ int part_begin(int total, int part, int parts) {
    return static_cast<int>(static_cast<long long>(total) * part / parts);
}

// Ranges of the area begin at whole tiles, counted from the run's first value.
__device__ __forceinline__ int area_begin(int area, int part, int parts, int per_tile) {
    const long long begin = static_cast<long long>(part_begin((area - 1) / per_tile + 1, part, parts)) * per_tile;
    return begin < area ? static_cast<int>(begin) : area;
}

template <class T>
__device__ __forceinline__ Share share_of(const Shape &shape, const Sharing &sharing, int map, int part) {
    Share share{map, part, 0, 0, 0, 0};
    if (map < shape.maps) {
        const int image_part = part / sharing.area_parts, area_part = part % sharing.area_parts;
        share.image = part_begin(shape.images, image_part, sharing.image_parts);
        share.image_end = part_begin(shape.images, image_part + 1, sharing.image_parts);
        share.offset = area_begin(shape.area, area_part, sharing.area_parts, PER_TILE<T>);
        share.length = area_begin(shape.area, area_part + 1, sharing.area_parts, PER_TILE<T>) - share.offset;
        share.image_end = share.length > 0 ? share.image_end : share.image;
    }
    return share;
}

// The share of the calling thread's group. Shares are numbered map by map, part by part, over the whole grid.
template <class T>
__device__ __forceinline__ Share my_share(const Shape &shape, const Sharing &sharing) {
    const long long number = static_cast<long long>(blockIdx.x) * (blockDim.x / sharing.group)
                             + threadIdx.x / sharing.group;
    return share_of<T>(shape, sharing, static_cast<int>(number / sharing.parts()),
                       static_cast<int>(number % sharing.parts()));
}

// Number of the first value of a share's run in one image, counted over the whole tensor.
__device__ __forceinline__ long long run_begin(const Shape &shape, const Share &share, int image) {
    return (static_cast<long long>(image) * shape.maps + share.map) * shape.area + share.offset;
}

// A tile, and which of its values count: a bit each, the first value's is the lowest. No bit: there is no such tile.
struct Tile {
    long long number;
    unsigned valid;

    __device__ __forceinline__ bool counts(int i) const { return (valid >> i & 1u) != 0; }
};

template <class T>
constexpr unsigned WHOLE = (1u << PER_TILE<T>) - 1;

// The tiles of the calling thread, one after the other.
template <class T>
class Walk {
   public:
    __device__ __forceinline__ Walk(const Shape &shape, const Share &share, const Sharing &sharing)
        : shape_(shape), share_(share), lanes_(sharing.lanes), rows_(sharing.group / sharing.lanes) {
        const int member = threadIdx.x % sharing.group;
        lane_ = member % lanes_;
        // Threads left over when a group has no whole number of rows take nothing.
        image_ = member / lanes_ < rows_ ? share.image + member / lanes_ : share.image_end;
        begin_run();
        skip_ended_runs();
    }

    __device__ __forceinline__ bool more() const { return image_ < share_.image_end; }

    // The next tile; after the last one, a tile without values.
    __device__ __forceinline__ Tile take() {
        if (!more()) return Tile{0, 0};
        const long long before = begin_ - tile_ * PER_TILE<T>;  // the tile's values before the run, if positive
        const long long end = before + share_.length;           // those before the end of the run
        unsigned valid = WHOLE<T>;
        if (before > 0) valid &= ~0u << before;
        if (end < PER_TILE<T>) valid &= ~(~0u << end);
        const Tile taken{tile_, valid};
        tile_ += lanes_;
        skip_ended_runs();
        return taken;
    }

   private:
    __device__ __forceinline__ void begin_run() {
        begin_ = run_begin(shape_, share_, image_);
        tile_ = begin_ / PER_TILE<T> + lane_;
    }

    __device__ __forceinline__ void skip_ended_runs() {
        while (more() && tile_ * PER_TILE<T> >= begin_ + share_.length) {
            image_ += rows_;
            begin_run();
        }
    }

    Shape shape_;
    Share share_;
    int lanes_, rows_, lane_, image_;
    long long begin_, tile_;
};

// Whether a tile is read again soon, so that the caches should keep it.
enum class Again { YES, NO };

// Reads a tile of a tensor of `size` values; values past its end, and those of no tile, are zeros.
template <class T, Again AGAIN>
__device__ __forceinline__ uint4 load_tile(const typename T::Raw *tensor, const Tile &tile, long long size) {
    const long long first = tile.number * PER_TILE<T>;
    if (tile.valid != 0 && first + PER_TILE<T> <= size) {
        return AGAIN == Again::YES ? load_16_bytes(tensor + first) : load_last_16_bytes(tensor + first);
    }
    Values<T> values;
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        values.of[i] = tile.counts(i) ? T::widen(tensor[first + i]) : 0.0f;
    }
    return pack<T>(values);
}

// Writes the values of a tile that count, and no other.
template <class T>
__device__ __forceinline__ void store_tile(typename T::Raw *tensor, const Tile &tile, const Values<T> &values) {
    const long long first = tile.number * PER_TILE<T>;
    if (tile.valid == WHOLE<T>) {
        store_16_bytes(tensor + first, pack<T>(values));
        return;
    }
    UNROLLED
    for (int i = 0; i < PER_TILE<T>; ++i) {
        if (tile.counts(i)) tensor[first + i] = T::narrow(values.of[i]);
    }
}

}  // namespace sharednorm
