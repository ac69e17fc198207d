"""Many threads on the service: every step counts once, in one order, with the parameters of its moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.state import StateUpdate
from sharednorm.errors import InputEvicted, LayerNotFound, NonFiniteInput
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.requests import BackwardCall, ForwardAnswer, ForwardCall, LayerKey
from sharednorm_server.layers.service import LayerService
from tests.support import oracle
from tests.support.service import CONFIG, KEY, MAPS, SHAPE, InterruptedDevice, SlowStore, close, create, new_service

TRAIN = ForwardCall(KEY, train=True)
THREADS = 8


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Run work(0) to work(7), all beginning together, and return what they return."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Any:
        barrier.wait(10)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(60) for future in [pool.submit(run, number) for number in range(THREADS)]]


def replayed(answers: list[ForwardAnswer]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the running mean and variance that follow from the batches' moments, in the order of the versions."""
    mean, var = np.zeros(MAPS, np.float32), np.ones(MAPS, np.float32)
    for number, answer in enumerate(sorted(answers, key=lambda each: each.version), start=1):
        assert answer.moments is not None
        factor = min(1.0, max(1.0 / number, 0.1))
        batch_var = answer.moments.m2 / (answer.moments.count - 1)
        mean = ((1 - factor) * mean.astype(float) + factor * answer.moments.mean).astype(np.float32)
        var = ((1 - factor) * var.astype(float) + factor * batch_var).astype(np.float32)
    return mean, var


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_no_step_is_lost_and_the_average_replays_bit_for_bit(name: str) -> None:
    service = new_service(CpuDevice(arithmetic(name)), store=SlowStore())
    create(service)

    def steps(number: int) -> list[ForwardAnswer]:
        shape = (2 + number, MAPS, 5, 2)  # unequal batches
        return [service.forward(TRAIN, oracle.random_tensor(100 * number + step, shape)) for step in range(50)]

    answers = [answer for each in at_once(steps) for answer in each]
    state = service.get_layer(KEY).state
    assert (state.version, state.num_of_props) == (400, 400)
    assert sorted(answer.version for answer in answers) == list(range(1, 401))
    mean, var = replayed(answers)
    np.testing.assert_array_equal(state.mean, mean)
    np.testing.assert_array_equal(state.var, var)


def test_every_output_has_the_parameters_of_its_moment_while_others_change_them() -> None:
    service = new_service(CpuDevice(arithmetic("numpy")))
    ones = np.ones(MAPS, np.float32)
    create(service, scale=ones * 1000, bias=ones * -1000)

    def work(number: int) -> list[tuple[Any, ForwardAnswer]]:
        done = []
        for step in range(40):
            if number < 3:
                # Scale and bias change together, so that one that is mixed with the other shows.
                value = float(number * 100 + step)
                service.set_state(KEY, StateUpdate(scale=ones * value, bias=ones * -value))
            else:
                x = oracle.random_tensor(100 * number + step, SHAPE)
                done.append((x, service.forward(TRAIN, x)))
        return done

    done = [each for part in at_once(work) for each in part]
    assert service.get_layer(KEY).state.version == len(done) == 200
    for x, answer in done:
        assert answer.scale is not None
        count, mean, m2 = oracle.batch_moments(x)
        value = float(answer.scale[0])
        np.testing.assert_array_equal(answer.scale, ones * value)
        expected = oracle.normalized(x, mean, m2 / count, np.full(MAPS, value), np.full(MAPS, -value), 1e-5)
        np.testing.assert_allclose(answer.output.array(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("new", "scale", "bias"),
    [
        (StateUpdate(scale=[2, 3, 4], bias=[5, 6, 7]), [2.0, 3, 4], [5.0, 6, 7]),
        (StateUpdate(scale=[2, 3, 4]), [2.0, 3, 4], [0.0, 0, 0]),
        (StateUpdate(bias=[5, 6, 7]), [1.0, 1, 1], [5.0, 6, 7]),
    ],
    ids=["both", "scale", "bias"],
)
def test_a_step_computes_with_the_parameters_that_it_finds_at_its_commit(
    new: StateUpdate, scale: list[float], bias: list[float]
) -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    device.interrupt = lambda made: service.set_state(KEY, new) if made == 1 else None
    x = oracle.random_tensor(1, SHAPE)
    answer = service.forward(TRAIN, x)
    count, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / count, np.array(scale), np.array(bias), 1e-5)
    np.testing.assert_allclose(answer.output.array(), expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(answer.scale, scale)
    assert (device.forwards, device.renormalized) == (1, 1)  # moments do not depend on parameters


def test_a_step_of_somebody_else_costs_no_second_computation() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    device.interrupt = lambda made: service.forward(TRAIN, oracle.random_tensor(9, SHAPE)) if made == 1 else None
    assert service.forward(TRAIN, oracle.random_tensor(1, SHAPE)).version == 2
    assert (device.forwards, device.renormalized) == (2, 0)


def test_a_stream_of_updates_cannot_keep_a_step_from_happening() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    changed: list[float] = []

    def change(made: int) -> None:
        # In a thread of its own: the last computation holds the layer, and the update has to wait for it.
        updater = threading.Thread(target=service.set_state, args=(KEY, StateUpdate(scale=[made + 1.0] * MAPS)))
        updater.start()
        updater.join(0.5)
        if not updater.is_alive():
            changed.append(made + 1.0)
        updaters.append(updater)

    updaters: list[threading.Thread] = []
    device.interrupt = change
    answer = service.forward(TRAIN, oracle.random_tensor(1, SHAPE))
    for updater in updaters:
        updater.join(10)
        assert not updater.is_alive()
    assert answer.version == 1
    assert len(changed) == 4
    np.testing.assert_array_equal(answer.scale, [changed[-1]] * MAPS)
    np.testing.assert_array_equal(service.get_layer(KEY).state.scale, [len(updaters) + 1.0] * MAPS)


def test_a_layer_deleted_in_the_middle_of_a_step_is_not_found() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    device.interrupt = lambda _: service.delete_layer(KEY)
    with pytest.raises(LayerNotFound):
        service.forward(replace(TRAIN, keep_input=True), oracle.random_tensor(1, SHAPE))


def test_a_layer_made_again_in_the_middle_of_a_step_gets_nothing_of_it() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)

    def make_again(_: int) -> None:
        service.delete_layer(KEY)
        create(service)

    device.interrupt = make_again
    with pytest.raises(LayerNotFound):
        service.forward(replace(TRAIN, keep_input=True), oracle.random_tensor(1, SHAPE))
    assert service.get_layer(KEY).state.version == 0


def test_a_refused_step_among_others_leaves_no_trace() -> None:
    service = new_service()
    create(service)
    poisoned = oracle.random_tensor(1, SHAPE)
    poisoned[0, 0, 0, 0] = np.nan

    def steps(number: int) -> list[ForwardAnswer]:
        answers = []
        for step in range(20):
            if number % 2:
                with pytest.raises(NonFiniteInput):
                    service.forward(TRAIN, poisoned)
            else:
                answers.append(service.forward(TRAIN, oracle.random_tensor(100 * number + step, SHAPE)))
        return answers

    answers = [answer for each in at_once(steps) for answer in each]
    state = service.get_layer(KEY).state
    assert state.version == len(answers) == 80
    mean, var = replayed(answers)
    np.testing.assert_array_equal(state.mean, mean)
    np.testing.assert_array_equal(state.var, var)


def test_no_gradient_is_lost() -> None:
    service = new_service(store=SlowStore())
    create(service)
    x, ones = oracle.random_tensor(1, SHAPE), np.ones(SHAPE, np.float32)
    token = service.forward(replace(TRAIN, keep_input=True), x).saved_input

    def work(_: int) -> None:
        for _ in range(50):
            service.backward(BackwardCall(KEY, saved_input=token, momentum=1.0), ones)

    at_once(work)
    # The gradient of the bias is the sum of the gradient: 40 values a map, and small enough to add up exactly.
    np.testing.assert_array_equal(service.get_layer(KEY).state.bias_grad, [40 * 50 * THREADS] * MAPS)


def test_inputs_that_are_evicted_all_the_time_are_either_right_or_evicted() -> None:
    x = oracle.random_tensor(1, SHAPE)
    service = new_service(activation_cache_bytes=3 * x.nbytes)
    create(service)

    def work(number: int) -> int:
        evicted = 0
        for step in range(30):
            mine, grad = oracle.random_tensor(100 * number + step, SHAPE), oracle.random_tensor(number, SHAPE)
            token = service.forward(replace(TRAIN, keep_input=True), mine).saved_input
            try:
                answer = service.backward(BackwardCall(KEY, saved_input=token), grad)
            except InputEvicted:
                evicted += 1
            else:
                expected = oracle.gradients(mine, grad, np.ones(MAPS), 1e-5)[0]
                close(answer.grad, expected)
        return evicted

    assert sum(at_once(work)) < 30 * THREADS


def test_layers_do_not_wait_for_each_other() -> None:
    device = InterruptedDevice()
    service: LayerService = new_service(device)
    other = LayerKey("default", "other")
    create(service)
    create(service, other)
    inside, go_on = threading.Event(), threading.Event()

    def hold(made: int) -> None:
        if made == 1:
            inside.set()
            assert go_on.wait(30)

    device.interrupt = hold
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(service.forward, TRAIN, oracle.random_tensor(1, SHAPE))
        assert inside.wait(10)
        # Neither another layer nor another step of the same one waits for a computation.
        assert service.forward(ForwardCall(other, train=True), oracle.random_tensor(2, SHAPE)).version == 1
        assert service.forward(TRAIN, oracle.random_tensor(3, SHAPE)).version == 1
        go_on.set()
        assert held.result(10).version == 2


def test_creators_and_deleters_of_one_name_never_leave_half_a_layer() -> None:
    service = new_service()

    def work(number: int) -> None:
        for step in range(60):
            if number % 4 == 0:
                try:
                    service.delete_layer(KEY)
                except LayerNotFound:
                    continue
            else:
                record, _ = service.create_layer(KEY, CONFIG, StateUpdate(), sscale=0.0, empty=False)
                assert record.config == CONFIG
                try:
                    assert service.forward(TRAIN, oracle.random_tensor(step, SHAPE)).version >= 1
                except LayerNotFound:
                    continue

    at_once(work)
    service.create_layer(KEY, CONFIG, StateUpdate(), sscale=0.0, empty=False)
    service.delete_layer(KEY)
    assert service.list_layers("default", 0, "") == ([], "")


def test_a_step_by_default_is_none_once_the_default_is_eval() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    device.interrupt = lambda _: service.set_train(KEY, False)
    x = oracle.random_tensor(1, SHAPE)
    answer = service.forward(ForwardCall(KEY, keep_input=True), x)
    assert (answer.train, answer.version, answer.saved_input, answer.moments) == (False, 0, "", None)
    np.testing.assert_allclose(
        answer.output.array(), x / np.sqrt(1 + 1e-5), rtol=1e-6
    )  # by the statistics of a new layer
    assert service.get_layer(KEY).state.version == 0
    assert service.forward(TRAIN, x).version == 1  # who chooses the mode trains


def test_a_step_by_choice_stays_one_when_the_default_becomes_eval() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    device.interrupt = lambda _: service.set_train(KEY, False)
    assert service.forward(TRAIN, oracle.random_tensor(1, SHAPE)).version == 1
