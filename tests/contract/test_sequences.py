"""Random sequences of calls, each compared with a plain float64 model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sharednorm import BackwardInEval, BackwardWithoutForward, Layer, NonFiniteInput, TooFewValues
from tests.support.making import MakeLayer
from tests.support.oracle import KINDS, SPATIAL, Model, random_tensor
from tests.support.unchanged import unchanged

MAPS = 3
FACTORS = st.sampled_from([0.0, 0.1, 0.5, 1.0])
MULTIPLIERS = st.sampled_from([-1.0, 0.0, 0.25, 1.0])
SEEDS = st.integers(0, 10**6)


class Sequence(RuleBasedStateMachine):
    """One layer, the model of it, and whatever may be done to them."""

    make: MakeLayer

    @initialize(
        kind=st.sampled_from(KINDS),
        init_factor=FACTORS,
        min_factor=FACTORS,
        averaging=st.sampled_from(["standard", "printed"]),
        affine=st.booleans(),
    )
    def begin(self, kind: str, init_factor: float, min_factor: float, averaging: str, affine: bool) -> None:
        self.kind = kind
        self.layer: Layer = self.make(
            kind, MAPS, initFactor=init_factor, minFactor=min_factor, averaging=averaging, affine=affine, sscale=0.0
        )
        self.model = Model(MAPS, init_factor=init_factor, min_factor=min_factor, averaging=averaging, affine=affine)
        self.train = True
        self.version = 0
        self.file: bytes | None = None

    def tensor(self, seed: int, batch: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random_tensor(seed, (batch, MAPS, *SPATIAL[self.kind]))

    @rule(seed=SEEDS, batch=st.integers(2, 5))
    def forward(self, seed: int, batch: int) -> None:
        x = self.tensor(seed, batch)
        expected = self.model.train(x) if self.train else self.model.evaluate(x)
        self.version += self.train
        # The running variance is a float32: its rounding is the model's error here.
        tolerance = 2e-6 if self.train else 2e-5
        np.testing.assert_allclose(self.layer(x), expected, rtol=tolerance, atol=tolerance)

    @rule(seed=SEEDS, scale=MULTIPLIERS, momentum=MULTIPLIERS, accumulate=st.booleans(), wanted=st.booleans())
    def backward(self, seed: int, scale: float, momentum: float, accumulate: bool, wanted: bool) -> None:
        if self.model.saved is None:
            refused = BackwardWithoutForward if self.train and self.layer.data is None else BackwardInEval
            with pytest.raises(refused), unchanged(self.layer):
                self.layer.backward(self.tensor(seed, 2))
            return
        grad = self.tensor(seed, len(self.model.saved[0]))
        self.layer.backward(grad, accumulate, wanted, scale, momentum)
        expected = self.model.backward(grad, scale=scale, momentum=momentum, accumulate=accumulate)
        if wanted:
            assert self.layer.grad is not None
            np.testing.assert_allclose(self.layer.grad, expected, rtol=1e-5, atol=1e-5)
        else:
            assert self.layer.grad is None

    @rule(train=st.booleans())
    def choose(self, train: bool) -> None:
        if train:
            self.layer.trainMode()
        else:
            self.layer.evalMode()
        self.train, self.model.saved = train, None

    @rule()
    def reset(self) -> None:
        self.layer.reset()
        self.model.saved = None

    @rule(rate=st.sampled_from([-1e-3, 0.0, 1e-3]))
    def update_params(self, rate: float) -> None:
        self.layer.updateParams(rate)
        self.model.update_params(rate)

    @rule()
    def zero_gradients(self) -> None:
        self.layer.zeroGradParams()
        self.model.scale_grad, self.model.bias_grad = np.zeros(MAPS), np.zeros(MAPS)

    @rule(values=st.lists(st.integers(1, 5), min_size=MAPS, max_size=MAPS), steps=st.integers(0, 12))
    def assign(self, values: list[int], steps: int) -> None:
        self.layer.mean, self.layer.var = values, values
        self.layer.numOfProps = steps
        self.model.mean, self.model.var = np.array(values, np.float64), np.array(values, np.float64)
        self.model.steps = steps

    @rule()
    def save(self) -> None:
        self.file = self.layer.save(None)
        self.kept = (self.model.scale, self.model.bias, self.model.mean, self.model.var, self.model.steps)

    @precondition(lambda self: self.file is not None)
    @rule()
    def load(self) -> None:
        assert self.file is not None
        self.layer.load(self.file)
        self.model.scale, self.model.bias, self.model.mean, self.model.var, self.model.steps = self.kept

    @rule(seed=SEEDS, bad=st.sampled_from([np.nan, np.inf]))
    def poison(self, seed: int, bad: float) -> None:
        x = self.tensor(seed, 2)
        x.flat[seed % x.size] = bad
        if self.train:
            with pytest.raises(NonFiniteInput), unchanged(self.layer):
                self.layer(x)

    @precondition(lambda self: self.kind == "BatchNorm")
    @rule(seed=SEEDS)
    def one_value(self, seed: int) -> None:
        if self.train:
            with pytest.raises(TooFewValues), unchanged(self.layer):
                self.layer(self.tensor(seed, 1))

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "layer"):
            return
        state = self.layer.snapshot()
        assert (state.num_of_props, state.version, self.layer.train) == (self.model.steps, self.version, self.train)
        for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad"):
            wanted = getattr(self.model, name)
            np.testing.assert_allclose(getattr(state, name), wanted, rtol=1e-5, atol=1e-4, err_msg=name)


def test_random_sequences_of_calls(make_layer: MakeLayer) -> None:
    machine = type("SequenceHere", (Sequence,), {"make": staticmethod(make_layer)})
    few = settings(max_examples=25, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(machine, settings=few)
