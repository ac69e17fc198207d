"""The threads that the compiled kernels run on: how many, and who runs them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
        calls = self._submit(work, count - 1)
        try:
            work()
        finally:
            # Memory that work writes to must not be given up while a helper still writes.
            running = [call for call in calls if not call.cancel()]
            errors = [call.exception() for call in running]
        for error in errors:
            if error is not None:
                raise error

    def _submit(self, work: Callable[[], None], helpers: int) -> list[Future[None]]:
        with self._lock:
            if self._helpers is None:
                self._helpers = ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="sharednorm")
            try:
                return [self._helpers.submit(work) for _ in range(helpers)]
            except RuntimeError:
                # The interpreter is shutting down and takes no new work; the caller does all of it.
                return []

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._helpers = None


def _default_count() -> int:
    wanted = os.environ.get(THREADS_VARIABLE)
    if wanted:
        if not wanted.isascii() or not wanted.isdigit() or int(wanted) < 1:
            raise InvalidConfiguration(f"{THREADS_VARIABLE} is {wanted!r} (expected: an integer, at least 1)")
        return int(wanted)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _quota(usable)))


def _quota(usable: int) -> int:
    # A container may be given less time than the processors that it sees: cgroup v2, "max" or microseconds a period.
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return usable  # no cgroup v2 here
    return usable if allowed == "max" else math.ceil(int(allowed) / int(period))
