"""Domains of layers on a server: by whichever handle, in groups, ahead of the server, and by the contract itself."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.core.limits import MAX_DOMAINS
from sharednorm.errors import (
    GroupAborted,
    InvalidConfiguration,
    InvalidName,
    InvalidShape,
    LayerNotFound,
    LimitExceeded,
)
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm.v1.service_pb2_grpc import BatchNormServiceStub
from tests.support import oracle
from tests.support.members import Members, all_of, at_once
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process
from tests.support.stock import SECONDS, channel_to, code_of, detail_of

names = (f"domains/{number}" for number in itertools.count())
SHAPE = (4, 3, 5, 2)
COMPUTE: list[dict[str, Any]] = [{}, {"compute": "client"}, {"compute": "client", "push": "async"}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with in_process() as server:
        yield server.address


@pytest.fixture
def hub(address: str) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(address) as opened:
        yield opened


@pytest.fixture
def stub(address: str) -> Iterator[BatchNormServiceStub]:
    with channel_to(address) as channel:
        yield BatchNormServiceStub(channel)


# --- Handles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", COMPUTE)
def test_a_handle_that_is_made_in_a_domain(hub: sharednorm.Hub, options: dict[str, Any]) -> None:
    name, model = next(names), oracle.Model(3)
    inside = hub.BatchNorm2D(3, name=name, sscale=0.0, domain="site-a", **options)
    again = hub.BatchNorm2D(3, name=name, domain="site-a", **options)
    assert (inside.domain, inside.domains, again.numOfProps) == ("site-a", ("site-a",), 0)
    inside.trainMode()
    inside(random_tensor(1, SHAPE))
    inside.flush()
    model.train(random_tensor(1, SHAPE))
    assert (again.numOfProps, hub.layer(name).numOfProps) == (1, 0)
    found = hub.layer(name, domain="site-a", **options)
    np.testing.assert_allclose(found.mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)
    assert "domain 'site-a'" in repr(found)
    (info,) = [info for info in hub.layers() if info.name == name]
    assert (info.domains, info.num_of_props, info.version) == (1, 0, 1)


def test_a_domain_that_is_not_there_is_not_found(hub: sharednorm.Hub) -> None:
    name = next(names)
    hub.BatchNorm2D(3, name=name)
    with pytest.raises(LayerNotFound, match=r"has no domain 'site-b' \(expected: none, for it has none") as caught:
        hub.layer(name, domain="site-b")
    assert caught.value.metadata["domain"] == "site-b"
    with pytest.raises(InvalidName, match="domain"):
        hub.BatchNorm2D(3, name=name, domain="a\nb")
    assert hub.layer(name).domains == ()


def test_a_bad_domain_creates_no_layer(hub: sharednorm.Hub) -> None:
    name = next(names)
    with pytest.raises(InvalidName, match="domain"):
        hub.BatchNorm2D(3, name=name, domain=" ")
    assert name not in {info.name for info in hub.layers()}


def test_a_layer_takes_its_domains_with_it(hub: sharednorm.Hub) -> None:
    name = next(names)
    inside = hub.BatchNorm2D(3, name=name, domain="a")
    hub.delete(name)
    with pytest.raises(LayerNotFound, match="somebody deleted it"):
        inside.domains  # noqa: B018 - it asks
    hub.BatchNorm2D(3, name=name)
    for call in (lambda: inside.numOfProps, lambda: inside.inDomain("b"), lambda: inside.deleteDomain("a")):
        with pytest.raises(LayerNotFound, match="another one has its name now"):
            call()
    assert hub.layer(name).domains == ()


def test_a_forward_of_one_domain_is_differentiated_in_another(hub: sharednorm.Hub) -> None:
    # Their input is the layer's: whoever releases it in the next forward may be in another domain, too.
    own, model = hub.BatchNorm2D(3, name=next(names), sscale=0.0), oracle.Model(3)
    own.trainMode()
    inside = own.inDomain("a")
    x = random_tensor(1, SHAPE)
    own(x)
    model.train(x)
    inside._pass = own._pass
    inside.backward(x)
    assert inside.grad is not None
    np.testing.assert_allclose(inside.grad, model.backward(x), rtol=0, atol=1e-5)


def test_many_handles_are_read_together(hub: sharednorm.Hub) -> None:
    name = next(names)
    own = hub.BatchNorm2D(3, name=name, compute="client", max_staleness=1e6)
    trained = [hub.layer(name, compute="client").inDomain(domain) for domain in ("a", "b")]
    layers = [own, *(own.inDomain(domain) for domain in ("a", "b"))]
    models = [oracle.Model(3) for _ in range(3)]
    for model in models:
        model.scale = own.scale.ravel().astype(np.float64)
    for number, each in enumerate(trained):
        each.trainMode()
        each(random_tensor(number, SHAPE))
        models[number + 1].train(random_tensor(number, SHAPE))
    x = random_tensor(9, SHAPE)
    for _ in range(2):  # the second time nothing has changed
        hub.refresh(*layers)
        for layer, model in zip(layers, models, strict=True):
            layer.evalMode()
            np.testing.assert_allclose(layer(x), model.evaluate(x), rtol=0, atol=1e-4)


def test_a_step_that_is_refused_in_one_domain_takes_none_of_another_with_it(hub: sharednorm.Hub) -> None:
    name = next(names)
    lost, fine = (
        hub.BatchNorm2D(3, name=name, compute="client", push="async", domain=domain) for domain in ("lost", "fine")
    )
    for _ in range(2):  # of whom both have the parameters
        lost(random_tensor(1, SHAPE))
        fine(random_tensor(1, SHAPE))
    hub.flush()
    fine.deleteDomain("lost")
    for _ in range(3):
        fine(random_tensor(1, SHAPE))
        with pytest.raises(LayerNotFound, match="no domain 'lost'"):
            step_and_wait(lost)
    fine.flush()
    assert fine.numOfProps == 5


def step_and_wait(layer: sharednorm.Layer) -> None:
    layer(random_tensor(1, SHAPE))
    layer.flush()


def test_training_goes_on_while_a_domain_comes_and_goes(hub: sharednorm.Hub) -> None:
    own = hub.BatchNorm2D(3, name=next(names), sscale=0.0)
    steady, over = own.inDomain("steady"), threading.Event()

    def disturb() -> None:
        while not over.is_set():
            own.inDomain("fleeting").deleteDomain("fleeting")

    other = threading.Thread(target=disturb)
    other.start()
    model = oracle.Model(3)
    for step in range(40):
        steady(random_tensor(step, SHAPE))
        model.train(random_tensor(step, SHAPE))
    over.set()
    other.join()
    assert (steady.numOfProps, own.domains) == (40, ("steady",))
    np.testing.assert_allclose(steady.mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)


# --- Groups -----------------------------------------------------------------------------------------


def test_a_group_in_a_domain(address: str) -> None:
    name, model = next(names), oracle.Model(3)
    with Members(address, 2, "direct", name) as members:
        layers = members.layers("BatchNorm2D", 3, name=name, sscale=0.0, domain="site-a")
        for step in range(3):
            parts = [random_tensor(10 * step + rank, (2 + rank, 3, 5, 2)) for rank in range(2)]
            right = model.train(np.concatenate(parts))
            outputs = all_of(2, lambda rank, parts=parts: layers[rank](parts[rank]))  # type: ignore[misc]
            np.testing.assert_allclose(np.concatenate(outputs), right, rtol=0, atol=1e-5)
            right = model.backward(np.concatenate(parts))
            all_of(2, lambda rank, parts=parts: layers[rank].backward(parts[rank]))  # type: ignore[misc]
            np.testing.assert_allclose(np.concatenate([layer.grad for layer in layers]), right, rtol=0, atol=1e-4)
        assert layers[0].numOfProps == 3
        assert layers[0].inDomain("").numOfProps == 0
        np.testing.assert_allclose(layers[0].mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)


def test_members_in_different_domains_take_no_step_together(address: str) -> None:
    name = next(names)
    with Members(address, 2, "direct", name, timeout=1.0) as members:
        layers = [
            hub.BatchNorm2D(3, name=name, compute="client", group=group, domain=domain)
            for hub, group, domain in zip(members.hubs, members.groups, ("a", "b"), strict=True)
        ]
        results = at_once(2, lambda rank: layers[rank](random_tensor(rank, SHAPE)))
        assert {type(result) for result in results} == {GroupAborted}
        assert [layer.numOfProps for layer in layers] == [0, 0]


# --- The contract -----------------------------------------------------------------------------------


def ref(name: str, domain: str = "") -> layer_pb2.LayerRef:
    return layer_pb2.LayerRef(name=name, domain=domain)


def test_the_methods_by_any_client(hub: sharednorm.Hub, stub: BatchNormServiceStub) -> None:
    name = next(names)
    hub.BatchNorm(2, name=name)
    state = layer_pb2.LayerState(
        mean=tensor_pb2.DoubleVector(values=[1, 2]), var=tensor_pb2.DoubleVector(values=[3, 4]), num_of_props=5
    )
    request = service_pb2.CreateDomainRequest(ref=ref(name, "b"), initial_state=state)
    for created in (True, False):
        answer = stub.CreateDomain(request, timeout=SECONDS)
        assert (answer.created, answer.layer.num_of_props, answer.layer.domains) == (created, 5, 1)
        assert (answer.layer.ref.domain, answer.layer.ref.name) == ("b", name)
        request.initial_state.num_of_props = 9  # of one that exists: ignored
    stub.CreateDomain(service_pb2.CreateDomainRequest(ref=ref(name, "a")), timeout=SECONDS)
    stub.SetState(
        service_pb2.SetStateRequest(ref=ref(name, "a"), state=layer_pb2.LayerState(stats_frozen=True)), timeout=SECONDS
    )
    found = stub.ListDomains(service_pb2.ListDomainsRequest(ref=ref(name)), timeout=SECONDS).domains
    assert [(each.name, each.num_of_props, each.stats_frozen) for each in found] == [("a", 0, True), ("b", 5, False)]
    stats = stub.GetStats(service_pb2.GetStatsRequest(ref=ref(name, "b")), timeout=SECONDS)
    assert (list(stats.state.mean.values), list(stats.state.var.values)) == ([1, 2], [3, 4])
    left = stub.DeleteDomain(service_pb2.DeleteDomainRequest(ref=ref(name, "b")), timeout=SECONDS).layer
    assert (left.ref.domain, left.domains, left.num_of_props) == ("", 1, 0)


def test_a_tag_of_one_domain_is_none_of_another(hub: sharednorm.Hub, stub: BatchNormServiceStub) -> None:
    name = next(names)
    hub.BatchNorm(2, name=name).inDomain("a")
    tags = {}
    for domain in ("", "a"):
        tags[domain] = stub.GetStats(service_pb2.GetStatsRequest(ref=ref(name, domain)), timeout=SECONDS).tag
    for domain, asked in itertools.product(("", "a"), repeat=2):
        request = service_pb2.GetStatsRequest(ref=ref(name, domain), unless_tag=tags[asked])
        assert stub.GetStats(request, timeout=SECONDS).unchanged == (domain == asked)


REFUSED: list[Any] = [
    pytest.param(
        lambda stub, name: stub.CreateDomain(service_pb2.CreateDomainRequest(ref=ref(name)), timeout=SECONDS),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidName),
        id="create one without a name",
    ),
    pytest.param(
        lambda stub, name: stub.DeleteDomain(service_pb2.DeleteDomainRequest(ref=ref(name)), timeout=SECONDS),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidName),
        id="delete one without a name",
    ),
    pytest.param(
        lambda stub, name: stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref(name, "a")), timeout=SECONDS),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidConfiguration),
        id="delete the layer by one of its domains",
    ),
    pytest.param(
        lambda stub, name: stub.CreateLayer(
            service_pb2.CreateLayerRequest(
                ref=ref(name, "a"), config=layer_pb2.LayerConfig(kind=layer_pb2.LAYER_KIND_BATCH_NORM, maps=2)
            ),
            timeout=SECONDS,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidConfiguration),
        id="create the layer in a domain",
    ),
    pytest.param(
        lambda stub, name: stub.CreateDomain(
            service_pb2.CreateDomainRequest(
                ref=ref(name, "c"),
                initial_state=layer_pb2.LayerState(scale=tensor_pb2.FloatVector(values=[1, 1])),
            ),
            timeout=SECONDS,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidConfiguration),
        id="a scale of its own",
    ),
    pytest.param(
        lambda stub, name: stub.CreateDomain(
            service_pb2.CreateDomainRequest(
                ref=ref(name, "c"), initial_state=layer_pb2.LayerState(mean=tensor_pb2.DoubleVector(values=[1]))
            ),
            timeout=SECONDS,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidShape),
        id="a mean of another size",
    ),
    pytest.param(
        lambda stub, name: stub.CreateDomain(
            service_pb2.CreateDomainRequest(ref=ref(f"no {name}", "c")), timeout=SECONDS
        ),
        (grpc.StatusCode.NOT_FOUND, LayerNotFound),
        id="no such layer",
    ),
]


@pytest.mark.parametrize(("call", "refusal"), REFUSED)
def test_what_is_refused(hub: sharednorm.Hub, stub: BatchNormServiceStub, call: Any, refusal: Any) -> None:
    name = next(names)
    own = hub.BatchNorm(2, name=name)
    own.inDomain("a")
    with pytest.raises(grpc.RpcError) as caught:
        call(stub, name)
    code, error = refusal
    assert code_of(caught.value) == code
    assert detail_of(caught.value).reason == error.reason
    assert own.domains == ("a",)


def test_so_many_domains_and_no_more(hub: sharednorm.Hub) -> None:
    own = hub.BatchNorm(1, name=next(names))
    for number in range(MAX_DOMAINS):
        last = own.inDomain(f"層{number:04}" * 5)
    with pytest.raises(LimitExceeded, match=r"1024 domains \(expected: at most 1024; deleteDomain") as caught:
        own.inDomain("one more")
    assert caught.value.metadata == {"limit": "domains", "value": "1024"}
    assert len(own.domains) == MAX_DOMAINS
    last(np.array([[1], [2]], np.float32))
    own.deleteDomain(last.domain)
    assert own.inDomain("one more").numOfProps == 0
