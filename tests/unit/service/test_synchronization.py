"""Steps of a group and the next server: what was taken is answered by it, and what was not is told so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from sharednorm.core.state import StateUpdate
from sharednorm.errors import GENERATION_GONE, LayerNotFound, StaleGeneration
from sharednorm_server.groups.coordinator import GroupKey, Synchronizer
from sharednorm_server.groups.state_machine import GroupSettings, Membership
from sharednorm_server.layers.requests import BackwardCall
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.sqlite.store import SqliteStore
from tests.support.service import KEY, create, new_service
from tests.unit.store.test_snapshots import moments

DOMAIN = replace(KEY, domain="site-a")


@dataclass
class Place:
    """A server's groups and layers, which can be started anew."""

    directory: Path

    def __post_init__(self) -> None:
        self.start()
        create(self.service)
        self.service.create_domain(DOMAIN, StateUpdate())

    def start(self) -> None:
        self.service: LayerService = new_service(store=SqliteStore(self.directory))
        self.groups = Synchronizer(self.service)

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.groups.close()
        self.service.close()

    def join(self, name: str = "run") -> list[Membership]:
        """Have two members join."""
        key, settings = GroupKey("default", name), GroupSettings(2, 2, 10.0)
        joining = [self.groups.join(key, member, None, settings) for member in "ab"]
        return [each.result(5) for each in joining]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.stop()


def test_a_step_that_was_taken_is_answered_by_the_next_server(place: Place) -> None:
    members = place.join()
    for number in (1, 2):
        parts = [place.groups.moments(KEY, each.ticket, number, moments(each.rank + number)) for each in members]
        first, _ = (part.result(5) for part in parts)
    # Parameters that have changed since are not those that the step has used.
    place.service.set_state(KEY, StateUpdate(scale=[7, 7, 7]))
    place.restart()
    for each in members:
        again = place.groups.moments(KEY, each.ticket, 2, moments(each.rank + 2)).result(5)
        assert (again.replayed, again.ranks) == (True, (0, 1))
        assert (again.result.version, again.result.num_of_props) == (2, 2)
        for name in ("scale", "bias"):
            np.testing.assert_array_equal(getattr(again.result, name), getattr(first.result, name))
        for name in ("mean", "m2"):
            np.testing.assert_array_equal(getattr(again.result.moments, name), getattr(first.result.moments, name))
    assert place.service.get_layer(KEY).state.version == 2


@pytest.mark.parametrize("number", [1, 3])
def test_a_step_that_was_not_taken_is_told_so(place: Place, number: int) -> None:
    members = place.join()
    for done in (1, 2):
        for part in [place.groups.moments(KEY, each.ticket, done, moments(done)) for each in members]:
            part.result(5)
    if number == 3:  # of which one part was there
        place.groups.moments(KEY, members[0].ticket, 3, moments(3))
    place.restart()
    for each in members:
        with pytest.raises(StaleGeneration, match="this step was not taken; join again") as caught:
            place.groups.moments(KEY, each.ticket, number, moments(3))
        assert caught.value.metadata == {GENERATION_GONE: str(number)}
    assert place.service.get_layer(KEY).state.version == 2
    assert [each.generation for each in place.join()] == [1, 1]


@pytest.mark.parametrize("adds", [True, False])
def test_the_sums_of_a_backward_are_answered_by_the_next_server(place: Place, adds: bool) -> None:
    members, union = place.join(), moments(5)
    sums = [np.arange(6.0).reshape(2, 3) + rank for rank in range(2)]
    call = BackwardCall(KEY, scale=0.5, param_grads=adds)
    parts = [place.groups.gradients(call, each.ticket, 1, sums[each.rank], union) for each in members]
    first = parts[0].result(5)
    before = place.service.get_layer(KEY).state
    assert before.scale_grad.any() == before.bias_grad.any() == adds
    place.restart()
    again = place.groups.gradients(call, members[1].ticket, 1, sums[1], union).result(5)
    assert (again.replayed, again.ranks) == (True, (0, 1))
    np.testing.assert_array_equal(again.result.sums, first.result.sums)
    np.testing.assert_array_equal(again.result.sums, sums[0] + sums[1])
    np.testing.assert_array_equal(place.service.get_layer(KEY).state.scale_grad, before.scale_grad)


def test_places_generations_and_groups_are_not_taken_for_each_other(place: Place) -> None:
    old, other = place.join(), place.join("other")
    for each in old:
        taken = place.groups.moments(KEY, each.ticket, 1, moments(1))
    taken.result(5)
    new = place.join()  # a new generation of the same group, which has taken no step
    assert [each.generation for each in new] == [2, 2]
    place.restart()
    for key, ticket in (
        (DOMAIN, old[0].ticket),
        (KEY, new[0].ticket),
        (KEY, other[0].ticket),
        (KEY, b""),
        (KEY, b"x" * 40),
    ):
        with pytest.raises(StaleGeneration):
            place.groups.moments(key, ticket, 1, moments(1))
    with pytest.raises(StaleGeneration):
        place.groups.gradients(BackwardCall(KEY), old[0].ticket, 1, None, moments(1))
    assert place.groups.moments(KEY, old[0].ticket, 1, moments(1)).result(5).replayed
    place.service.delete_layer(KEY)
    with pytest.raises(LayerNotFound):
        place.groups.moments(KEY, old[0].ticket, 1, moments(1))
