"""Members of a group that are processes, and are killed, stopped or late; a server that goes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import GroupAborted, LayerNotFound, ServerUnavailable, StaleGeneration
from tests.support import oracle
from tests.support.members import all_of, at_once
from tests.support.processes.group_member import MAPS, Member, members, part
from tests.support.processes.server import ServerProcess, in_process, server_process, stopped

TIMEOUT = 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process() as process:
        yield process


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def steps(server: ServerProcess) -> Iterator[Any]:
    """Give a handle of the layer that the members step, which shows how many steps were taken."""
    with sharednorm.connect(server.address) as hub:
        if any(info.name == "bn" for info in hub.layers()):
            hub.delete("bn")
        yield hub.BatchNorm(MAPS, name="bn", sscale=0.0)


def settings(size: int, **options: Any) -> list[dict[str, Any]]:
    return [{"size": size, "rank": rank, "timeout": TIMEOUT, **options} for rank in range(size)]


def forward(started: list[Member], first_seed: int = 0, rows: int = 2) -> list[dict[str, Any]]:
    for number, member in enumerate(started):
        member.say("forward", seed=first_seed + number, rows=rows + number)
    return [member.hear() for member in started]


def union(results: list[dict[str, Any]], first_seed: int = 0, rows: int = 2, seeds: list[int] | None = None) -> None:
    """Check that outputs are those of the union of these members' batches."""
    numbers = list(range(len(results))) if seeds is None else seeds
    whole = np.concatenate([part(first_seed + number, rows + number) for number in numbers])
    found = np.concatenate([np.array(result["result"]) for result in results])
    np.testing.assert_allclose(found, oracle.Model(MAPS).train(whole), rtol=0, atol=3e-6)


def test_one_that_is_killed_while_the_others_wait(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(3)) as (first, second, third):
        union(forward([first, second, third]))
        for member in (first, second):
            member.say("forward", seed=1, rows=3)
        third.signal(signal.SIGKILL)
        for member in (first, second):
            outcome = member.hear()
            assert outcome["error"] == "GroupAborted"
            assert f"has waited {TIMEOUT:g} s for rank 2" in outcome["message"]
            assert outcome["generation"] is None
        assert steps.numOfProps == 1  # all or nothing
        with members(server.address, name, settings(3)[2:]) as (again,):
            results = forward([first, second, again])
            union(results)
            assert {result["generation"] for result in results} == {2}
            assert [result["rank"] for result in results] == [0, 1, 2]
        assert steps.numOfProps == 2


def test_one_that_comes_back_ends_the_wait_for_what_it_was(server: ServerProcess, steps: Any, name: str) -> None:
    patient = settings(2, timeout=60.0)
    with members(server.address, name, patient) as (first, second):
        forward([first, second])
        first.say("forward", seed=1, rows=3)
        second.signal(signal.SIGKILL)
        second.process.wait(10)
        began = time.monotonic()
        with members(server.address, name, patient[1:]) as (again,):
            again.say("forward", seed=1, rows=3)
            assert "has joined anew" in first.hear()["message"]
            assert time.monotonic() - began < 30  # long before the timeout
            first.say("forward", seed=0, rows=2)
            union([first.hear(), again.hear()])
        assert steps.numOfProps == 2


def test_one_that_is_killed_before_all_have_joined(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(2)) as (first, second):
        second.signal(signal.SIGKILL)
        first.say("forward", seed=1, rows=3)
        outcome = first.hear()
        assert outcome["error"] == "GroupAborted"
        assert "1 of 2 members have joined" in outcome["message"]
        assert steps.numOfProps == 0


def test_one_that_is_killed_in_a_backward(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(2)) as (first, second):
        forward([first, second])
        first.say("backward", seed=5, rows=2)
        second.signal(signal.SIGKILL)
        assert first.hear()["error"] == "GroupAborted"
        assert not steps.vars["bias"].grad.any()


def test_one_that_is_stopped_hears_that_the_others_went_on(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(3, min_members=2)) as started:
        first, second, third = started
        forward(started)
        third.signal(signal.SIGSTOP)
        union(forward([first, second], first_seed=10), first_seed=10)  # without the third
        assert steps.numOfProps == 2
        union(forward([first, second], first_seed=20), first_seed=20)
        third.signal(signal.SIGCONT)
        third.say("forward", seed=1, rows=1)
        outcome = third.hear()
        assert outcome["error"] == "StaleGeneration"
        assert "the others have waited too long for it" in outcome["message"]
        assert steps.numOfProps == 3
        # It waits to be let in, and the others go on until a moment that suits them, once they have heard of it.
        third.say("forward", seed=2, rows=4)
        generations, seed = [1, 1], 30
        while generations == [1, 1]:
            union(forward([first, second], first_seed=seed), first_seed=seed)
            for member in (first, second):
                member.say("join")
            generations, seed = [member.hear()["generation"] for member in (first, second)], seed + 2
        assert generations == [2, 2]
        for number, member in enumerate((first, second)):
            member.say("forward", seed=number, rows=2 + number)
        outcomes = [member.hear() for member in started]
        union(outcomes)
        assert [outcome["participants"] for outcome in outcomes] == [[0, 1, 2]] * 3


def test_one_that_is_never_let_in_is_told_how(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(3, min_members=2)) as started:
        first, second, third = started
        forward(started)
        third.signal(signal.SIGSTOP)
        forward([first, second])
        third.signal(signal.SIGCONT)
        third.say("forward", seed=1, rows=1)
        assert third.hear()["error"] == "StaleGeneration"
        third.say("join")
        outcome = third.hear()
        assert outcome["error"] == "GroupAborted"
        assert "2 go on in generation 1, which let others in when they call group.join()" in outcome["message"]
        for member in (first, second):
            member.say("join")  # nobody waited at their last step: nothing happens
            assert member.hear()["generation"] == 1


def test_fewer_than_may_go_on_do_not(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(3, min_members=2)) as (first, second, third):
        forward([first, second, third])
        second.signal(signal.SIGKILL)
        third.signal(signal.SIGKILL)
        first.say("forward", seed=1, rows=3)
        assert first.hear()["error"] == "GroupAborted"
        assert steps.numOfProps == 1


def test_one_whose_data_end_leaves(server: ServerProcess, steps: Any, name: str) -> None:
    with members(server.address, name, settings(3, timeout=60.0)) as (first, second, third):
        forward([first, second, third])
        first.say("forward", seed=0, rows=2)
        second.say("forward", seed=1, rows=3)
        third.say("leave")
        union([first.hear(), second.hear()])
        second.finish()
        first.say("forward", seed=0, rows=2)
        union([first.hear()])
        assert steps.numOfProps == 3


def test_a_server_that_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket"
    with server_process(listen=where) as first_server:
        hubs = [sharednorm.connect(where, timeout=10) for _ in range(2)]
        groups = [sharednorm.Group("g", 2, rank=rank, timeout=5) for rank in range(2)]
        layers = [
            hub.BatchNorm(MAPS, name="bn", compute="client", group=group, sscale=0.0)
            for hub, group in zip(hubs, groups, strict=True)
        ]
        all_of(2, lambda rank: layers[rank](part(rank, 3)))
        outcome: list[BaseException | None] = [None]

        def wait() -> None:
            try:
                layers[0](part(0, 3))
            except sharednorm.SharedNormError as error:
                outcome[0] = error

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        first_server.stop(signal.SIGKILL)
        with server_process(listen=where):
            # It has tried again by itself, and heard that this server, which keeps its state in memory, knows nothing.
            waiting.join(30)
            assert isinstance(outcome[0], LayerNotFound)
            again = [
                hub.BatchNorm(MAPS, name="bn", compute="client", group=group, sscale=0.0)
                for hub, group in zip(hubs, groups, strict=True)
            ]
            results = at_once(2, lambda rank: again[rank](part(rank, 3)))
            if any(isinstance(result, StaleGeneration) for result in results):  # the second's ticket was of the first
                assert again[0].numOfProps == 0
                results = at_once(2, lambda rank: again[rank](part(rank, 3)))
            assert not any(isinstance(result, BaseException) for result in results), results
            assert again[0].numOfProps == 1
            for hub in hubs:
                hub.close()


def test_a_server_that_stops_sends_those_who_wait_away() -> None:
    with in_process() as running:
        hub = sharednorm.connect(running.address, timeout=1)
        group = sharednorm.Group("g", 2, rank=0, timeout=2)
        layer = hub.BatchNorm(MAPS, name="bn", compute="client", group=group)
        outcome: list[BaseException | None] = [None]

        def wait() -> None:
            try:
                layer(part(0, 3))
            except sharednorm.SharedNormError as error:
                outcome[0] = error

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert running.stop(10.0)  # nothing had to be cut off
        assert time.monotonic() - began < 5
        waiting.join(20)
        assert isinstance(outcome[0], ServerUnavailable)  # it has tried again, until its time was up
        hub.close()


@pytest.mark.slow
def test_64_members(server: ServerProcess) -> None:
    size, rounds = 64, 5
    hubs = [sharednorm.connect(server.address, timeout=60) for _ in range(size)]
    groups = [sharednorm.Group("many", size, rank=rank, timeout=60) for rank in range(size)]
    layers = [
        hub.BatchNorm(MAPS, name="many", compute="client", group=group, sscale=0.0)
        for hub, group in zip(hubs, groups, strict=True)
    ]

    def work(rank: int) -> list[oracle.Array]:
        found = []
        for step in range(rounds):
            found.append(layers[rank](part(1000 * step + rank, 1 + rank % 3)))
            layers[rank].backward(found[-1])
        return found

    results = all_of(size, work)
    model = oracle.Model(MAPS)
    for step in range(rounds):
        whole = np.concatenate([part(1000 * step + rank, 1 + rank % 3) for rank in range(size)])
        expected = model.train(whole)
        np.testing.assert_allclose(np.concatenate([each[step] for each in results]), expected, rtol=0, atol=3e-6)
    assert layers[0].numOfProps == rounds
    np.testing.assert_allclose(layers[7].var.ravel(), model.var, rtol=1e-6)
    for hub in hubs:
        hub.close()


def test_a_step_that_is_given_up_is_not_taken_twice(server: ServerProcess, steps: Any, name: str) -> None:
    # The server is stopped while both wait for its answer; they ask again on new connections, and get the same step.
    with sharednorm.connect(server.address, timeout=1.0) as one, sharednorm.connect(server.address, timeout=1.0) as two:
        groups = [sharednorm.Group(name, 2, rank=rank, timeout=0.5) for rank in range(2)]
        layers = [
            hub.BatchNorm(MAPS, name="bn", compute="client", group=group, sscale=0.0)
            for hub, group in zip((one, two), groups, strict=True)
        ]
        all_of(2, lambda rank: layers[rank](part(rank, 3)))
        with stopped(server.pid):
            results = at_once(2, lambda rank: layers[rank](part(rank, 3)))
        assert [type(result) for result in results] == [sharednorm.DeadlineExceeded] * 2, results
        assert groups[0].generation is None  # what became of the step can't be known here: the next one joins anew
        results = at_once(2, lambda rank: layers[rank](part(rank, 3)))
        for _ in range(3):
            if not any(isinstance(result, GroupAborted) for result in results):
                break
            results = at_once(2, lambda rank: layers[rank](part(rank, 3)))
        assert not any(isinstance(result, BaseException) for result in results), results
        assert steps.numOfProps in {2, 3}
