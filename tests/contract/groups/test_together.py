"""The members of a group, against one process over all their batches in float64."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest

from sharednorm.errors import InvalidConfiguration, InvalidShape, NonFiniteInput, TooFewValues
from sharednorm.remote.handle import RemoteBatchNorm
from tests.support import oracle
from tests.support.members import Members, all_of, at_once
from tests.support.processes.server import in_process

names = (f"together/{number}" for number in itertools.count())

# How many samples each member brings: even, uneven, and none at all.
BATCHES = [[5], [3, 3], [1, 6], [4, 0], [2, 3, 7], [0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [3, 0, 8, 1, 2, 5, 1, 4]]


@pytest.fixture(scope="module", params=["grpc", "direct"])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with in_process() as server:
        yield server.address, request.param


def parts_of(whole: oracle.Array, sizes: list[int]) -> list[oracle.Array]:
    return np.split(whole, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_the_union_is_one_batch(place: tuple[str, str], kind: str, sizes: list[int]) -> None:
    if kind == "BatchNorm" and sum(sizes) == 1:
        sizes = [0, 3, 0]
    count, maps = len(sizes), 4
    with Members(place[0], count, place[1], next(names)) as members:
        layers = members.layers(kind, maps, name=next(names))
        model = oracle.Model(maps)
        model.scale = layers[0].scale.ravel().astype(np.float64)
        for step in range(4):
            x = oracle.random_tensor(7 * step, oracle.shape_of(kind, maps, sum(sizes)))
            grad = oracle.random_tensor(7 * step + 1, x.shape)
            xs, grads = parts_of(x, sizes), parts_of(grad, sizes)
            results = all_of(count, lambda rank, xs=xs: layers[rank](xs[rank]))  # type: ignore[misc]
            np.testing.assert_allclose(np.concatenate(results), model.train(x), rtol=0, atol=1e-6 * 3)
            momentum = 0.0 if step == 0 else 0.5

            def differentiate(rank: int, grads: list[oracle.Array] = grads, momentum: float = momentum) -> oracle.Array:
                layers[rank].backward(grads[rank], momentum=momentum)
                result = layers[rank].grad
                assert result is not None
                return result

            found = np.concatenate(all_of(count, differentiate))
            expected = model.backward(grad, momentum=momentum)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(1.0, float(np.abs(expected).max())))
        for layer in layers:
            assert layer.numOfProps == 4  # once for all, not once for each
            np.testing.assert_allclose(layer.mean.ravel(), model.mean, rtol=1e-6)
            np.testing.assert_allclose(layer.var.ravel(), model.var, rtol=1e-6)
            for name, expected in (("scale", model.scale_grad), ("bias", model.bias_grad)):
                given = layer.vars[name].grad.ravel()
                np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("others", list(itertools.permutations(range(3)))[1:], ids=str)
def test_members_get_the_same_bits_in_any_order(place: tuple[str, str], others: tuple[int, ...]) -> None:
    x = [oracle.random_tensor(seed, (3, 5, 4, 4)) for seed in range(3)]

    def outcome(order: tuple[int, ...]) -> list[bytes]:
        with Members(place[0], 3, place[1], next(names)) as members:
            layers = members.layers("BatchNorm2D", 5, name=next(names), sscale=0.0)

            def step(rank: int) -> bytes:
                time.sleep(0.02 * order.index(rank))  # so that they arrive in that order
                return layers[rank](x[rank]).tobytes()

            all_of(3, lambda rank: members.groups[rank].join())
            return [*all_of(3, step), layers[0].mean.tobytes(), layers[0].var.tobytes()]

    assert outcome(others) == outcome((0, 1, 2))


def test_a_group_of_one_is_a_layer_by_itself(place: tuple[str, str]) -> None:
    x, grad = oracle.random_tensor(1, (3, 4, 5, 5)), oracle.random_tensor(2, (3, 4, 5, 5))
    with Members(place[0], 1, place[1], next(names)) as members:
        together = members.layers("BatchNorm2D", 4, name=next(names), sscale=0.0)[0]
        alone = members.hubs[0].BatchNorm2D(4, name=next(names), compute="client", sscale=0.0)
        for layer in (together, alone):
            layer.trainMode()
            layer(x)
            layer.backward(grad)
        for name in ("data", "grad", "scalegrad", "biasgrad", "mean", "var", "savemean", "saveinvvar"):
            np.testing.assert_array_equal(getattr(together, name), getattr(alone, name), err_msg=name)


def test_evaluation_is_each_members_own(place: tuple[str, str]) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm2D", 4, name=next(names))
        all_of(2, lambda rank: layers[rank](oracle.random_tensor(rank, (3, 4, 5, 5))))
        layers[0].evalMode()
        x = oracle.random_tensor(9, (2, 4, 3, 3))
        expected = oracle.normalized(
            x, layers[1].mean.ravel(), layers[1].var.ravel(), layers[1].scale.ravel(), layers[1].bias.ravel(), 1e-5
        )
        np.testing.assert_allclose(layers[0](x), expected, rtol=0, atol=1e-6 * 3)
        assert layers[0](np.empty((0, 4, 3, 3), np.float32)).shape == (0, 4, 3, 3)
        assert layers[1].numOfProps == 1


def test_what_is_wrong_with_the_union_is_said_to_all_and_changes_nothing(place: tuple[str, str]) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm", 3, name=next(names))
        nothing, one = np.empty((0, 3), np.float32), np.ones((1, 3), np.float32)
        bad = np.ones((2, 3), np.float32)
        bad[1, 1] = np.nan
        for parts, kind in (
            ((nothing, nothing), TooFewValues),
            ((one, nothing), TooFewValues),
            ((bad, one), NonFiniteInput),
        ):
            results = at_once(2, lambda rank, parts=parts: layers[rank](parts[rank]))  # type: ignore[misc]
            assert [type(result) for result in results] == [kind, kind]
            assert layers[0].numOfProps == 0
        # The step is over for all of them, and the group goes on.
        assert members.groups[0].generation == 1
        outputs = all_of(2, lambda rank: layers[rank](one * rank))
        np.testing.assert_allclose(np.concatenate(outputs)[:, 0] / layers[0].scale.ravel()[0], [-1, 1], atol=1e-4)
        assert members.groups[0].generation == 1
        assert layers[1].numOfProps == 1


def test_what_a_member_may_not_bring(place: tuple[str, str]) -> None:
    with Members(place[0], 1, place[1], next(names)) as members:
        layer = members.layers("BatchNorm2D", 3, name=next(names))[0]
        for shape in ((2, 3, 0, 4), (2, 4, 4, 4), (3, 4, 4), (0, 4, 4, 4)):
            with pytest.raises(InvalidShape):
                layer(np.empty(shape, np.float32))
        layer(np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32))
        with pytest.raises(InvalidShape):
            layer.backward(np.empty((0, 3, 4, 4), np.float32))
        assert layer.numOfProps == 1


def test_members_must_agree_on_a_backward(place: tuple[str, str]) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm", 3, name=next(names))
        x = [oracle.random_tensor(rank, (4, 3)) for rank in range(2)]
        all_of(2, lambda rank: layers[rank](x[rank]))
        results = at_once(2, lambda rank: layers[rank].backward(x[rank], momentum=0.5 * rank))
        assert [type(result) for result in results] == [InvalidConfiguration] * 2
        assert not layers[0].vars["bias"].grad.any()
        all_of(2, lambda rank: layers[rank].backward(x[rank]))
        assert layers[0].vars["bias"].grad.any()


def test_without_gradients_of_parameters(place: tuple[str, str]) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm", 3, name=next(names))
        x = [oracle.random_tensor(rank, (4, 3)) for rank in range(2)]
        all_of(2, lambda rank: layers[rank](x[rank]))
        all_of(2, lambda rank: layers[rank].backward(x[rank], updParamGrads=False, updGrad=False))
        assert layers[0].grad is None
        assert layers[0].scalegrad is not None
        assert layers[0].scalegrad.any()
        assert not layers[0].vars["scale"].grad.any()


def test_without_parameters(place: tuple[str, str]) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm", 3, name=next(names), affine=False)
        x = [oracle.random_tensor(rank, (4, 3)) for rank in range(2)]
        all_of(2, lambda rank: layers[rank](x[rank]))
        all_of(2, lambda rank: layers[rank].backward(x[rank]))
        whole, grad = np.concatenate(x), np.concatenate(x)
        expected, _, _ = oracle.gradients(whole, grad, np.ones(3), 1e-5)
        np.testing.assert_allclose(
            np.concatenate([layer.grad for layer in layers if layer.grad is not None]), expected, rtol=0, atol=2e-6
        )
        assert layers[0].scalegrad is None


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(place: tuple[str, str], name: str) -> None:
    with Members(place[0], 2, place[1], next(names)) as members:
        layers = members.layers("BatchNorm2D", 3, name=next(names), sscale=0.0)
        x = [oracle.random_tensor(rank, (2 + rank, 3, 4, 5), name) for rank in range(2)]
        results = all_of(2, lambda rank: layers[rank](x[rank]))
        whole = np.concatenate(x)
        expected = oracle.Model(3).train(whole)
        got = np.concatenate(results)
        assert got.dtype == whole.dtype
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=oracle.rounding(name), atol=1e-6)


def test_several_layers_and_groups_at_once(place: tuple[str, str]) -> None:
    # The layers of one network one after the other, those of another group between them.
    with (
        Members(place[0], 3, place[1], next(names)) as first,
        Members(place[0], 2, place[1], next(names)) as second,
    ):
        deep = [first.layers("BatchNorm", 3, name=next(names)) for _ in range(6)]
        other = second.layers("BatchNorm", 3, name=next(names))

        def work(number: int) -> None:
            for step in range(5):
                if number < 3:
                    x = oracle.random_tensor(100 * number + step, (4, 3))
                    for layers in deep:
                        x = layers[number](x)
                    for layers in reversed(deep):
                        layers[number].backward(x)
                else:
                    other[number - 3](oracle.random_tensor(100 * number + step, (4, 3)))

        all_of(5, work)
        assert {layers[0].numOfProps for layers in deep} == {5}
        assert other[0].numOfProps == 5


def test_handles_that_share_a_member(place: tuple[str, str]) -> None:
    # Two handles of one layer in each process: the steps of a member at a layer are one sequence.
    with Members(place[0], 2, place[1], next(names)) as members:
        name = next(names)
        first, second = members.layers("BatchNorm", 3, name=name), members.layers("BatchNorm", 3, name=name)

        def work(rank: int) -> None:
            for step in range(3):
                for layers in (first, second):
                    layers[rank](oracle.random_tensor(step, (4, 3)))

        all_of(2, work)
        assert first[0].numOfProps == 6


def test_a_handle_says_with_whom(place: tuple[str, str]) -> None:
    with Members(place[0], 1, place[1], "eins \N{GREEK SMALL LETTER ALPHA}") as members:
        layer = members.layers("BatchNorm", 3, name=next(names))[0]
        assert "with the group 'eins \N{GREEK SMALL LETTER ALPHA}'" in repr(layer)
        assert layer.train
        group = members.groups[0]
        assert repr(group) == "<Group 'eins \N{GREEK SMALL LETTER ALPHA}', size 1, not joined>"
        group.join()
        assert (group.rank, group.generation, group.members) == (0, 1, 1)
        assert "rank 0 of 1, generation 1" in repr(group)
        attached = members.hubs[0].layer(str(layer.name), compute="client", group=group)
        assert isinstance(attached, RemoteBatchNorm)
        attached(oracle.random_tensor(1, (3, 3)))
        assert layer.numOfProps == 1
