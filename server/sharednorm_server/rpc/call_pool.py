"""The threads that run calls, and how many calls there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import grpc

from sharednorm.errors import CallCancelled, ServerUnavailable

P = ParamSpec("P")
T = TypeVar("T")

_STOPPING = "the server is stopping: try again when it, or another one, has been started"


class CallPool(ThreadPoolExecutor):
    """The threads that run calls. Knows how many calls, waiting ones included, have not ended.

    Args:
        workers: Most calls that run at a time; others wait.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="call")
        self._changed = threading.Condition()
        self._unfinished = 0  # a call that runs is counted twice: its answer may leave later
        self._calls = 0
        self._closed = False
        self._late = threading.local()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on one of the threads, and count it until it has returned."""
        late, arrived = self._closed, time.perf_counter()

        def run() -> T:
            self._late.value, self._late.arrived = late, arrived
            return fn(*args, **kwargs)

        self._count(1, calls=1)
        try:
            future = super().submit(run)
        except BaseException:
            self._count(-1, calls=-1)
            raise
        future.add_done_callback(lambda _: self._count(-1, calls=-1))
        return future

    def close(self) -> None:
        """Refuse the calls that arrive from now on; those that have arrived are run."""
        self._closed = True

    def begin_elsewhere(self) -> None:
        """Count a call that runs on another thread, until `end_elsewhere`.

        Raises:
            ServerUnavailable: It arrived after `close`.
        """
        self._count(1)
        if self._closed:
            self._count(-1)
            raise ServerUnavailable(_STOPPING)

    def end_elsewhere(self) -> None:
        """Say that such a call is over."""
        self._count(-1)

    def begin(self, context: grpc.ServicerContext) -> None:
        """Count a call until its answer has left: longer than the function that makes the answer runs.

        Raises:
            ServerUnavailable: It arrived after `close`.
            CallCancelled: It waited for a thread longer than its client did for the call.
        """
        self._count(1)
        if not context.add_callback(lambda: self._count(-1)):
            self._count(-1)
        if self._late.value:
            raise ServerUnavailable(_STOPPING)
        if not context.is_active():
            raise CallCancelled("the call was given up before it began")

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed

    @property
    def arrived(self) -> float:
        """When the call that runs on this thread came, by `time.perf_counter`."""
        arrived: float = self._late.arrived
        return arrived

    @property
    def calls(self) -> int:
        """How many calls run on these threads or wait for one."""
        return self._calls

    def wait_idle(self, timeout: float) -> bool:
        """Wait until every call has ended; return False if that took longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unfinished == 0, timeout)

    def _count(self, difference: int, calls: int = 0) -> None:
        with self._changed:
            self._unfinished += difference
            self._calls += calls
            self._changed.notify_all()
