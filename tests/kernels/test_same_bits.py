"""What must agree to the last bit: statistics with a step on the host, outputs with a repeated apply."""

from __future__ import annotations

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, step
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm_kernels import entry, plan
from tests.support.kernels.kernel_checks import H200, VERSIONS, batch_of, run_version
from tests.support.kernels.kernel_run import Batch, Buffer, Kernels
from tests.support.oracle import DTYPES

SHAPE = (9, 37, 11, 13)
# The numbers of steps before and the limits that give the batch a weight of 1, 1/3, 0.1, and the same exchanged.
WEIGHTS = {1.0: (0, 1.0, 0.1), 1 / 3: (2, 1.0, 0.1), 0.1: (40, 1.0, 0.1), 0.5: (1, 1.0, 0.0), 0.0: (1, 0.0, 0.0)}


def _state(batch: Batch, steps: int) -> LayerState:
    blank = [np.zeros(batch.view.maps, np.float32) for _ in range(4)]
    mean, var = batch.old_mean.values.copy(), batch.old_var.values.copy()
    return LayerState(blank[0], blank[1], mean, var, blank[2], blank[3], num_of_props=steps)


@pytest.mark.parametrize("averaging", Averaging)
@pytest.mark.parametrize("factor", WEIGHTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_are_those_of_a_step_on_the_host(
    kernels: Kernels, version: str, factor: float, averaging: Averaging
) -> None:
    steps, init_factor, min_factor = WEIGHTS[factor]
    config = LayerConfig(
        LayerKind.BATCH_NORM_2D, SHAPE[1], init_factor=init_factor, min_factor=min_factor, averaging=averaging
    )
    assert config.factor(steps + 1) == factor
    batch = batch_of(SHAPE, "float32", seed=steps + 3)
    batch.weight = factor if averaging is Averaging.STANDARD else 1.0 - factor
    random = np.random.default_rng(steps)
    batch.old_mean.values[:] = random.normal(0, 3, SHAPE[1])
    batch.old_var.values[:] = random.lognormal(0, 3, SHAPE[1])
    run_version(batch, kernels, version)
    stepped = step(_state(batch, steps), config, Moments(batch.view.count, *batch.moments.values))
    assert batch.new_mean.values.tobytes() == stepped.mean.tobytes()
    assert batch.new_var.values.tobytes() == stepped.var.tobytes()


@pytest.mark.parametrize(("weight", "poisoned"), [(0.0, "batch"), (1.0, "old")])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_side_without_weight_is_not_looked_at(kernels: Kernels, version: str, weight: float, poisoned: str) -> None:
    batch = batch_of(SHAPE, "float32")
    batch.weight = weight
    if poisoned == "batch":
        batch.inputs.values[2] = np.inf
    else:
        batch.old_mean.values[:], batch.old_var.values[:] = np.nan, np.inf
    run_version(batch, kernels, version)
    config = LayerConfig(
        LayerKind.BATCH_NORM_2D, SHAPE[1], init_factor=weight, min_factor=weight, nonfinite=NonFinitePolicy.ALLOW
    )
    stepped = step(_state(batch, 3), config, Moments(batch.view.count, *batch.moments.values))
    assert batch.new_mean.values.tobytes() == stepped.mean.tobytes()
    assert batch.new_var.values.tobytes() == stepped.var.tobytes()
    assert np.isfinite(batch.new_mean.values).all()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_forward_can_be_repeated_from_its_moments(kernels: Kernels, version: str, name: str) -> None:
    batch = batch_of(SHAPE, name)
    run_version(batch, kernels, version)
    again = Buffer(SHAPE, batch.x.dtype)
    launch = plan(SHAPE, batch.x.itemsize, H200).apply
    kernels.run(
        entry("normalize", name), launch,
        batch.inputs, batch.moments, float(batch.view.count), batch.scales, batch.biases, batch.epsilon, again,
        *batch.view.arguments, *launch.arguments,
    )  # fmt: skip
    assert again.values.tobytes() == batch.outputs.values.tobytes()
