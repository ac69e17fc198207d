"""The benchmark on a GPU: what it launches is right, and what it makes of its figures."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.kernels import cuda

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (2, 2, 64, 64)])
def test_our_passes(shape: tuple[int, ...], name: str) -> None:
    cuda.prepare()
    from pycuda import driver

    from benchmarks.gpu.kernels import DTYPES, make_sets
    from benchmarks.gpu.passes import Launches, Layer, our_calls, verify
    from sharednorm_kernels import fatbin, plan
    from sharednorm_server.device.cuda.context import limits_of
    from sharednorm_server.device.cuda.module import Kernels

    driver.init()
    device = driver.Device(0)
    context = device.retain_primary_context()
    context.push()
    try:
        # The emulated driver's kernels reach the host's memory, so that torch's tensors on the CPU do for it.
        where = "cuda" if cuda.REAL else "cpu"
        limits = limits_of(device)
        sets, layer = make_sets(shape, DTYPES[name], 0, where), Layer.create(shape[1], where)
        launches = Launches(Kernels(fatbin(), limits.shared_bytes), where)
        calls = our_calls(launches, sets, layer, name, plan(shape, sets[0].x.element_size(), limits))

        def waiting(call: Any) -> Any:
            def run(number: int) -> None:
                call(number)
                context.synchronize()

            return run

        errors = verify({each: waiting(call) for each, call in calls.items()}, sets[0], layer)
        assert set(errors) == {"train", "eval", "backward"}
        del launches, calls
    finally:
        context.pop()
        context.detach()


def test_a_wrong_output_is_found() -> None:
    cuda.prepare()
    from benchmarks.gpu.kernels import make_sets
    from benchmarks.gpu.passes import Layer, expected, verify

    (one, *_), layer = make_sets((4, 3, 5, 7), torch.float32, 0, "cpu"), Layer.create(3, "cpu")
    right = expected(one, layer)

    def write(name: str, *, wrong: bool) -> Any:
        def call(_: int) -> None:
            output = one.dx if name == "backward" else one.y
            output.copy_(right[name].float())
            if wrong:
                output[0, 0, 0, 0] += 1e-3

        return call

    verify({name: write(name, wrong=False) for name in right}, one, layer)
    for bad in right:
        with pytest.raises(AssertionError, match=f"{bad} is wrong"):
            verify({name: write(name, wrong=name == bad) for name in right}, one, layer)
    with pytest.raises(AssertionError, match="train is wrong: nan"):
        verify({name: lambda _: None for name in right}, one, layer)


def test_torchs_passes_are_what_ours_are_compared_with() -> None:
    cuda.prepare()
    from benchmarks.gpu.kernels import make_sets
    from benchmarks.gpu.passes import Layer, torch_calls

    sets, layer = make_sets((4, 3, 5, 7), torch.float32, 0, "cpu"), Layer.create(3, "cpu")
    for call in torch_calls(sets, layer, cudnn=False).values():
        for number in range(len(sets)):
            call(number)


def test_what_is_made_of_the_figures() -> None:
    cuda.prepare()
    from benchmarks.gpu.kernels import line, percentiles, summary

    assert percentiles([3e-6, 1e-6, 2e-6]) == {"p10": 1.0, "p50": 2.0, "p90": 3.0}
    us = {side: {"p50": value} for side, value in (("ours", 10.0), ("torch, cuDNN", 30.0), ("torch, native", 20.0))}
    one = {"us": us, "percent of copy": 70.0, "faster torch / ours": 2.0}
    row: dict[str, Any] = {"shape": (32, 64, 112, 112), "dtype": "float32", "bytes": 102_760_448}
    row["passes"] = {"train": one, "eval": {**one, "percent of copy": 85.0}, "backward": one}
    assert list(summary([row]).values()) == [2.0, 2.0, 70.0]
    assert "10.0    30.0    20.0  2.00    70%" in line(row)
