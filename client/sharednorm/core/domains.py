"""Several sets of running statistics in one layer: pure functions over immutable values.

A layer has statistics of its own, and may keep others beside them, each of a domain: a site, a camera, a task. Scale,
bias, their gradients and the version are the layer's. Whoever works in a domain sees a `LayerState` like any other,
with the statistics of that domain, and the functions of `state` change it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_DOMAINS
from sharednorm.core.state import LayerState, StateUpdate, blank_state, updated
from sharednorm.core.types import Vector
from sharednorm.errors import InvalidConfiguration, InvalidName, LayerNotFound, LimitExceeded


@dataclass(frozen=True, eq=False)
class DomainStatistics:
    """Running statistics that are not in use. `LayerState` documents each.

    Attributes:
        mean: Running mean, float32 (C,), read-only.
        var: Running variance, float32 (C,), read-only.
        num_of_props: Steps that they have taken in.
        stats_frozen: Whether steps leave them as they are.
        merged: Names of the deltas that were merged last.
    """

    mean: Vector
    var: Vector
    num_of_props: int = 0
    stats_frozen: bool = False
    merged: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        """See that nobody can write to the arrays, which copies and pickles else could."""
        self.mean.setflags(write=False)
        self.var.setflags(write=False)

    def __reduce__(self) -> tuple[type[DomainStatistics], tuple[object, ...]]:
        """Copy and pickle by the constructor: arrays forget on that way that they are read-only."""
        return type(self), (self.mean, self.var, self.num_of_props, self.stats_frozen, self.merged)


Domains: TypeAlias = Mapping[str, DomainStatistics]
"""The sets that are not in use, by domain; the layer's own are "" there while a domain's are in use. Never changed."""


def blank_statistics(config: LayerConfig, initial: StateUpdate) -> DomainStatistics:
    """Return the statistics that a domain begins with: mean 0, variance 1 and no step, but for what is given.

    Args:
        config: The layer's.
        initial: Other values of mean, var, num_of_props and stats_frozen.

    Raises:
        InvalidConfiguration: A value is out of its range, or of something that is the layer's.
        InvalidShape, UnsupportedDType: An array does not hold C numbers.
    """
    for name in ("scale", "bias", "scale_grad", "bias_grad"):
        if getattr(initial, name) is not None:
            raise InvalidConfiguration(f"{name} is the layer's, and no domain's (expected: mean, var, numOfProps)")
    return statistics_of(updated(blank_state(config), config, initial))


def swapped(state: LayerState, others: Domains, current: str, wanted: str, layer: str) -> tuple[LayerState, Domains]:
    """Return a layer's state with the statistics of another domain, and the sets that are not in use then.

    Args:
        state: The state with those of one.
        others: The sets that are not in use.
        current: The domain that is in use.
        wanted: The domain that is wanted.
        layer: The layer, for the message.

    Raises:
        LayerNotFound: The layer has no such domain.
    """
    if wanted == current:
        return state, others
    found = others.get(wanted)
    if found is None:
        raise no_domain(wanted, others, layer)
    rest = {name: each for name, each in others.items() if name != wanted}
    rest[current] = statistics_of(state)
    return with_statistics(state, found), rest


def with_domain(others: Domains, domain: str, statistics: DomainStatistics) -> Domains:
    """Return the sets with that of a new domain among them.

    Raises:
        InvalidName: The domain has no name, and so is the layer itself.
        LimitExceeded: There are as many as a layer may have.
    """
    if not domain:
        raise InvalidName("the domain has no name (expected: one, such as 'site-a')")
    if len(others) >= MAX_DOMAINS:
        raise LimitExceeded(
            f"the layer has {len(others)} domains (expected: at most {MAX_DOMAINS}; deleteDomain() forgets one)",
            {"limit": "domains", "value": str(MAX_DOMAINS)},
        )
    return {**others, domain: statistics}


def without_domain(others: Domains, domain: str, layer: str) -> Domains:
    """Return the sets without a domain's.

    Raises:
        InvalidName: The domain has no name, and so is the layer itself.
        LayerNotFound: The layer has no such domain.
    """
    if not domain:
        raise InvalidName("the domain has no name, and the layer's own statistics stay (expected: one it has)")
    if domain not in others:
        raise no_domain(domain, others, layer)
    return {name: each for name, each in others.items() if name != domain}


def no_domain(domain: str, others: Domains, layer: str) -> LayerNotFound:
    """Return the error for a domain that is not there."""
    names = sorted(name for name in others if name)
    listed = ", ".join(map(ascii, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return LayerNotFound(
        f"{layer} has no domain {domain!r} (expected: {'one of ' + listed if names else 'none, for it has none'}; "
        "inDomain() makes one)",
        {"domain": domain},
    )


def statistics_of(state: LayerState) -> DomainStatistics:
    """Return the statistics that a state has."""
    return DomainStatistics(state.mean, state.var, state.num_of_props, state.stats_frozen, state.merged)


def with_statistics(state: LayerState, statistics: DomainStatistics) -> LayerState:
    """Return a state with other statistics."""
    return replace(
        state,
        mean=statistics.mean,
        var=statistics.var,
        num_of_props=statistics.num_of_props,
        stats_frozen=statistics.stats_frozen,
        merged=statistics.merged,
    )
