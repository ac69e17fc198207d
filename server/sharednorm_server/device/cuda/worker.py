"""The thread that owns a GPU. Other threads hand it tasks and get futures; they never see an object of PyCUDA.

PyCUDA's contexts belong to threads: an object that another thread lets go of leaks, and a thread that ends inside a
context takes the process with it. So one thread has them all. It puts work into streams and goes on; a future gets its
result when the event behind that work has come.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pycuda.driver as cuda

from sharednorm.errors import DeviceLost, SharedNormError
from sharednorm_server.device.base import DeviceFault
from sharednorm_server.device.cuda.context import Gpu, Mark, out_of_memory
from sharednorm_server.device.cuda.task_queue import TaskQueue

T = TypeVar("T")
Task = Callable[[Gpu], None]

# While something is under way: events are asked for at once for a while, since small work is done soon, then with
# pauses that a new task ends.
_EAGER_SECONDS = 200e-6
_PAUSE_SECONDS = 50e-6

# What a close waits for work that is under way, before it lets the process end as it stands.
_CLOSE_SECONDS = 10.0
_ASLEEP_SECONDS = 0.05

_log = logging.getLogger(__name__)


def _end(_gpu: Gpu) -> None:
    """The last task, which is not run: the thread ends."""


@dataclass(frozen=True)
class Issued(Generic[T]):
    """Work that is in the streams.

    Attributes:
        mark: The place behind it.
        value: What its future gets when the GPU is there.
    """

    mark: Mark
    value: T


@dataclass(frozen=True)
class _Flight:
    event: Any
    land: Callable[[], None]
    fail: Callable[[Exception], None]
    keep: object  # the memory that the work needs until then, by those who hold it


class CudaWorker:
    """Runs tasks on one GPU, in the order in which they are handed in.

    Args:
        name: What it is called, such as "cuda:0".
        open_gpu: Makes the GPU ready; called on the thread, with `post`.

    Raises:
        Exception: What `open_gpu` raises.
    """

    def __init__(self, name: str, open_gpu: Callable[[Callable[[Task], None]], Gpu]) -> None:
        self._name = name
        self._tasks: TaskQueue[Task] = TaskQueue()
        self._flights: dict[str, deque[_Flight]] = {}  # of each stream, in the order of their events
        self._flown = 0.0
        self._lost: str | None = None
        self._closed = False
        self._gate = threading.Lock()  # between the last tasks and the end
        self._done = threading.Event()
        self._callbacks: list[Callable[[str], None]] = []
        self._callbacks_lock = threading.Lock()
        self._untold: list[Callable[[str], None]] = []
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(open_gpu, opened), name=name, daemon=True)
        self._thread.start()
        opened.result()

    def submit(self, task: Callable[[Gpu], Issued[T]]) -> Future[T]:
        """Have a task put work into the streams; the future gets its value when the GPU has done that work.

        The future raises DeviceOutOfMemory, DeviceLost, DeviceFault, or the task's own typed error.
        """
        future: Future[T] = Future()

        def run(gpu: Gpu) -> None:
            issued = self._attempt(gpu, lambda: task(gpu), future)
            if issued is not None:
                self._fly(issued, future, (task, gpu.take_held()))

        self._hand_in(run)
        return future

    def call(self, task: Callable[[Gpu], T]) -> T:
        """Run a task that puts nothing into a stream, and return its result."""
        future: Future[T] = Future()

        def run(gpu: Gpu) -> None:
            result = self._attempt(gpu, lambda: (task(gpu),), future, settle=False)
            if result is not None:  # a tuple, so that a task may return None
                future.set_result(result[0])

        self._hand_in(run)
        return future.result()

    def _hand_in(self, run: Task) -> None:
        with self._gate:
            if self._closed:
                raise RuntimeError(f"{self._name} has been closed")
            self._tasks.put(run)

    def post(self, task: Task) -> None:
        """Run a task some time, from wherever this is called; if it fails, the log says so."""

        def run(gpu: Gpu) -> None:
            self._attempt(gpu, lambda: task(gpu), Future(), settle=False)

        if not self._closed:  # as the process ends, objects go, and nothing may wake the thread any more
            self._tasks.put(run)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the GPU has failed for good; it gets the reason."""
        with self._callbacks_lock:
            self._callbacks.append(callback)
            lost = self._lost
        if lost is not None:
            callback(lost)

    @property
    def lost(self) -> bool:
        """Whether the GPU has failed for good."""
        return self._lost is not None

    def close(self) -> None:
        """Do what has been handed in, give the GPU back, and end the thread. A lost GPU stays as it is."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._tasks.put(_end)
        self._done.wait(_CLOSE_SECONDS)
        if self.lost:
            # The thread stays, and must be asleep for good before the interpreter ends, which ends threads that wake.
            time.sleep(_ASLEEP_SECONDS)
        else:
            self._thread.join(_ASLEEP_SECONDS)

    def abandon(self) -> None:
        """Take no more tasks, and leave everything as it is: somebody still uses memory of the GPU's thread."""
        with self._gate:
            self._closed = True

    # --- On the thread ------------------------------------------------------------------------------

    def _run(self, open_gpu: Callable[[Callable[[Task], None]], Gpu], opened: Future[None]) -> None:
        try:
            gpu = open_gpu(self.post)
        except Exception as error:  # noqa: BLE001 - whoever waits for the GPU gets it
            # Without the frames and the errors behind it, which hold objects of PyCUDA.
            error.__cause__ = error.__context__ = None
            opened.set_exception(error.with_traceback(None))
            return
        opened.set_result(None)
        while self._turn(gpu):
            pass
        while self._land(gpu):
            pass
        if self._lost is None:
            try:
                gpu.close()
            except cuda.Error as error:
                self._lose(gpu, error)
        self._tell()
        self._done.set()
        if self._lost is not None:
            # A lost context cannot be left in order, and a thread that ends inside one takes the process with it.
            queue.SimpleQueue().get()

    def _turn(self, gpu: Gpu) -> bool:
        # A function of its own: an idle thread holds no task, and so nothing that a task held.
        task = self._next(gpu)
        if task is _end:
            return False
        task(gpu)
        return True

    def _next(self, gpu: Gpu) -> Task:
        while True:
            under_way = self._land(gpu)
            self._tell()
            eager = time.monotonic() - self._flown < _EAGER_SECONDS
            task = self._tasks.get(None if not under_way else 0.0 if eager else _PAUSE_SECONDS)
            if task is not None:
                return task

    def _attempt(self, gpu: Gpu, attempt: Callable[[], T], future: Future[Any], *, settle: bool = True) -> T | None:
        """Run a part of a task; if it fails, give the future what that means and return None.

        The one place that says what a task's status means. The error that the future gets has no frames behind it: they
        would keep what they hold of the GPU alive, and have another thread let go of it.
        """
        if self._lost is not None:
            future.set_exception(self._lost_error())
            return None
        failure: Exception
        try:
            return attempt()
        except SharedNormError as error:
            failure = error.with_traceback(None)
            failure.__context__ = None
        except cuda.Error as error:
            failure = self._meaning(gpu, error)
        except Exception:  # noqa: BLE001 - a defect must not end the thread
            _log.error("a defect in a task of %s: %s", self._name, traceback.format_exc())
            failure = DeviceFault(f"a task of {self._name} failed; the log has the details")
        if settle:
            self._settle(gpu)
        future.set_exception(failure)
        return None

    def _meaning(self, gpu: Gpu, error: Exception) -> Exception:
        if isinstance(error, cuda.MemoryError):
            return out_of_memory(gpu.name, "its memory is full")
        if self._works(gpu):
            # As a text: whoever keeps the record would keep the frames, and with them objects of PyCUDA.
            _log.error("%s refused a call: %s", self._name, "".join(traceback.format_exception(error)))
            return DeviceFault(f"{self._name} refused a call: {error}")
        self._lose(gpu, error)
        return self._lost_error()

    def _works(self, gpu: Gpu) -> bool:
        # An error that stays is told by every later call too.
        try:
            gpu.synchronize()
        except cuda.Error:
            return False
        return True

    def _settle(self, gpu: Gpu) -> None:
        # What a failed task had already put into the streams still uses its memory.
        if self._lost is None:
            try:
                gpu.synchronize()
            except cuda.Error as error:
                self._lose(gpu, error)
        gpu.take_held()

    def _fly(self, issued: Issued[T], future: Future[T], keep: object) -> None:
        flight = _Flight(issued.mark.event, lambda: future.set_result(issued.value), future.set_exception, keep)
        self._flights.setdefault(issued.mark.stream, deque()).append(flight)
        self._flown = time.monotonic()

    def _land(self, gpu: Gpu) -> bool:
        """Give the futures of work that is done their results; return whether any is still under way."""
        if self._lost is None:
            try:
                for flights in self._flights.values():
                    while flights and flights[0].event.query():
                        flights.popleft().land()
            except cuda.Error as error:
                self._lose(gpu, error)
        return any(self._flights.values())

    def _lose(self, gpu: Gpu, error: Exception) -> None:
        reason = f"{gpu.name} has failed: {error}"
        _log.critical("%s; this process can use it no more", reason)
        with self._callbacks_lock:
            self._lost = reason
            self._untold = list(self._callbacks)
        for flights in self._flights.values():
            while flights:
                flights.popleft().fail(self._lost_error())

    def _tell(self) -> None:
        """Tell those who asked that the GPU is lost, once every call has heard of it."""
        untold, self._untold = self._untold, []
        for callback in untold:
            try:
                callback(str(self._lost))
            except Exception:  # noqa: BLE001, PERF203 - the others are to hear of it, and the thread is to live on
                _log.exception("somebody who was told that %s is lost failed", self._name)

    def _lost_error(self) -> DeviceLost:
        return DeviceLost(f"{self._lost}; nothing was changed, and the server ends: try again when it is back")
