"""What a `Group` is told, and what it tells: settings, joining, leaving, copies, and other clients of the contract."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm import Group
from sharednorm.errors import GroupAborted, GroupMismatch, InvalidConfiguration, InvalidName, StaleGeneration
from sharednorm.v1 import service_pb2, tensor_pb2
from sharednorm.v1.service_pb2_grpc import BatchNormServiceStub
from tests.support import oracle
from tests.support.members import Members, all_of, at_once
from tests.support.processes.server import in_process
from tests.support.stock import SECONDS, channel_to, detail_of

names = (f"membership/{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with in_process() as server:
        yield server.address


@pytest.fixture
def hub(address: str) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(address) as opened:
        yield opened


def part(rank: int, rows: int = 3) -> oracle.Array:
    return oracle.random_tensor(rank, (rows, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": ""}, InvalidName, "the group's name is ''"),
        ({"name": "x" * 257}, InvalidName, "1 to 256 characters"),
        ({"name": 7}, InvalidName, "the group's name is 7"),
        ({"name": "a\nb"}, InvalidName, "control character"),
        ({"size": 0}, InvalidConfiguration, "size is 0 .expected: an integer, 1 to 1024"),
        ({"size": 1025}, InvalidConfiguration, "size is 1025"),
        ({"size": 2.0}, InvalidConfiguration, "size is 2.0"),
        ({"size": True}, InvalidConfiguration, "size is True"),
        ({"min_members": 0}, InvalidConfiguration, "min_members is 0 .expected: an integer, 1 to 4"),
        ({"min_members": 5}, InvalidConfiguration, "min_members is 5"),
        ({"timeout": 0}, InvalidConfiguration, "timeout is 0"),
        ({"timeout": float("nan")}, InvalidConfiguration, "timeout is nan"),
        ({"timeout": 1e6}, InvalidConfiguration, "at most 86400"),
        ({"rank": 4}, InvalidConfiguration, "rank is 4 .expected: an integer, 0 to 3"),
        ({"rank": -1}, InvalidConfiguration, "rank is -1"),
        ({"member": ""}, InvalidName, "the member's name is ''"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Group(**{"name": "g", "size": 4, **arguments})


def test_what_it_is() -> None:
    group = Group("g", 4, rank=2)
    assert (group.name, group.size, group.min_members, group.timeout, group.member) == ("g", 4, 4, 30.0, "rank 2")
    assert (group.rank, group.generation, group.members, group.participants) == (None, None, None, ())
    assert Group("g", 4, min_members=2, timeout=1, member="site a").member == "site a"
    assert Group("g", 4).member != Group("g", 4).member


def test_a_copy_in_the_process_is_the_member_and_one_elsewhere_another() -> None:
    group = Group("g", 4, min_members=3, timeout=7.0)
    assert copy.copy(group) is copy.deepcopy(group) is group
    other = pickle.loads(pickle.dumps(group))
    assert (other.name, other.size, other.min_members, other.timeout) == ("g", 4, 3, 7.0)
    assert other.member != group.member
    assert pickle.loads(pickle.dumps(Group("g", 4, rank=1))).member == "rank 1"
    assert pickle.loads(pickle.dumps(Group("g", 4, member="site a"))).member == "site a"


def test_a_group_needs_a_hub_and_has_one(address: str, hub: sharednorm.Hub) -> None:
    group = Group("g", 1)
    with pytest.raises(InvalidConfiguration, match="is on no server yet"):
        group.join()
    group.leave()  # nothing to leave
    hub.BatchNorm(3, name=next(names), compute="client", group=group)
    with sharednorm.connect(address) as other, pytest.raises(InvalidConfiguration, match="another hub already"):
        other.BatchNorm(3, name=next(names), compute="client", group=group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": Group("g", 1)}, "group is given with compute='server'"),
        ({"group": "g", "compute": "client"}, "group is 'g' .expected: a sharednorm.Group, or None"),
    ],
)
def test_options_that_do_not_go_together(hub: sharednorm.Hub, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        hub.BatchNorm(3, name="never", **options)
    assert "never" not in [info.name for info in hub.layers()]


def test_members_that_expect_other_groups(address: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name) as members:
        layers = members.layers("BatchNorm", 3, name=name)
        all_of(2, lambda rank: layers[rank](part(rank)))
        for settings, message in (
            ({"size": 3}, "has size=2, min_members=2, timeout=20 .this member expects: size=3"),
            ({"size": 2, "timeout": 5.0}, "this member expects: size=2, min_members=2, timeout=5"),
            ({"size": 2, "timeout": 20.0, "member": "a third"}, "has its 2 members already"),
        ):
            with sharednorm.connect(address) as hub:
                group = Group(name, **settings)
                layer = hub.BatchNorm(3, name=name, compute="client", group=group)
                with pytest.raises(GroupMismatch, match=message):
                    layer(part(9))
        all_of(2, lambda rank: layers[rank](part(rank)))
        assert layers[0].numOfProps == 2


def test_two_that_ask_for_one_rank(address: str) -> None:
    name = next(names)
    with sharednorm.connect(address) as one, sharednorm.connect(address) as two:
        groups = [Group(name, 2, rank=0, member=member, timeout=1.0) for member in ("a", "b")]
        layers = [
            hub.BatchNorm(3, name=name, compute="client", group=group)
            for hub, group in zip((one, two), groups, strict=True)
        ]
        results = at_once(2, lambda number: layers[number](part(number)))
        kinds = {type(result) for result in results}
        assert kinds == {GroupMismatch, GroupAborted}  # the second is told why, the first that it is alone


def test_groups_of_two_namespaces_do_not_meet(address: str) -> None:
    name = next(names)
    with sharednorm.connect(address, namespace="a") as one, sharednorm.connect(address, namespace="b") as two:
        layers = [
            hub.BatchNorm(3, name=name, compute="client", group=Group(name, 2, rank=rank, timeout=0.5))
            for rank, hub in enumerate((one, two))
        ]
        results = at_once(2, lambda number: layers[number](part(number)))
        assert [type(result) for result in results] == [GroupAborted, GroupAborted]


@pytest.mark.parametrize("how", ["leave", "with group", "close", "with hub"])
def test_who_leaves_is_not_waited_for(address: str, how: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name) as members:
        layers = members.layers("BatchNorm", 3, name=name)
        all_of(2, lambda rank: layers[rank](part(rank)))
        if how == "leave":
            members.groups[1].leave()
            assert members.groups[1].rank is None
        elif how == "with group":
            with members.groups[1]:
                pass
        elif how == "close":
            members.hubs[1].close()
        else:
            with members.hubs[1]:
                pass
        began = time.monotonic()
        np.testing.assert_allclose(layers[0](part(0)).mean(axis=0), 0, atol=1e-5)
        assert time.monotonic() - began < 10
        assert members.groups[0].participants == (0,)
        assert layers[0].numOfProps == 2


@pytest.mark.parametrize("how", ["with group", "with hub"])
def test_who_fails_has_not_left_in_order(address: str, how: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name, timeout=2.0) as members:
        layers = members.layers("BatchNorm", 3, name=name)
        all_of(2, lambda rank: layers[rank](part(rank)))
        with pytest.raises(ZeroDivisionError), members.groups[1] if how == "with group" else members.hubs[1]:
            raise ZeroDivisionError
        with pytest.raises(GroupAborted, match="has waited 2 s for rank 1"):
            layers[0](part(0))
        assert layers[0].numOfProps == 1


def test_a_member_joins_again_after_it_has_left(address: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name) as members:
        layers = members.layers("BatchNorm", 3, name=name)
        for generation in (1, 2, 3):
            all_of(2, lambda rank: layers[rank](part(rank)))
            assert [group.generation for group in members.groups] == [generation] * 2
            for group in members.groups:
                group.leave()
        assert layers[0].numOfProps == 3


def test_members_that_wait_for_each_other_at_different_layers(address: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name, timeout=2.0) as members:
        first = members.layers("BatchNorm", 3, name=f"{name}/a")
        second = members.layers("BatchNorm", 3, name=f"{name}/b")
        results = at_once(2, lambda rank: (first, second)[rank][rank](part(rank)))
        assert [type(result) for result in results] == [GroupAborted, GroupAborted]
        assert "at different layers (expected: all call the layers in one order)" in str(results[0])
        assert first[0].numOfProps == second[0].numOfProps == 0


def test_two_threads_of_a_member_at_one_layer_take_turns(address: str) -> None:
    name = next(names)
    with Members(address, 2, "auto", name) as members:
        layers = [members.layers("BatchNorm", 3, name=name) for _ in range(2)]  # a handle for each thread
        failures: list[BaseException] = []

        def work(rank: int, handle: int) -> None:
            try:
                for step in range(10):
                    layers[handle][rank](part(step))
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                failures.append(error)

        threads = [threading.Thread(target=work, args=(rank, handle)) for rank in range(2) for handle in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert layers[0][0].numOfProps == 20


def test_a_client_of_the_contract_alone(address: str) -> None:
    # One member by the library, the other by the generated classes, as in another language.
    name = next(names)
    with sharednorm.connect(address) as hub, channel_to(address) as channel:
        stub = BatchNormServiceStub(channel)
        layer = hub.BatchNorm(3, name=name, compute="client", group=Group(name, 2, rank=1), sscale=0.0)
        mine, grad = part(0, 4).astype(np.float64), part(1, 4).astype(np.float64)
        results: list[Any] = []

        def library() -> None:
            results.append(layer(part(7, 2)))
            layer.backward(part(8, 2))

        other = threading.Thread(target=library)
        other.start()
        joined = stub.JoinGroup(
            service_pb2.JoinGroupRequest(group=name, member="c", size=2, min_members=2, timeout=30, rank=0),
            timeout=SECONDS,
        )
        assert (joined.generation, joined.rank, joined.members) == (1, 0, 2)
        count, mean, m2 = oracle.batch_moments(mine)
        request = service_pb2.SynchronizeMomentsRequest(
            ref=hub._ref(name),
            ticket=joined.ticket,
            step=1,
            moments=tensor_pb2.Moments(count=[count], mean=mean, m2=m2),
        )
        step = stub.SynchronizeMoments(request, timeout=SECONDS)
        assert (step.version, step.num_of_props, list(step.ranks), step.replayed) == (1, 1, [0, 1], False)
        assert stub.SynchronizeMoments(request, timeout=SECONDS).replayed  # asked for again
        whole = np.concatenate([mine, part(7, 2)])
        np.testing.assert_allclose(step.moments.mean, whole.mean(axis=0), rtol=1e-6)
        assert list(step.moments.count) == [6]
        deviation = mine - np.array(step.moments.mean)
        sums = stub.SynchronizeGradients(
            service_pb2.SynchronizeGradientsRequest(
                ref=hub._ref(name),
                ticket=joined.ticket,
                step=1,
                sums=tensor_pb2.GradientSums(grad=grad.sum(axis=0), product=(grad * deviation).sum(axis=0)),
                moments=step.moments,
            ),
            timeout=SECONDS,
        )
        other.join(30)
        np.testing.assert_allclose(sums.sums.grad, np.concatenate([grad, part(8, 2)]).sum(axis=0), rtol=1e-6)
        np.testing.assert_allclose(results[0], oracle.Model(3).train(whole)[4:], rtol=0, atol=3e-6)
        expected, _, _ = oracle.gradients(whole, np.concatenate([grad, part(8, 2)]), np.ones(3), 1e-5)
        assert layer.grad is not None
        np.testing.assert_allclose(layer.grad, expected[4:], rtol=0, atol=3e-6)
        stub.LeaveGroup(service_pb2.LeaveGroupRequest(ticket=joined.ticket), timeout=SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            stub.SynchronizeMoments(request, timeout=SECONDS)
        assert detail_of(caught.value).reason == "STALE_GENERATION"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "a group of 0 members"),
        ({"size": 4096}, "a group of 4096 members"),
        ({"min_members": 3}, "goes on with 3"),
        ({"min_members": 0}, "goes on with 0"),
        ({"timeout": 0.0}, "the group's timeout is 0.0"),
        ({"timeout": float("inf")}, "the group's timeout is inf"),
        ({"timeout": float("nan")}, "the group's timeout is nan"),
        ({"group": ""}, "the group's name is ''"),
        ({"member": " "}, "the member's name is ' '"),
        ({"rank": 2}, "rank 2 of 2 .expected: 0 to 1"),
        ({"namespace": "x" * 200}, "namespace"),
    ],
)
def test_what_nobody_may_ask_for(address: str, changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"group": next(names), "member": "m", "size": 2, "min_members": 2, "timeout": 1.0}
    with channel_to(address) as channel, pytest.raises(grpc.RpcError, match=message):
        BatchNormServiceStub(channel).JoinGroup(service_pb2.JoinGroupRequest(**{**good, **changes}), timeout=SECONDS)


def test_a_ticket_that_is_nobodys(address: str, hub: sharednorm.Hub) -> None:
    hub.BatchNorm(3, name="ticketless")
    with channel_to(address) as channel:
        stub = BatchNormServiceStub(channel)
        for ticket in (b"", b"x" * 24, b"y" * 1000):
            request = service_pb2.SynchronizeMomentsRequest(ref=hub._ref("ticketless"), ticket=ticket, step=1)
            with pytest.raises(grpc.RpcError) as caught:
                stub.SynchronizeMoments(request, timeout=SECONDS)
            assert detail_of(caught.value).reason == StaleGeneration.reason
            stub.LeaveGroup(service_pb2.LeaveGroupRequest(ticket=ticket), timeout=SECONDS)
