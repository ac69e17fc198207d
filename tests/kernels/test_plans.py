"""Which kernel serves which shape: the choice fits the device, and covers every value. Needs no GPU and no compiler."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharednorm_kernels import Geometry, Plan, plan, sources, view_of
from sharednorm_kernels.launch_config import MAX_THREADS, RESERVED_BYTES, TICKETED_THREADS, lanes_for
from tests.support.kernels.kernel_checks import A100, H200, SMALL, tiles_of_threads

NETWORK = [
    (images, *shape)
    for images in (32, 256)
    for shape in ((64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (1024, 14, 14),
                  (2048, 7, 7))
]  # fmt: skip
DEVICES = {"H200": H200, "A100": A100, "small": SMALL}


def _check(planned: Plan, shape: tuple[int, ...], itemsize: int, device: str) -> None:
    limits = DEVICES[device]
    view = view_of(shape)
    for launch in (planned.reduce, planned.apply):
        assert launch.blocks * (launch.threads // launch.group) >= view.maps * launch.parts
    for tensors, resident in ((1, planned.forward), (2, planned.backward)):
        if resident is None:
            continue
        launch = resident.geometry
        assert launch.shared_bytes <= limits.shared_bytes
        if resident.kind == "ticketed":
            assert 1 <= resident.lag < view.maps
            assert resident.lag * launch.parts >= launch.blocks
            assert launch.group == launch.threads
            continue
        assert resident.kind == ("resident" if launch.parts == 1 else f"cluster{launch.parts}")
        assert launch.parts <= limits.largest_cluster
        if launch.parts > 1:
            assert (launch.blocks, launch.group) == (view.maps * launch.parts, launch.threads)
        held = launch.shared_bytes - RESERVED_BYTES
        assert held * (launch.threads // launch.group) ** -1 * launch.parts >= view.count * itemsize * tensors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", NETWORK, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes_of_networks(shape: tuple[int, ...], itemsize: int, device: str) -> None:
    _check(plan(shape, itemsize, DEVICES[device]), shape, itemsize, device)


sizes = st.one_of(st.integers(1, 40), st.sampled_from([49, 127, 128, 196, 1025, 12544]))


@given(st.tuples(sizes, sizes, sizes), st.sampled_from([2, 4]), st.sampled_from(sorted(DEVICES)))
def test_any_shape(shape: tuple[int, ...], itemsize: int, device: str) -> None:
    _check(plan(shape, itemsize, DEVICES[device]), shape, itemsize, device)


small = st.integers(1, 40)


@given(st.tuples(small, st.integers(1, 3), st.integers(1, 300)), st.sampled_from([2, 4]))
def test_no_thread_has_more_tiles_than_there_is_memory_for(shape: tuple[int, ...], itemsize: int) -> None:
    planned = plan(shape, itemsize, H200)
    for tensors, resident in ((1, planned.forward), (2, planned.backward)):
        assert resident is not None
        launch = resident.geometry
        most = max(tiles_of_threads(planned.view, 16 // itemsize, launch))
        assert RESERVED_BYTES + most * launch.threads * 16 * tensors <= launch.shared_bytes


@pytest.mark.parametrize(
    ("shape", "itemsize", "forward", "backward"),
    [
        pytest.param((32, 2048, 7, 7), 4, "resident", "resident", id="small maps"),
        pytest.param((32, 512, 28, 28), 4, "resident", "resident", id="98 KiB a map"),
        pytest.param((32, 256, 56, 56), 4, "cluster2", "cluster8", id="392 KiB a map"),
        pytest.param((32, 64, 112, 112), 4, "cluster8", "ticketed", id="1568 KiB a map"),
        pytest.param((256, 64, 56, 56), 4, "ticketed", "ticketed", id="3 MiB a map"),
        pytest.param((256, 64, 112, 112), 4, "ticketed", "ticketed", id="12 MiB a map"),
        pytest.param((256, 64, 112, 112), 2, "ticketed", "ticketed", id="6 MiB a map"),
        pytest.param((32, 64, 56, 56), 2, "cluster2", "cluster2", id="196 KiB a map, and few of them"),
        pytest.param((256, 1, 224, 224), 4, None, None, id="one large map"),
        pytest.param((1, 8, 7, 7), 4, "resident", "resident", id="nothing to share"),
    ],
)
def test_choices_on_a_device_with_clusters(
    shape: tuple[int, ...], itemsize: int, forward: str | None, backward: str | None
) -> None:
    planned = plan(shape, itemsize, H200)
    assert (planned.forward and planned.forward.kind, planned.backward and planned.backward.kind) == (
        forward,
        backward,
    )


def test_a_device_without_clusters_gets_none() -> None:
    for shape, itemsize in itertools.product(NETWORK, (2, 4)):
        planned = plan(shape, itemsize, A100)
        kinds = {each.kind for each in (planned.forward, planned.backward) if each}
        assert kinds <= {"resident", "ticketed"}


def test_few_maps_are_split_so_that_every_multiprocessor_works() -> None:
    assert plan((256, 3, 224, 224), 4, H200).reduce.blocks >= 132
    assert plan((1, 2, 4_000_000), 4, H200).reduce.blocks >= 132


@pytest.mark.parametrize("tiles", [1, 7, 13, 49, 130, 3136])
@pytest.mark.parametrize("group", [32, 64, 256, 512])
def test_most_threads_of_a_group_have_work_when_there_is_enough(tiles: int, group: int) -> None:
    lanes = lanes_for(tiles, 10_000, group)
    turns = -(-tiles // lanes)
    assert (group // lanes) * tiles / (group * turns) >= 0.75


@pytest.mark.parametrize(
    ("shape", "itemsize"), [((3,), 4), ((0, 3), 4), ((2, 3, 0), 4), ((2, 3, 2**16, 2**16), 4), ((2, 3), 8)]
)
def test_what_cannot_be_computed_is_refused(shape: tuple[int, ...], itemsize: int) -> None:
    with pytest.raises(ValueError, match=r"expected|too large"):
        plan(shape, itemsize, H200)


@pytest.mark.parametrize(
    ("threads", "group", "lanes"), [(100, 50, 10), (64, 0, 1), (1024, 32, 8), (96, 64, 8), (64, 64, 65), (64, 64, 0)]
)
def test_a_launch_that_the_kernels_do_not_admit_is_refused(threads: int, group: int, lanes: int) -> None:
    with pytest.raises(ValueError, match=r"threads in groups|out of range"):
        Geometry(1, threads, 0, 1, 1, group, lanes)


def test_the_numbers_that_python_and_the_kernels_share_are_the_same() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sources())
    found = dict(re.findall(r"constexpr int (\w+) = ([^;]+);", text))
    scratch = MAX_THREADS // 32 * 2
    assert found["MAX_THREADS"] == str(MAX_THREADS)
    assert (found["SCRATCH"], found["RESERVED"]) == ("MAX_THREADS / WARP * 2", "(SCRATCH + 4) * 8 / 16")
    assert found["TICKETED_THREADS"] == str(TICKETED_THREADS)
    assert (scratch + 4) * 8 == RESERVED_BYTES
