"""What the service does with layers: create or attach, describe, list, delete, set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from threading import Barrier

import numpy as np
import pytest

from sharednorm import __version__
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import StateUpdate
from sharednorm.core.types import LayerKind, NonFinitePolicy
from sharednorm.errors import (
    ConfigurationMismatch,
    InvalidConfiguration,
    InvalidPageToken,
    InvalidShape,
    LayerEmpty,
    LayerNotFound,
)
from sharednorm_server.layers.requests import ForwardCall, LayerKey
from sharednorm_server.layers.service import LayerService
from tests.support import oracle
from tests.support.service import CONFIG, KEY, MAPS, SHAPE, create, new_service

NOTHING = StateUpdate()


@pytest.fixture
def service() -> LayerService:
    return new_service()


def test_it_says_what_it_is_made_of(service: LayerService) -> None:
    assert service.info.version == __version__
    assert service.info.device.startswith("cpu (numpy, ")
    assert service.info.store == "memory:"


# --- create ---------------------------------------------------------------------------------------------


def test_a_new_layer(service: LayerService) -> None:
    record, created = service.create_layer(KEY, CONFIG, NOTHING, sscale=0.01, empty=False)
    assert created
    assert (record.key, record.config, record.train) == (KEY, CONFIG, True)
    state = record.state
    assert (state.version, state.num_of_props, state.initialized) == (0, 0, True)
    np.testing.assert_array_equal(state.bias, np.zeros(MAPS))
    np.testing.assert_array_equal(state.mean, np.zeros(MAPS))
    np.testing.assert_array_equal(state.var, np.ones(MAPS))


def test_the_scale_is_drawn_around_one_with_the_spread_that_was_asked_for(service: LayerService) -> None:
    config = LayerConfig(LayerKind.BATCH_NORM, 20_000)
    one, _ = service.create_layer(KEY, config, NOTHING, sscale=0.05, empty=False)
    two, _ = service.create_layer(LayerKey("default", "other"), config, NOTHING, sscale=0.05, empty=False)
    assert abs(one.state.scale.mean() - 1) < 0.003
    assert abs(one.state.scale.std() - 0.05) < 0.003
    assert (one.state.scale != two.state.scale).any()


def test_the_scale_of_a_layer_that_is_not_affine_is_one(service: LayerService) -> None:
    record, _ = service.create_layer(KEY, replace(CONFIG, affine=False), NOTHING, sscale=5.0, empty=False)
    np.testing.assert_array_equal(record.state.scale, np.ones(MAPS))


def test_the_initial_state_is_taken_and_the_rest_filled_in(service: LayerService) -> None:
    initial = StateUpdate(scale=[1, 2, 3], var=[4, 5, 6], num_of_props=9)
    record, _ = service.create_layer(KEY, CONFIG, initial, sscale=0.5, empty=False)
    np.testing.assert_array_equal(record.state.scale, [1, 2, 3])
    np.testing.assert_array_equal(record.state.var, [4, 5, 6])
    np.testing.assert_array_equal(record.state.bias, np.zeros(MAPS))
    assert (record.state.num_of_props, record.state.version) == (9, 0)


def test_the_same_configuration_attaches(service: LayerService) -> None:
    first, _ = service.create_layer(KEY, CONFIG, NOTHING, sscale=0.01, empty=False)
    again, created = service.create_layer(KEY, CONFIG, StateUpdate(scale=[7, 7, 7]), sscale=0.5, empty=False)
    assert not created
    assert again is first


def test_an_attach_with_empty_finds_the_layer_as_it_is(service: LayerService) -> None:
    create(service)
    record, created = service.create_layer(KEY, CONFIG, NOTHING, sscale=0.0, empty=True)
    assert (created, record.state.initialized) == (False, True)


@pytest.mark.parametrize("sscale", [-1.0, float("nan"), float("inf")])
def test_an_attach_ignores_the_initial_state(service: LayerService, sscale: float) -> None:
    create(service)
    _, created = service.create_layer(KEY, CONFIG, StateUpdate(scale=[1]), sscale=sscale, empty=False)
    assert not created


def test_another_configuration_is_refused_and_the_differences_named(service: LayerService) -> None:
    create(service)
    other = replace(CONFIG, kind=LayerKind.BATCH_NORM_3D, epsilon=0.5, nonfinite=NonFinitePolicy.ALLOW)
    before = service.get_layer(KEY)
    with pytest.raises(ConfigurationMismatch) as caught:
        service.create_layer(KEY, other, NOTHING, sscale=0.0, empty=False)
    assert caught.value.metadata == {
        "kind": "BatchNorm2D (requested: BatchNorm3D)",
        "epsilon": "1e-05 (requested: 0.5)",
        "nonfinite": "refuse (requested: allow)",
    }
    for text in (*caught.value.metadata, *caught.value.metadata.values(), "'bn'"):
        assert text in caught.value.message
    assert service.get_layer(KEY) is before


@pytest.mark.parametrize("sscale", [-1.0, float("nan"), float("inf")])
def test_a_bad_spread_creates_nothing(service: LayerService, sscale: float) -> None:
    with pytest.raises(InvalidConfiguration, match="sscale"):
        service.create_layer(KEY, CONFIG, NOTHING, sscale=sscale, empty=False)
    with pytest.raises(LayerNotFound):
        service.get_layer(KEY)


@pytest.mark.parametrize(
    ("initial", "error"),
    [
        (StateUpdate(scale=[1, 2]), InvalidShape),
        (StateUpdate(var=[1, -1, 1]), InvalidConfiguration),
        (StateUpdate(num_of_props=-1), InvalidConfiguration),
    ],
)
def test_a_bad_initial_state_creates_nothing(
    service: LayerService, initial: StateUpdate, error: type[Exception]
) -> None:
    with pytest.raises(error):
        service.create_layer(KEY, CONFIG, initial, sscale=0.0, empty=False)
    with pytest.raises(LayerNotFound):
        service.get_layer(KEY)


def test_racing_creators_see_one_layer(service: LayerService) -> None:
    barrier = Barrier(8)

    def attach(_: int) -> tuple[object, bool]:
        barrier.wait(10)
        record, created = service.create_layer(KEY, CONFIG, NOTHING, sscale=0.1, empty=False)
        return record.state.scale.tobytes(), created

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attach, range(8)))
    assert sum(created for _, created in answers) == 1
    assert len({scale for scale, _ in answers}) == 1


# --- empty layers ---------------------------------------------------------------------------------------


def test_an_empty_layer_waits_for_its_state(service: LayerService) -> None:
    record, _ = service.create_layer(KEY, CONFIG, NOTHING, sscale=0.0, empty=True)
    assert not record.state.initialized
    x = oracle.random_tensor(0, SHAPE)
    with pytest.raises(LayerEmpty):
        service.forward(ForwardCall(KEY, train=True), x)
    with pytest.raises(LayerEmpty):
        service.forward(ForwardCall(KEY, train=False), x)
    with pytest.raises(LayerEmpty):
        service.update_params(KEY, 0.1)
    with pytest.raises(LayerEmpty):
        service.set_state(KEY, StateUpdate(scale=[1, 1, 1]))
    ones = [1, 1, 1]
    filled, _ = service.set_state(KEY, StateUpdate(scale=ones, bias=ones, mean=ones, var=ones, num_of_props=4))
    assert (filled.state.initialized, filled.state.num_of_props) == (True, 4)
    assert service.forward(ForwardCall(KEY, train=True), x).num_of_props == 5


# --- delete, set ----------------------------------------------------------------------------------------


def test_a_deleted_layer_is_gone(service: LayerService) -> None:
    create(service)
    service.delete_layer(KEY)
    with pytest.raises(LayerNotFound):
        service.get_layer(KEY)
    with pytest.raises(LayerNotFound):
        service.delete_layer(KEY)


def test_every_method_names_an_unknown_layer(service: LayerService) -> None:
    x = oracle.random_tensor(0, SHAPE)
    for use in (
        lambda: service.get_layer(KEY),
        lambda: service.delete_layer(KEY),
        lambda: service.set_train(KEY, True),
        lambda: service.set_state(KEY, StateUpdate(bias=[1, 1, 1])),
        lambda: service.update_params(KEY, 0.1),
        lambda: service.check_forward(ForwardCall(KEY), SHAPE),
        lambda: service.forward(ForwardCall(KEY), x),
    ):
        with pytest.raises(LayerNotFound, match="'bn'"):
            use()


def test_the_default_mode_is_that_of_calls_that_choose_none(service: LayerService) -> None:
    create(service)
    x = oracle.random_tensor(0, SHAPE)
    assert service.forward(ForwardCall(KEY), x).train
    assert not service.set_train(KEY, False)[0].train
    assert not service.forward(ForwardCall(KEY), x).train
    assert service.forward(ForwardCall(KEY, train=True), x).train
    assert service.set_train(KEY, True)[0].train
    assert service.forward(ForwardCall(KEY), x).train
    assert not service.forward(ForwardCall(KEY, train=False), x).train
    assert service.get_layer(KEY).state.version == 3


def test_set_state_replaces_what_it_names(service: LayerService) -> None:
    create(service, bias=[1, 2, 3])
    record, _ = service.set_state(
        KEY, StateUpdate(mean=np.array([4.0, 5, 6], np.float32).reshape(1, 3, 1, 1), num_of_props=2)
    )
    np.testing.assert_array_equal(record.state.mean, [4, 5, 6])
    np.testing.assert_array_equal(record.state.bias, [1, 2, 3])
    assert (record.state.num_of_props, record.state.version) == (2, 0)
    assert service.get_layer(KEY) is record


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (StateUpdate(mean=[1, 2, 3], scale=[1, 2]), InvalidShape),
        (StateUpdate(mean=[1, 2, 3], var=[0, 0, -1]), InvalidConfiguration),
        (StateUpdate(mean=[1, 2, 3], num_of_props=-1), InvalidConfiguration),
        (StateUpdate(mean=[1, 2, 3], num_of_props=1 << 63), InvalidConfiguration),
    ],
)
def test_a_bad_state_changes_nothing(service: LayerService, update: StateUpdate, error: type[Exception]) -> None:
    create(service)
    before = service.get_layer(KEY)
    with pytest.raises(error):
        service.set_state(KEY, update)
    assert service.get_layer(KEY) is before


def test_update_params_adds_the_gradients(service: LayerService) -> None:
    create(service, scale_grad=[1, 2, 3], bias_grad=[4, 5, 6])
    record, _ = service.update_params(KEY, 0.5)
    np.testing.assert_array_equal(record.state.scale, [1.5, 2, 2.5])
    np.testing.assert_array_equal(record.state.bias, [2, 2.5, 3])
    np.testing.assert_array_equal(record.state.scale_grad, [1, 2, 3])
    assert record.state.version == 0


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -float("inf")])
def test_a_rate_that_is_not_finite_changes_nothing(service: LayerService, rate: float) -> None:
    create(service, scale_grad=[1, 2, 3])
    before = service.get_layer(KEY)
    with pytest.raises(InvalidConfiguration, match="learnRate"):
        service.update_params(KEY, rate)
    assert service.get_layer(KEY) is before


# --- list -----------------------------------------------------------------------------------------------


def fill(service: LayerService, names: list[str], namespace: str = "default") -> None:
    for name in names:
        create(service, LayerKey(namespace, name))


def walk(service: LayerService, size: int, namespace: str = "default") -> list[list[str]]:
    pages: list[list[str]] = []
    token = ""
    while True:
        records, token = service.list_layers(namespace, size, token)
        pages.append([record.key.name for record in records])
        if not token:
            return pages


def test_no_layers_are_one_empty_page(service: LayerService) -> None:
    assert walk(service, 0) == [[]]


def test_250_layers_come_in_pages(service: LayerService) -> None:
    names = [f"layer/{number}" for number in range(250)]
    fill(service, names)
    fill(service, ["other"], "elsewhere")
    assert [len(page) for page in walk(service, 0)] == [100, 100, 50]
    assert [len(page) for page in walk(service, 250)] == [250]
    assert [len(page) for page in walk(service, 1000)] == [250]
    assert [len(page) for page in walk(service, 125)] == [125, 125]
    assert list(chain.from_iterable(walk(service, 7))) == sorted(names)
    assert walk(service, 0, "elsewhere") == [["other"]]


def test_names_of_any_script_page(service: LayerService) -> None:
    names = ["стем/bn", "層", "a" * 512, "é", "😀/1", "a b", "-", "_"]
    fill(service, names)
    assert list(chain.from_iterable(walk(service, 1))) == sorted(names)


def test_layers_may_come_and_go_between_pages(service: LayerService) -> None:
    fill(service, ["a", "b", "d", "e"])
    records, token = service.list_layers("default", 2, "")
    service.delete_layer(LayerKey("default", "b"))
    fill(service, ["c"])
    records, token = service.list_layers("default", 2, token)
    assert [record.key.name for record in records] == ["c", "d"]


@pytest.mark.parametrize("size", [-1, 1001, 1 << 31])
def test_a_page_size_out_of_range(service: LayerService, size: int) -> None:
    with pytest.raises(InvalidConfiguration, match="page_size"):
        service.list_layers("default", size, "")


@pytest.mark.parametrize("token", ["x", "====", "AAAA", "a" * 10_000, "é", "\x00", "AAAAAAAA", "b", " "])
def test_garbage_is_no_page_token(service: LayerService, token: str) -> None:
    fill(service, ["a", "b"])
    with pytest.raises(InvalidPageToken, match="next_page_token"):
        service.list_layers("default", 1, token)


def test_a_token_is_of_one_namespace_and_cannot_be_edited(service: LayerService) -> None:
    fill(service, ["a", "b"])
    fill(service, ["a", "b"], "other")
    _, token = service.list_layers("default", 1, "")
    with pytest.raises(InvalidPageToken):
        service.list_layers("other", 1, token)
    for place in range(len(token)):
        edited = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(InvalidPageToken):
            service.list_layers("default", 1, edited)
