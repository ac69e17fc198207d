"""Domains of the service's layers: kept inputs, records and the store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sharednorm.core.state import StateUpdate
from sharednorm.errors import CallCancelled, InputEvicted, LayerNotFound
from sharednorm_server.layers.requests import BackwardCall, ForwardCall
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import LayerRecord
from sharednorm_server.store.memory import MemoryStore
from tests.support import oracle
from tests.support.service import KEY, SHAPE, InterruptedDevice, close, create, new_service

A, B = replace(KEY, domain="a"), replace(KEY, domain="b")
X = oracle.random_tensor(1, SHAPE)


@pytest.fixture
def service() -> LayerService:
    made = new_service(activation_cache_bytes=4 * X.nbytes)
    create(made)
    for key in (A, B):
        made.create_domain(key, StateUpdate())
    return made


def test_an_input_that_a_domains_forward_has_left_is_found(service: LayerService) -> None:
    model = oracle.Model(3)
    model.train(X)
    token = service.forward(ForwardCall(A, train=True, keep_input=True), X).saved_input
    right = model.backward(X)
    for key in (A, B, KEY):  # it is the layer's
        close(service.backward(BackwardCall(key, saved_input=token, param_grads=False), X).grad, right)


def test_an_input_is_released_by_a_forward_in_a_domain(service: LayerService) -> None:
    token = service.forward(ForwardCall(A, train=True, keep_input=True), X).saved_input
    service.forward(ForwardCall(A, train=True, release_input=token), X)
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(A, saved_input=token), X)


def test_a_layer_that_is_deleted_takes_the_inputs_of_its_domains_with_it(service: LayerService) -> None:
    service.forward(ForwardCall(A, train=True, keep_input=True), X)
    assert service._saved.nbytes == X.nbytes
    service.delete_layer(KEY)
    assert service._saved.nbytes == 0


def test_a_store_has_one_record_with_all_domains() -> None:
    store = MemoryStore()
    service = new_service(store=store)
    create(service)
    service.create_domain(A, StateUpdate(num_of_props=3))
    service.forward(ForwardCall(A, train=True), X)
    service.forward(ForwardCall(KEY, train=True), X)
    kept = store.get(KEY)
    assert kept is not None
    assert (kept.key.domain, kept.state.num_of_props, kept.state.version) == ("", 1, 2)
    assert {name: each.num_of_props for name, each in kept.domains.items()} == {"a": 4}
    # Another service of that store goes on with it.
    again = new_service(store=store)
    assert again.get_layer(A).state.num_of_props == 4
    np.testing.assert_array_equal(again.get_layer(A).state.mean, kept.domains["a"].mean)


def test_a_record_that_is_seen_there_and_back_is_itself() -> None:
    service = new_service()
    create(service)
    for domain in ("b", "a"):
        service.create_domain(replace(KEY, domain=domain), StateUpdate())
    record = service.get_layer(KEY)
    seen = record.within("a").within("b").within("")
    assert (seen.tag, seen.key, seen.train, sorted(seen.domains)) == (record.tag, record.key, True, ["a", "b"])
    for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad", "num_of_props", "version", "merged"):
        assert getattr(seen.state, name) is getattr(record.state, name), name
    assert record.within("") is record
    assert len({record.tag, record.within("a").tag, record.within("b").tag}) == 3


def test_a_change_in_one_domain_shares_what_it_has_not_changed(service: LayerService) -> None:
    # For devices know vectors by what they are, and would else bring all of them to the GPU again.
    before = service.get_layer(A)
    service.forward(ForwardCall(B, train=True), X)
    after = service.get_layer(A)
    assert after.tag != before.tag
    for name in ("scale", "bias", "mean", "var"):
        assert getattr(after.state, name) is getattr(before.state, name), name


def test_a_step_whose_domain_is_deleted_meanwhile_is_none() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    create(service)
    service.create_domain(A, StateUpdate())
    device.interrupt = lambda _: service.delete_domain(A) and None
    with pytest.raises(LayerNotFound, match="no domain 'a'"):
        service.forward(ForwardCall(A, train=True), X)
    record: LayerRecord = service.get_layer(KEY)
    assert (record.state.version, record.domains) == (0, {})


def test_a_step_that_nobody_waits_for_changes_no_domain(service: LayerService) -> None:
    before = service.get_layer(A)
    with pytest.raises(CallCancelled):
        service.forward(ForwardCall(A, train=True), X, lambda: False)
    assert service.get_layer(A).tag == before.tag
