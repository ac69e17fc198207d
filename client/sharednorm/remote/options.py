"""How a handle deals with tensors: where they are computed with, what travels, and with whose they are normalized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sharednorm.codec.half_precision import wire_dtype_of
from sharednorm.coordination.group import Group
from sharednorm.coordination.push_queue import DEFAULT_MAX_PENDING, MOST_PENDING
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_SECONDS
from sharednorm.core.validation import is_finite, is_integer
from sharednorm.errors import InvalidConfiguration
from sharednorm.remote.backends.async_push import AsyncComputeBackend
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.backends.group_compute import GroupComputeBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.context import HubContext
from sharednorm.v1 import layer_pb2


@dataclass(frozen=True)
class HandleOptions:
    """The checked options of a handle.

    Attributes:
        here: Whether tensors stay in this process.
        max_staleness: Seconds for which evaluation may use a cached state.
        wire_dtype: What float32 tensors travel in; None: as they are.
        group: With whose batches this handle's are normalized; None: by themselves.
        max_pending: How many steps training may be ahead of the server; None: not at all.
    """

    here: bool
    max_staleness: float
    wire_dtype: np.dtype[Any] | None
    group: Group | None
    max_pending: int | None

    @classmethod
    def parse(
        cls,
        compute: object,
        max_staleness: object,
        wire_dtype: object,
        group: object,
        push: object = "sync",
        max_pending: object = None,
    ) -> HandleOptions:
        """Check the options.

        Raises:
            InvalidConfiguration: One is out of its range, or does not go with another.
        """
        if compute not in {"server", "client"}:
            raise InvalidConfiguration(f"compute is {ascii(compute)[:60]} (expected: 'server' or 'client')")
        if not (is_finite(max_staleness) and 0 <= max_staleness <= MAX_SECONDS):
            raise InvalidConfiguration(
                f"max_staleness is {ascii(max_staleness)[:60]} (expected: a finite number of seconds, 0 to "
                f"{MAX_SECONDS:g})"
            )
        here, narrow = compute == "client", wire_dtype_of(wire_dtype)
        if here and narrow is not None:
            raise InvalidConfiguration(
                "with compute='client' no tensor travels, in whatever wire_dtype (expected: None)"
            )
        if max_staleness and not here:
            raise InvalidConfiguration(
                "max_staleness is given, and with compute='server' a handle caches nothing (expected: 0)"
            )
        if group is not None and not isinstance(group, Group):
            raise InvalidConfiguration(f"group is {ascii(group)[:60]} (expected: a sharednorm.Group, or None)")
        if group is not None and not here:
            raise InvalidConfiguration(
                "group is given with compute='server' (expected: compute='client', by which members keep their tensors)"
            )
        return cls(
            here, float(max_staleness), narrow, group, _ahead(push, max_pending, here=here, together=group is not None)
        )

    @property
    def train(self) -> bool | None:
        """The mode that a handle begins in: train if the server cannot be asked at each step; None: the layer's."""
        return None if self.group is None and self.max_pending is None else True

    def backend(self, context: HubContext, ref: layer_pb2.LayerRef, config: LayerConfig) -> RemoteBackend:
        """Return what does so for a layer."""
        if self.max_pending is not None:
            return AsyncComputeBackend(context, ref, config, self.max_staleness, self.max_pending)
        if self.group is not None:
            return GroupComputeBackend(context, ref, config, self.max_staleness, self.group)
        if self.here:
            return ClientComputeBackend(context, ref, config, self.max_staleness)
        return RemoteBackend(context, ref, config, self.wire_dtype)


def _ahead(push: object, max_pending: object, *, here: bool, together: bool) -> int | None:
    if not isinstance(push, str) or push not in {"sync", "async"}:
        raise InvalidConfiguration(f"push is {ascii(push)[:60]} (expected: 'sync' or 'async')")
    if push == "sync":
        if max_pending is not None:
            raise InvalidConfiguration(
                "max_pending is given, and with push='sync' no step is ever pending (expected: None)"
            )
        return None
    if not here:
        raise InvalidConfiguration(
            "push='async' is given with compute='server', where each output comes from the server (expected: "
            "compute='client', or push='sync')"
        )
    if together:
        raise InvalidConfiguration(
            "push='async' is given with a group, whose members need each other's moments (expected: push='sync')"
        )
    if max_pending is None:
        return DEFAULT_MAX_PENDING
    if not (is_integer(max_pending) and 1 <= max_pending <= MOST_PENDING):
        raise InvalidConfiguration(
            f"max_pending is {ascii(max_pending)[:60]} (expected: an integer, 1 to {MOST_PENDING}; or None for "
            f"{DEFAULT_MAX_PENDING})"
        )
    return int(max_pending)
