"""What may be fed to the arithmetic: any strides, byte order and alignment, read-only arrays; and `out`."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from sharednorm.errors import InvalidShape, UnsupportedDType
from tests.support import oracle

EPSILON = 1e-5
SHAPE = (6, 5, 9, 7)
SCALE = np.linspace(0.5, 2, 5).astype(np.float32)
BIAS = np.linspace(-1, 1, 5).astype(np.float32)


@pytest.fixture(params=["numpy", "numba"])
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


def unaligned(x: oracle.Array) -> oracle.Array:
    room = np.empty(x.nbytes + 1, np.uint8)
    result = room[1:].view(x.dtype).reshape(x.shape)
    result[...] = x
    return result


def read_only(x: oracle.Array) -> oracle.Array:
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


def every_second(x: oracle.Array) -> oracle.Array:
    room = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    room[..., ::2] = x
    return room[..., ::2]


LAYOUTS: dict[str, Callable[[oracle.Array], oracle.Array]] = {
    "fortran": np.asfortranarray,
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "negative strides": lambda x: x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "every second": every_second,
    "read-only": read_only,
    "unaligned": unaligned,
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
}


def in_layout(x: oracle.Array, layout: str) -> tuple[oracle.Array, oracle.Array]:
    """Return a tensor in a layout, and the same values as an ordinary array."""
    result = LAYOUTS[layout](x)
    return result, np.array(result, order="C")


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_forward(self, compute: Arithmetic, layout: str, name: str) -> None:
        x, plain = in_layout(oracle.random_tensor(1, SHAPE, name), layout)
        y, batch = compute.forward(x, SCALE, BIAS, EPSILON)
        wanted, moments = compute.forward(plain, SCALE, BIAS, EPSILON)
        np.testing.assert_array_equal(y, wanted)
        np.testing.assert_array_equal(batch.m2, moments.m2)
        assert y.flags.c_contiguous
        assert y.flags.writeable
        np.testing.assert_allclose(batch.mean, oracle.batch_moments(plain)[1], rtol=1e-9)

    def test_backward(self, compute: Arithmetic, layout: str, name: str) -> None:
        x, plain_x = in_layout(oracle.random_tensor(1, SHAPE, name), layout)
        grad, plain_grad = in_layout(oracle.random_tensor(2, SHAPE, name), layout)
        batch = compute.moments(plain_x)
        for found, wanted in zip(
            compute.backward(x, grad, batch, SCALE, EPSILON),
            compute.backward(plain_x, plain_grad, batch, SCALE, EPSILON),
            strict=True,
        ):
            assert found is not None
            np.testing.assert_array_equal(found, wanted)

    def test_input_is_left_alone(self, compute: Arithmetic, layout: str, name: str) -> None:
        x, plain = in_layout(oracle.random_tensor(1, SHAPE, name), layout)
        y, batch = compute.forward(x, SCALE, BIAS, EPSILON)
        compute.backward(x, y, batch, SCALE, EPSILON)
        np.testing.assert_array_equal(x, plain)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_big_endian(compute: Arithmetic, name: str) -> None:
    x = oracle.random_tensor(1, SHAPE, name)
    swapped = x.astype(x.dtype.newbyteorder(">"))
    y, batch = compute.forward(swapped, SCALE, BIAS, EPSILON)
    wanted, _ = compute.forward(x, SCALE, BIAS, EPSILON)
    assert y.dtype == x.dtype
    assert y.dtype.isnative
    np.testing.assert_array_equal(y, wanted)
    dx, *_ = compute.backward(swapped, swapped, batch, SCALE, EPSILON)
    assert dx is not None
    assert dx.dtype.isnative
    np.testing.assert_array_equal(dx, compute.backward(x, x, batch, SCALE, EPSILON)[0])


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint16, np.int16, np.complex64, np.bool_])
def test_another_type_is_refused(compute: Arithmetic, dtype: type[np.generic]) -> None:
    with pytest.raises(UnsupportedDType):
        compute.moments(np.ones(SHAPE, dtype))


class TestOut:
    """`normalize(..., out=)`."""

    # S of 1, small, and large; the last is also large enough to be written past the caches.
    SHAPES = ((6, 5), (6, 5, 9, 7), (3, 5, 40, 31), (2, 5, 1024, 1024))

    def normalize(self, compute: Arithmetic, x: oracle.Array, out: oracle.Array | None) -> oracle.Array:
        mean, var = np.linspace(-1, 3, 5), np.linspace(0.5, 9, 5)
        return compute.normalize(x, mean, var, SCALE, BIAS, EPSILON, out=out)

    @pytest.mark.parametrize("name", oracle.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_in_place(self, compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
        x = oracle.random_tensor(1, shape, name)
        wanted = self.normalize(compute, x.copy(), None)
        assert self.normalize(compute, x, x) is x
        np.testing.assert_array_equal(x, wanted)

    @pytest.mark.parametrize("layout", ["fortran", "channels last", "negative strides", "every second", "unaligned"])
    def test_into_any_layout(self, compute: Arithmetic, layout: str) -> None:
        x = oracle.random_tensor(1, SHAPE)
        wanted = self.normalize(compute, x, None)
        out, _ = in_layout(np.zeros_like(x), layout)
        assert self.normalize(compute, x, out) is out
        np.testing.assert_array_equal(out, wanted)

    @pytest.mark.parametrize("layout", ["fortran", "channels last", "negative strides", "every second", "unaligned"])
    def test_in_place_in_any_layout(self, compute: Arithmetic, layout: str) -> None:
        x, plain = in_layout(oracle.random_tensor(1, SHAPE), layout)
        wanted = self.normalize(compute, plain, None)
        self.normalize(compute, x, x)
        np.testing.assert_array_equal(x, wanted)

    @pytest.mark.parametrize("shift", [1, 3, 16, 17])
    @pytest.mark.parametrize("ahead", [True, False])
    def test_overlap(self, compute: Arithmetic, shift: int, ahead: bool) -> None:
        plain = oracle.random_tensor(1, SHAPE)
        room = np.zeros(plain.size + shift, np.float32)
        low, high = room[: plain.size].reshape(SHAPE), room[shift:].reshape(SHAPE)
        x, out = (low, high) if ahead else (high, low)
        x[...] = plain
        self.normalize(compute, x, out)
        np.testing.assert_array_equal(out, self.normalize(compute, plain, None))

    def test_big_endian(self, compute: Arithmetic) -> None:
        x = oracle.random_tensor(1, SHAPE)
        out = np.zeros(SHAPE, ">f4")
        self.normalize(compute, x, out)
        np.testing.assert_array_equal(out, self.normalize(compute, x, None))

    def test_nothing_beside_it_is_written(self, compute: Arithmetic) -> None:
        for shape in self.SHAPES:
            x = oracle.random_tensor(1, shape)
            room = np.full(x.size + 64, 7, np.float32)
            out = room[31:-33].reshape(shape)
            self.normalize(compute, x, out)
            np.testing.assert_array_equal(out, self.normalize(compute, x, None))
            assert (room[:31] == 7).all()
            assert (room[-33:] == 7).all()

    def test_misfits_are_refused(self, compute: Arithmetic) -> None:
        x = oracle.random_tensor(1, SHAPE)
        with pytest.raises(InvalidShape, match=r"out has shape"):
            self.normalize(compute, x, np.empty((6, 5, 7, 9), np.float32))
        with pytest.raises(UnsupportedDType, match="out has dtype float16"):
            self.normalize(compute, x, np.empty(SHAPE, np.float16))
        with pytest.raises(InvalidShape, match="read-only"):
            self.normalize(compute, x, read_only(x))


def test_a_large_output_in_half_types(compute: Arithmetic) -> None:
    # 40 MB: written past the caches by the compiled kernels.
    x = oracle.random_tensor(1, (2, 5, 1000, 2001), "bfloat16")
    y, batch = compute.forward(x, SCALE, BIAS, EPSILON)
    part = (slice(None), slice(2, 4), slice(0, 1000, 333))
    wanted = oracle.normalized(x[part], batch.mean[2:4], batch.biased_var[2:4], SCALE[2:4], BIAS[2:4], EPSILON)
    np.testing.assert_allclose(y[part].astype(np.float64), wanted, rtol=4e-3, atol=1e-30)


def test_no_wide_copy_of_the_tensor(compute: Arithmetic) -> None:
    x = oracle.random_tensor(1, (8, 4, 512, 512))
    compute.forward(x[:1, :, :2], SCALE[:4], BIAS[:4], EPSILON)
    tracemalloc.start()
    try:
        compute.backward(x, x, compute.moments(x), SCALE[:4], EPSILON, input_grad=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 8
