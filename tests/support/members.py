"""Members of a group, each a thread with a connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar, final

import sharednorm

T = TypeVar("T")

JOIN_SECONDS = 60.0


@final
class Members:
    """Threads that act as the members of a group.

    Args:
        address: Where the server listens.
        size: How many.
        transport: How their calls travel.
        name: The group's.
        options: Of each `Group`.
    """

    def __init__(self, address: str, size: int, transport: str, name: str, **options: Any) -> None:
        self._stack = ExitStack()
        self.hubs = [
            self._stack.enter_context(sharednorm.connect(address, transport=transport, timeout=20)) for _ in range(size)
        ]
        self.groups = [
            sharednorm.Group(name, size, **{"rank": rank, "timeout": 20.0, **options}) for rank in range(size)
        ]

    def __enter__(self) -> Members:
        """Return the members."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connections, and so leave the group."""
        self._stack.close()

    def layers(self, kind: str, maps: int, **options: Any) -> list[sharednorm.Layer]:
        """Return each member's handle of one layer."""
        return [
            getattr(hub, kind)(maps, compute="client", group=group, **options)
            for hub, group in zip(self.hubs, self.groups, strict=True)
        ]


def at_once(count: int, work: Callable[[int], T]) -> list[T | BaseException]:
    """Return what `work(0)` to `work(count - 1)` give, each in a thread of its own, or raise."""
    results: list[Any] = [TimeoutError("a member never came back")] * count

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    return results


def all_of(count: int, work: Callable[[int], T]) -> list[T]:
    """Return what each member's work gives, or raise what the first of them that failed has raised."""
    results = at_once(count, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
