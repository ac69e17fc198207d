"""Calls of one layer in the order in which they were made, those of several layers at the same time."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MOST_THREADS = 32
"""Calls that run at a time, of all layers of this process; others wait for a thread."""


class _Threads:
    # The threads of this process that run calls. A forked child has none of its parent's, and starts with new ones.
    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def submit(self, function: Callable[[], None]) -> None:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="sharednorm-async")
            self._executor.submit(function)

    def _forget(self) -> None:
        self._executor, self._lock = None, threading.Lock()


_threads = _Threads()
_queues: weakref.WeakSet[CallQueue] = weakref.WeakSet()


def _forget_calls() -> None:
    # Nobody in a forked child makes the calls that its parent has begun.
    for queue in list(_queues):
        queue.forget()


os.register_at_fork(after_in_child=_forget_calls)


class CallQueue:
    """The calls of one layer that wait for each other."""

    def __init__(self) -> None:
        self.forget()
        _queues.add(self)

    def forget(self) -> None:
        """Have no calls, whatever there were."""
        self._lock = threading.Lock()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = False
        self._thread = 0  # that runs them

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call behind those that were submitted before, on another thread."""
        future: Future[T] = Future()
        with self._lock:
            start = not self._running
            if start:
                _threads.submit(self._run)
            self._calls.append((future, call))
            self._running = True
        return future

    def settle(self) -> None:
        """Wait until all calls that were submitted before are over, whatever came of them."""
        if not self._running or self._thread == threading.get_ident():
            return  # the latter in a callback of a future, before the next call begins
        last: Future[None] = self.submit(lambda: None)
        last.result()

    def _run(self) -> None:
        self._thread = threading.get_ident()
        while True:
            with self._lock:
                if not self._calls:
                    self._running, self._thread = False, 0
                    return
                future, call = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whoever asks the future gets it
                future.set_exception(error)
                del future  # with the error's frames, it would hold itself
            else:
                future.set_result(result)
                del future, result
            del call


class CallQueues:
    """The queues of a hub's layers: one for all handles of a layer. Any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: weakref.WeakValueDictionary[str, CallQueue] = weakref.WeakValueDictionary()

    def of(self, uid: str) -> CallQueue:
        """Return the queue of the layer with this uid."""
        with self._lock:
            queue = self._queues.get(uid)
            if queue is None:
                queue = self._queues[uid] = CallQueue()
            return queue
