"""Calls in their order."""

from __future__ import annotations

import os
import threading
import time

import pytest

from sharednorm.layers.call_queue import CallQueue


def test_calls_run_one_after_the_other_in_order() -> None:
    queue, seen, running = CallQueue(), [], threading.Lock()

    def call(number: int) -> int:
        assert running.acquire(blocking=False)
        time.sleep(0.001)
        seen.append(number)
        running.release()
        return number

    futures = [queue.submit(lambda number=number: call(number)) for number in range(50)]  # type: ignore[misc]
    assert [future.result(10) for future in futures] == seen == list(range(50))


def test_settle_waits_for_what_was_submitted_before() -> None:
    queue, go_on, seen = CallQueue(), threading.Event(), []
    queue.settle()

    def call() -> None:
        go_on.wait(10)
        seen.append(1)

    queue.submit(call)
    threading.Timer(0.1, go_on.set).start()
    queue.settle()
    assert seen == [1]


def test_an_error_belongs_to_its_call() -> None:
    queue = CallQueue()
    failing, fine = queue.submit(lambda: 1 / 0), queue.submit(lambda: 7)
    queue.settle()
    with pytest.raises(ZeroDivisionError):
        failing.result(0)
    assert fine.result(0) == 7


def test_a_call_that_has_not_begun_can_be_cancelled() -> None:
    queue, go_on, seen = CallQueue(), threading.Event(), []
    first = queue.submit(lambda: go_on.wait(10))
    second = queue.submit(lambda: seen.append(2))
    assert second.cancel()
    go_on.set()
    queue.settle()
    assert first.result(0)
    assert seen == []


def test_queues_do_not_wait_for_each_other() -> None:
    meet = threading.Barrier(4)
    futures = [CallQueue().submit(lambda: meet.wait(10)) for _ in range(4)]
    assert sorted(future.result(10) for future in futures) == [0, 1, 2, 3]


def test_a_callback_may_settle_the_queue_that_it_is_in() -> None:
    queue, done = CallQueue(), threading.Event()

    def settle(_: object) -> None:
        queue.settle()
        done.set()

    queue.submit(lambda: time.sleep(0.05)).add_done_callback(settle)
    assert done.wait(10)
    queue.settle()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12's on forking with threads, which is the point
def test_a_forked_child_has_threads_of_its_own() -> None:
    queue = CallQueue()
    queue.submit(lambda: None).result(10)
    queue.settle()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(CallQueue().submit(lambda: 7).result(10))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_calls() -> None:
    queue, go_on = CallQueue(), threading.Event()
    waiting = queue.submit(lambda: go_on.wait(10))
    pid = os.fork()
    if pid == 0:
        try:
            queue.settle()
            os._exit(queue.submit(lambda: 7).result(10))
        finally:
            os._exit(1)
    end = time.monotonic() + 10
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < end, "the child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    go_on.set()
    assert waiting.result(10)
