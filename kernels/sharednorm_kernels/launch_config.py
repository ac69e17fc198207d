"""Which kernel serves which shape, and with how many blocks and threads. Plain arithmetic, without a GPU.

`plan` chooses; the kernels are right for every geometry that `Geometry` admits, so a choice is about speed alone.
The words are those of tile_walk.cuh: a tile is 16 bytes, a group of threads works on one part of one map, and stands in
rows of `lanes` threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

SUFFIXES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

WARP = 32
MAX_THREADS = 512
TILE_BYTES = 16
RESERVED_BYTES = 288  # shared memory before the tiles: RESERVED of resident.cuh
UNROLL = 4  # tiles that a thread has under way
CLUSTERS = (1, 2, 4, 8)
_LARGEST = 2**31 - 1
_LEAST_HELD = 16 * 1024
_FILLING = 2  # the largest cluster whose blocks may have a multiprocessor each
_NEARLY_ALL = 0.9  # of the multiprocessors
_LEAST_TASK = 128 * 1024
TICKETED_THREADS = 256
_BLOCKS_A_MULTIPROCESSOR = 3  # of so many threads: what the launch bounds of the ticketed kernels promise room for
_MOST_TICKETS = 2**32 - 1
_TILES_A_THREAD = 16  # that a thread of a reduction should have, so that the sum over the group is cheap beside it
_RESIDENT_TILES = 8  # the same of a resident launch, whose tiles are all on their way at once


@dataclass(frozen=True)
class View:
    """A tensor as the kernels see it: (images, maps, area), C-contiguous."""

    images: int
    maps: int
    area: int

    @property
    def count(self) -> int:
        """Values of one map."""
        return self.images * self.area

    @property
    def arguments(self) -> tuple[int, int, int]:
        """The kernels' arguments images, maps, area."""
        return self.images, self.maps, self.area


@dataclass(frozen=True)
class DeviceLimits:
    """What a device allows.

    Attributes:
        multiprocessors: Their number.
        shared_bytes: Shared memory that one block may have at most, opt-in; attribute
            MAX_SHARED_MEMORY_PER_BLOCK_OPTIN.
        shared_bytes_per_multiprocessor: Attribute MAX_SHARED_MEMORY_PER_MULTIPROCESSOR.
        compute_capability: Clusters begin with (9, 0).
    """

    multiprocessors: int
    shared_bytes: int
    shared_bytes_per_multiprocessor: int
    compute_capability: tuple[int, int]

    @property
    def largest_cluster(self) -> int:
        """Blocks that may read each other's shared memory."""
        return CLUSTERS[-1] if self.compute_capability >= (9, 0) else 1


@dataclass(frozen=True)
class Geometry:
    """One launch: `blocks` along x, `threads` a block, and how the threads share the tensor.

    Attributes:
        blocks: Blocks of the grid.
        threads: Threads of a block, a multiple of 32 up to 512.
        shared_bytes: Dynamic shared memory of a block.
        image_parts: Parts of the images that a map is cut into.
        area_parts: Parts of the area that a map is cut into.
        group: Threads that work on one part: a multiple of 32 that divides `threads`.
        lanes: Threads of a row, 1 to `group`.
    """

    blocks: int
    threads: int
    shared_bytes: int
    image_parts: int = 1
    area_parts: int = 1
    group: int = WARP
    lanes: int = WARP

    def __post_init__(self) -> None:
        """Refuse what the kernels do not admit."""
        whole = self.group >= WARP and self.group % WARP == 0 and self.threads % self.group == 0
        if not (whole and WARP <= self.threads <= MAX_THREADS):
            raise ValueError(f"{self.threads} threads in groups of {self.group} (expected: multiples, up to 512)")
        if not (1 <= self.lanes <= self.group and self.parts >= 1 and 1 <= self.blocks <= _LARGEST):
            raise ValueError(f"{self.lanes} lanes, {self.parts} parts, {self.blocks} blocks: out of range")

    @property
    def parts(self) -> int:
        """Parts of a map; a reduction writes two float64 for each."""
        return self.image_parts * self.area_parts

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """The kernels' arguments image_parts, area_parts, group, lanes."""
        return self.image_parts, self.area_parts, self.group, self.lanes


@dataclass(frozen=True)
class Fused:
    """A launch that does all of a forward or a backward.

    Attributes:
        kind: "resident", "cluster2", "cluster4", "cluster8", where maps stay in shared memory, or "ticketed", where
            they stay in the L2 cache: the entry is forward_KIND or backward_KIND.
        geometry: Its launch. A ticketed one has any number of blocks; they draw their work.
        lag: Ticketed: how many maps the sums are ahead of the results.
    """

    kind: str
    geometry: Geometry
    lag: int = 0


@dataclass(frozen=True)
class Plan:
    """How the tensors of one shape are computed.

    Attributes:
        view: The shape.
        reduce: Launch of moments and backward_sums.
        apply: Launch of apply and backward_apply.
        forward: A training forward in one launch, or None: moments, finish_forward, apply.
        backward: A backward in one launch, or None: backward_sums, finish_backward, backward_apply.
    """

    view: View
    reduce: Geometry
    apply: Geometry
    forward: Fused | None
    backward: Fused | None


def view_of(shape: Sequence[int]) -> View:
    """Return (N, C, ...) as images, maps, area.

    Raises:
        ValueError: Fewer than two dimensions, one that is not positive, or one or an area beyond 2**31 - 1.
    """
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"a tensor has the shape {tuple(shape)} (expected: (N, C, ...), every size at least 1)")
    view = View(shape[0], shape[1], math.prod(shape[2:]))
    if max(view.arguments) > _LARGEST - 2 * MAX_THREADS:
        raise ValueError(f"the shape {tuple(shape)} is too large for 32-bit sizes")
    return view


def entry(name: str, dtype_name: str) -> str:
    """Return a kernel's name for an element type, such as "moments_f32" for "moments" and "float32"."""
    return f"{name}_{SUFFIXES[dtype_name]}"


def finish_geometry(maps: int) -> Geometry:
    """Return the launch of finish_moments, finish_forward and finish_backward: one warp a map."""
    return Geometry(math.ceil(maps / 4), 4 * WARP, 0)


def map_geometry(maps: int) -> Geometry:
    """Return the launch of kernels with one thread a map, as affine_of_moments."""
    return Geometry(math.ceil(maps / 128), 128, 0)


def plan(shape: Sequence[int], itemsize: int, limits: DeviceLimits) -> Plan:
    """Return how tensors of a shape (N, C, ...) and an element size in bytes (2 or 4) are computed on a device.

    Raises:
        ValueError: The shape or the element size cannot be computed.
    """
    if itemsize not in {2, 4}:
        raise ValueError(f"elements have {itemsize} bytes (expected: 2 or 4)")
    view, per_tile = view_of(shape), TILE_BYTES // itemsize
    return Plan(
        view,
        reduce_geometry(view, per_tile, limits),
        apply_geometry(view, per_tile),
        resident(view, per_tile, limits, tensors=1) or ticketed(view, per_tile, limits, tensors=1),
        resident(view, per_tile, limits, tensors=2) or ticketed(view, per_tile, limits, tensors=2),
    )


def tiles_of_run(view: View, area_parts: int, per_tile: int) -> int:
    """Return the most tiles that one part of one run can touch; one more where a run may begin inside a tile."""
    length = min(math.ceil(math.ceil(view.area / per_tile) / area_parts) * per_tile, view.area)
    return length // per_tile if view.area % per_tile == 0 else (length + 2 * per_tile - 2) // per_tile


def lanes_for(tiles: int, images: int, group: int) -> int:
    """Return the threads of a row that leave the fewest threads of a group idle, for runs of `tiles` tiles."""
    best, best_share = min(tiles, group), 0.0
    for turns in range(math.ceil(tiles / group), math.ceil(tiles / group) + 4):
        lanes = math.ceil(tiles / turns)
        share = min(group // lanes, images) * tiles / turns
        if lanes >= min(tiles, 8) and share > best_share * 1.05:  # longer rows unless it pays: they read in one piece
            best, best_share = lanes, share
    return best


def _sized(view: View, per_tile: int, group: int, threads: int, parts: tuple[int, int], shared: int = 0) -> Geometry:
    image_parts, area_parts = parts
    images = math.ceil(view.images / image_parts)
    lanes = lanes_for(tiles_of_run(view, area_parts, per_tile), images, group)
    blocks = math.ceil(view.maps * image_parts * area_parts / (threads // group))
    return Geometry(blocks, threads, shared, image_parts, area_parts, group, lanes)


def _group_for(tiles: int, tiles_a_thread: int, most: int) -> int:
    wanted = max(math.ceil(tiles / tiles_a_thread), WARP)
    return min(1 << (wanted - 1).bit_length(), most)


def _cut(view: View, per_tile: int, parts: int) -> tuple[int, int]:
    """Cut a map into about `parts` parts: images first, whose runs then stay whole, then the area.

    No part has more images than another but for the last: whoever has most is what all wait for.
    """
    image_parts = math.ceil(view.images / math.ceil(view.images / min(parts, view.images)))
    most = math.ceil(view.area / (per_tile * WARP))
    return image_parts, min(math.ceil(parts / min(parts, view.images)), most)


def reduce_geometry(view: View, per_tile: int, limits: DeviceLimits) -> Geometry:
    """Return the launch of a split reduction: one group a map where there are many, parts where there are few."""
    tiles = view.images * tiles_of_run(view, 1, per_tile)
    group = _group_for(tiles, _TILES_A_THREAD, 256)
    wanted = math.ceil(limits.multiprocessors * 1024 / (view.maps * group))
    parts = min(wanted, max(tiles // (group * 2 * UNROLL), 1))
    return _sized(view, per_tile, group, 256, _cut(view, per_tile, parts), RESERVED_BYTES)


def apply_geometry(view: View, per_tile: int) -> Geometry:
    """Return the launch of a split apply: parts so small that a thread has about two rounds of tiles."""
    tiles = view.images * tiles_of_run(view, 1, per_tile)
    group = _group_for(tiles, 2 * UNROLL, MAX_THREADS)
    return _sized(view, per_tile, group, max(group, 256), _cut(view, per_tile, math.ceil(tiles / (group * 2 * UNROLL))))


def resident(view: View, per_tile: int, limits: DeviceLimits, *, tensors: int) -> Fused | None:
    """Return a launch that keeps `tensors` tensors in shared memory, or None where their maps do not fit.

    The smallest cluster that gives nearly every multiprocessor a block: the fewer blocks have to meet, and the better
    they fill the device, the faster. One or two blocks may fill a multiprocessor each; larger clusters leave room for
    two, so that one reads while the other writes. A block of a cluster holds at least 16 KiB: less is read faster than
    a cluster meets. Measured on an H100 with every choice that there is for the shapes of `benchmarks.gpu.kernels`.
    """
    held = view.images * tiles_of_run(view, 1, per_tile) * TILE_BYTES * tensors
    half = min(limits.shared_bytes, limits.shared_bytes_per_multiprocessor // 2 - 1024)
    fitting = [
        candidate
        for blocks in CLUSTERS
        if blocks == 1 or (blocks <= limits.largest_cluster and held // blocks >= _LEAST_HELD)
        for candidate in [_resident_of(view, per_tile, tensors, blocks)]
        if candidate.geometry.shared_bytes <= limits.shared_bytes
    ]
    for candidate in fitting:
        geometry = candidate.geometry
        roomy = geometry.parts <= _FILLING or geometry.shared_bytes <= half
        if roomy and geometry.blocks >= limits.multiprocessors * _NEARLY_ALL:
            return candidate
    return fitting[-1] if fitting else None


def ticketed(view: View, per_tile: int, limits: DeviceLimits, *, tensors: int) -> Fused | None:
    """Return a launch that hopes to read `tensors` tensors again from the L2 cache, or None where there are few maps.

    As many blocks as fit on the device; a task has at least 128 KiB, so that drawing it costs little. The sums are so
    many maps ahead that those of a map are done when its results are drawn: what the blocks have in hand at a time,
    rounded up. Where not all of that stays in the cache, one launch instead of three still pays.
    """
    blocks = _BLOCKS_A_MULTIPROCESSOR * limits.multiprocessors
    map_bytes = view.images * tiles_of_run(view, 1, per_tile) * TILE_BYTES * tensors
    cut = _cut(view, per_tile, max(min(blocks, map_bytes // _LEAST_TASK), 1))
    geometry = _sized(view, per_tile, TICKETED_THREADS, TICKETED_THREADS, cut, RESERVED_BYTES)
    lag = math.ceil(blocks / geometry.parts)
    if lag >= view.maps or 2 * view.maps * geometry.parts + blocks > _MOST_TICKETS:
        return None
    return Fused("ticketed", replace(geometry, blocks=min(blocks, geometry.blocks)), lag)


def _resident_of(view: View, per_tile: int, tensors: int, blocks: int) -> Fused:
    tiles = view.images * tiles_of_run(view, 1, per_tile)
    if blocks == 1:
        group = _group_for(tiles, _RESIDENT_TILES // tensors, MAX_THREADS)
        kind, threads = "resident", max(group, 128)
    else:
        kind, threads = f"cluster{blocks}", _group_for(tiles // blocks, _RESIDENT_TILES // tensors, MAX_THREADS)
        group = threads
    cuts = [(blocks // area_parts, area_parts) for area_parts in CLUSTERS if area_parts <= blocks]
    choices = []
    for cut in cuts:
        geometry = _sized(view, per_tile, group, threads, cut)
        turns = _turns(view, per_tile, geometry)
        shared = RESERVED_BYTES + turns * threads * TILE_BYTES * tensors
        choices.append(_sized(view, per_tile, group, threads, cut, shared))
    return Fused(kind, min(choices, key=lambda each: each.shared_bytes))


def _turns(view: View, per_tile: int, geometry: Geometry) -> int:
    """Return the most tiles that one thread can have."""
    rows = geometry.group // geometry.lanes
    images = math.ceil(math.ceil(view.images / geometry.image_parts) / rows)
    return images * math.ceil(tiles_of_run(view, geometry.area_parts, per_tile) / geometry.lanes)
