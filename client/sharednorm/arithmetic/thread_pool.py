"""The threads that the compiled kernels run on: how many, and who runs them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sharednorm.errors import InvalidConfiguration

THREADS_VARIABLE = "SHAREDNORM_NUM_THREADS"


class Threads:
    """A team of threads that any number of callers may use at once; a caller is one of its own team.

    The helpers start with the first work that needs them. A forked child has none of its parent's threads, so
    it starts with helpers of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count: int | None = None
        self._helpers: ThreadPoolExecutor | None = None
        os.register_at_fork(after_in_child=self._forget)

    @property
    def count(self) -> int:
        """Threads that one piece of work may use, the caller's included.

        Raises:
            InvalidConfiguration: The environment names a number below 1, or none.
        """
        if self._count is None:
            self._count = _default_count()
        return self._count

    def resize(self, count: int) -> None:
        """Set the number of threads, for work that begins from now on.

        Raises:
            InvalidConfiguration: It is not an integer of at least 1.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InvalidConfiguration(f"the number of threads is {count!r} (expected: an integer, at least 1)")
        with self._lock:
            helpers, self._helpers, self._count = self._helpers, None, count
        if helpers is not None:
            helpers.shutdown(wait=False)

    def run(self, work: Callable[[], None], count: int) -> None:
        """Call `work` in the caller's thread and in up to `count` - 1 others; return when all calls have.

        `work` shares out what there is to do among its calls, and returns when nothing is left. So a helper that
        has not begun by the time the caller is done is not needed any more.
        """
        if count == 1:
            work()
            return
        team = _Team(work)
        self._call_for(team, count - 1)
        try:
            work()
        finally:
            # Memory that work writes to must not be given up while a helper still writes.
            errors = team.close()
        for error in errors:
            raise error

    def _call_for(self, team: _Team, helpers: int) -> None:
        with self._lock:
            if self._helpers is None:
                self._helpers = ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="sharednorm")
            try:
                for _ in range(helpers):
                    self._helpers.submit(team.help)
            except RuntimeError:
                # The interpreter is shutting down, or the system gives no more threads: those that were called,
                # and the caller, do all of it. (A call that could not be made may still come, once a helper is free.)
                return

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._helpers = None


class _Team:
    """The helpers of one piece of work: how many are at it, and whether more may begin."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work  # None once nobody may begin any more
        self._running = 0
        self._errors: list[BaseException] = []
        self._changed = threading.Condition()

    def help(self) -> None:
        """Do the work, unless the team is closed already."""
        with self._changed:
            work = self._work
            if work is None:
                return
            self._running += 1
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self._errors.append(error)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> list[BaseException]:
        """Let nobody begin any more, wait for those who have, and return what they raised."""
        with self._changed:
            self._work = None
            self._changed.wait_for(lambda: self._running == 0)
        return self._errors


def _default_count() -> int:
    wanted = os.environ.get(THREADS_VARIABLE)
    if wanted:
        if not wanted.isascii() or not wanted.isdigit() or int(wanted) < 1:
            raise InvalidConfiguration(f"{THREADS_VARIABLE} is {wanted!r} (expected: an integer, at least 1)")
        return int(wanted)
    return processors()


def processors() -> int:
    """Return how many processors this process may use, at least 1: those that it may run on, within its quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _quota(usable)))


def _quota(usable: int) -> int:
    # A container may be given less time than the processors that it sees: cgroup v2, "max" or microseconds a period.
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return usable  # no cgroup v2 here
    return usable if allowed == "max" else math.ceil(int(allowed) / int(period))


threads = Threads()
"""The one team of this process; what NumPy computes does not use it."""


def num_threads() -> int:
    """Return how many threads one call of the compiled arithmetic uses.

    By default as many as this process may use processors; the environment variable SHAREDNORM_NUM_THREADS
    sets another number. No result depends on it.

    Raises:
        InvalidConfiguration: SHAREDNORM_NUM_THREADS is not an integer of at least 1.
    """
    return threads.count


def set_num_threads(count: int) -> None:
    """Set how many threads one call of the compiled arithmetic uses, the caller's included.

    Raises:
        InvalidConfiguration: It is not an integer of at least 1.
    """
    threads.resize(count)
