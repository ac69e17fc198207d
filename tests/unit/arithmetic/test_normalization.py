"""Both implementations of the arithmetic against float64: moments, forward, normalize, backward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.formulas import Affine, affine
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.state import Moments
from sharednorm.core.types import Wide
from sharednorm.errors import InvalidConfiguration
from tests.support import oracle

EPSILON = 1e-5
SHAPES = [
    (1, 2, 1),
    (2, 1),
    (7, 31),
    (127, 2),
    (1025, 7),
    (3, 1025),
    (2, 127, 2),
    (31, 2, 1),
    (5, 3, 10, 10),
    (2, 31, 7, 7),
    (33, 17, 1, 31),
    (1, 1, 127, 31),
    (2, 7, 31, 33),
    (1, 2, 1025, 127),
    (4, 1, 2, 3, 5),
]


@pytest.fixture(params=["numpy", "numba"])
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


def parameters(maps: int, seed: int = 1) -> tuple[oracle.Array, oracle.Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(1, 0.3, maps).astype(np.float32), rng.normal(0, 1, maps).astype(np.float32)


def assert_moments(found: Moments, x: oracle.Array, tolerance: float = 1e-10) -> None:
    count, mean, m2 = oracle.batch_moments(x)
    deviation = np.sqrt(m2 / count)
    assert found.count == count
    assert found.mean.dtype == found.m2.dtype == np.float64
    assert (found.m2 >= 0).all()
    np.testing.assert_array_less(np.abs(found.mean - mean), 1e-9 * deviation + 4e-16 * np.abs(mean) + 1e-300)
    np.testing.assert_allclose(found.m2, m2, rtol=tolerance, atol=0)


def assert_output(found: oracle.Array, wanted: Wide, name: str) -> None:
    # 2e-6, and for values beyond 8 two units of float32's last place; half types: half a unit of theirs more.
    allowed = np.maximum(2e-6, np.abs(wanted) * 2.4e-7)
    if name != "float32":
        allowed += unit(wanted, name) / 2
    assert np.all(np.abs(found.astype(np.float64) - wanted) <= allowed)


def assert_gradient(
    found: oracle.Array, wanted: Wide, x: oracle.Array, grad: oracle.Array, scale: oracle.Array, name: str
) -> None:
    # A few roundings of the terms of grad - mean(grad) - xhat * mean(grad * xhat), which may cancel.
    count, mean, m2 = oracle.batch_moments(x)
    inverse = 1 / np.sqrt(m2 / count + EPSILON)
    xhat = (x.astype(np.float64) - oracle.per_channel(mean, x.ndim)) * oracle.per_channel(inverse, x.ndim)
    largest = np.abs(grad.astype(np.float64)).max()
    allowed = 6e-7 * np.abs(oracle.per_channel(scale * inverse, x.ndim)) * largest * (2 + np.abs(xhat))
    if name != "float32":
        allowed += unit(wanted, name) / 2
    assert np.all(np.abs(found.astype(np.float64) - wanted) <= allowed)


def unit(values: Wide, name: str) -> Wide:
    """The distance from a value to the next one of a half type."""
    bits, lowest = (10, -14) if name == "float16" else (7, -126)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**lowest)))
    return np.asarray(2.0 ** (exponent - bits))


class TestOddSizes:
    @pytest.mark.parametrize("name", oracle.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward(self, compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
        x, (scale, bias) = oracle.random_tensor(3, shape, name), parameters(shape[1])
        y, batch = compute.forward(x, scale, bias, EPSILON)
        assert y.shape == shape
        assert y.dtype == x.dtype
        assert y.flags.c_contiguous
        assert y.flags.writeable
        assert_moments(batch, x)
        assert_output(y, oracle.normalized(x, batch.mean, batch.biased_var, scale, bias, EPSILON), name)

    @pytest.mark.parametrize("name", oracle.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward_is_moments_and_normalize(self, compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
        x, (scale, bias) = oracle.random_tensor(4, shape, name), parameters(shape[1])
        y, batch = compute.forward(x, scale, bias, EPSILON)
        alone = compute.moments(x)
        np.testing.assert_array_equal(alone.mean, batch.mean)
        np.testing.assert_array_equal(alone.m2, batch.m2)
        again = compute.normalize(x, batch.mean, batch.biased_var, scale, bias, EPSILON)
        np.testing.assert_array_equal(bits(again), bits(y))

    @pytest.mark.parametrize("name", oracle.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_backward(self, compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
        x, grad = oracle.random_tensor(5, shape, name), oracle.random_tensor(6, shape, name)
        scale, _ = parameters(shape[1])
        dx, scale_grad, bias_grad = compute.backward(x, grad, compute.moments(x), scale, EPSILON)
        wanted = oracle.gradients(x, grad, scale.astype(np.float64), EPSILON)
        assert dx is not None
        assert dx.dtype == x.dtype
        assert dx.shape == shape
        assert_gradient(dx, wanted[0], x, grad, scale, name)
        for found, right in zip((scale_grad, bias_grad), wanted[1:], strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-9 * x.size)

    def test_backward_without_the_gradient_of_the_input(self, compute: Arithmetic) -> None:
        x, grad = oracle.random_tensor(7, (5, 3, 10, 10)), oracle.random_tensor(8, (5, 3, 10, 10))
        scale, batch = np.ones(3, np.float32), compute.moments(x)
        _, *whole = compute.backward(x, grad, batch, scale, EPSILON)
        nothing, *alone = compute.backward(x, grad, batch, scale, EPSILON, input_grad=False)
        assert nothing is None
        np.testing.assert_array_equal(alone, whole)


class TestHardData:
    """Data on which float32 sums, or squares less squared means, go wrong."""

    SIZES = ((33, 3, 57), (4, 3, 127, 31), (300, 5))

    @pytest.mark.parametrize("shape", SIZES, ids=str)
    @pytest.mark.parametrize(
        ("mean", "deviation"),
        [(1e4, 1e-2), (0.0, 1.0), (1e30, 1e29), (-3e20, 1e10), (1e-30, 1e-32), (65504.0, 0.5), (1e-42, 1e-43)],
    )
    def test_normal(self, compute: Arithmetic, shape: tuple[int, ...], mean: float, deviation: float) -> None:
        x = np.random.default_rng(9).normal(mean, deviation, shape).astype(np.float32)
        self.check(compute, x)

    @pytest.mark.parametrize("shape", SIZES, ids=str)
    def test_one_value_far_from_the_others(self, compute: Arithmetic, shape: tuple[int, ...]) -> None:
        x = np.random.default_rng(10).normal(0, 1, shape).astype(np.float32)
        x[0, :, ...].reshape(shape[1], -1)[:, 0] = 1e4
        self.check(compute, x)

    @pytest.mark.parametrize("shape", SIZES, ids=str)
    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e4 / 3, 3e38, 1e-45])
    def test_constant(self, compute: Arithmetic, shape: tuple[int, ...], value: float) -> None:
        x = np.full(shape, value, np.float32)
        scale, bias = parameters(shape[1])
        y, batch = compute.forward(x, scale, bias, EPSILON)
        np.testing.assert_array_equal(batch.mean, np.full(shape[1], float(np.float32(value))))
        np.testing.assert_array_equal(batch.m2, np.zeros(shape[1]))
        np.testing.assert_array_equal(y, np.broadcast_to(bias.reshape(1, -1, *[1] * (x.ndim - 2)), shape))

    @pytest.mark.parametrize("shape", SIZES, ids=str)
    def test_largest_and_smallest_float32(self, compute: Arithmetic, shape: tuple[int, ...]) -> None:
        largest = np.finfo(np.float32).max
        x = np.random.default_rng(11).choice(np.array([-largest, largest], np.float32), shape)
        assert_moments(compute.moments(x), x)

    def test_a_tiny_epsilon_and_no_variance_give_the_bias(self, compute: Arithmetic) -> None:
        x, (scale, bias) = np.full((4, 3, 5), 7, np.float32), parameters(3)
        y, _ = compute.forward(x, scale, bias, 1e-300)
        np.testing.assert_array_equal(y, np.broadcast_to(bias.reshape(1, 3, 1), x.shape))

    def check(self, compute: Arithmetic, x: oracle.Array) -> None:
        scale, bias = parameters(x.shape[1])
        y, batch = compute.forward(x, scale, bias, EPSILON)
        assert_moments(batch, x, tolerance=1e-9)
        _, mean, m2 = oracle.batch_moments(x)
        wanted = oracle.normalized(x, mean, m2 / batch.count, scale, bias, EPSILON)
        assert_output(y, wanted, "float32")


class TestNonFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 5, -1])
    @pytest.mark.parametrize("shape", [(1, 4, 1), (2, 4), (9, 4, 5), (3, 4, 31, 41), (70, 40)], ids=str)
    def test_shows_in_its_channel_alone(
        self, compute: Arithmetic, shape: tuple[int, ...], place: int, value: float
    ) -> None:
        x = oracle.random_tensor(12, shape)
        channel = np.moveaxis(x, 1, 0)[2]
        channel.flat[min(place, channel.size - 1)] = value
        batch = compute.forward(x, np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32), EPSILON)[1]
        for found in (batch, compute.moments(x)):
            good = np.isfinite(found.mean) & np.isfinite(found.m2)
            np.testing.assert_array_equal(good, np.arange(shape[1]) != 2)

    def test_both_infinities(self, compute: Arithmetic) -> None:
        x = oracle.random_tensor(13, (4, 2, 3))
        x[0, 1, 0], x[3, 1, 2] = np.inf, -np.inf
        batch = compute.moments(x)
        assert np.isfinite(batch.mean[0])
        assert not np.isfinite(batch.mean[1])

    def test_backward_stays_in_its_channel(self, compute: Arithmetic) -> None:
        x, grad = oracle.random_tensor(14, (5, 3, 50)), oracle.random_tensor(15, (5, 3, 50))
        grad[1, 1, 7] = np.nan
        dx, scale_grad, bias_grad = compute.backward(x, grad, compute.moments(x), np.ones(3, np.float32), EPSILON)
        assert dx is not None
        for channel, good in enumerate((True, False, True)):
            assert np.isfinite(dx[:, channel]).all() == good
            assert np.isfinite(scale_grad[channel]) == good
            assert np.isfinite(bias_grad[channel]) == good


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 90)),
    name=st.sampled_from(oracle.DTYPES),
    centre=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 1 << 30),
)
@example(shape=(40, 1, 1), name="float32", centre=-300.0, seed=0)
def test_both_agree_on_random_shapes(shape: tuple[int, ...], name: str, centre: float, seed: int) -> None:
    x = (oracle.random_tensor(seed, shape) + np.float32(centre)).astype(oracle.dtype(name))
    grad = oracle.random_tensor(seed + 1, shape, name)
    scale, bias = parameters(shape[1])
    results = []
    for each in (arithmetic("numpy"), arithmetic("numba")):
        y, batch = each.forward(x, scale, bias, EPSILON)
        assert_moments(batch, x)
        wanted = oracle.normalized(x, batch.mean, batch.biased_var, scale, bias, EPSILON)
        assert_output(y, wanted, name)
        results.append(each.backward(x, grad, batch, scale, EPSILON))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        spread = float(np.abs(other.astype(np.float64)).max()) + 1e-3
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), rtol=2 * oracle.rounding(name), atol=1e-5 * spread
        )


class TestNormalizeByOtherStatistics:
    @pytest.mark.parametrize("name", oracle.DTYPES)
    @pytest.mark.parametrize("shape", [(1, 3), (2, 3, 1), (1, 3, 7), (5, 3, 10, 10), (2, 3, 200, 201)], ids=str)
    def test_values(self, compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
        x, (scale, bias) = oracle.random_tensor(16, shape, name), parameters(3)
        mean, var = np.array([0.5, -2, 1e-3]), np.array([2.0, 1e-6, 0])
        y = compute.normalize(x, mean, var, scale, bias, 1e-3)
        assert_output(y, oracle.normalized(x, mean, var, scale, bias, 1e-3), name)

    def test_statistics_may_be_read_only_float32(self, compute: Arithmetic) -> None:
        x = oracle.random_tensor(17, (4, 2, 3))
        mean, one = np.zeros(2, np.float32), np.ones(2, np.float32)
        mean.setflags(write=False)
        one.setflags(write=False)
        y = compute.normalize(x, mean, one, one, mean, 1e-12)  # type: ignore[arg-type]
        np.testing.assert_allclose(y, x, rtol=1e-6)


def test_the_mean_is_a_pair() -> None:
    mean, one = np.array([1e4 + 1e-4]), np.ones(1, np.float32)
    by: Affine = affine(mean, np.array([1e-4]), one, 0 * one, 0.0)
    recovered = float(by.hi[0]) - float(by.offset[0]) / float(by.factor[0])
    assert recovered == pytest.approx(1e4 + 1e-4, abs=1e-10)


class TestChoice:
    def test_by_name(self) -> None:
        assert arithmetic("numpy").name == "numpy"
        assert arithmetic("numba").name == "numba"

    def test_numba_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SHAREDNORM_ARITHMETIC", raising=False)
        assert arithmetic().name == "numba"

    def test_by_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHAREDNORM_ARITHMETIC", "numpy")
        assert arithmetic().name == "numpy"
        assert arithmetic("numba").name == "numba"

    def test_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InvalidConfiguration, match=r"'fortran' .expected: 'numpy' or 'numba'"):
            arithmetic("fortran")
        monkeypatch.setenv("SHAREDNORM_ARITHMETIC", "abacus")
        with pytest.raises(InvalidConfiguration, match="abacus"):
            arithmetic()


def bits(values: oracle.Array) -> oracle.Array:
    return values.view(np.dtype(f"u{values.itemsize}"))
