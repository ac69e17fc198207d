"""The queue of the thread that owns a GPU: order, waits, and who may interrupt whom."""

from __future__ import annotations

import threading
import time

import pytest

from sharednorm_server.device.cuda.task_queue import TaskQueue


def test_items_come_in_the_order_in_which_they_were_put() -> None:
    tasks: TaskQueue[int] = TaskQueue()
    for number in range(100):
        tasks.put(number)
    assert [tasks.get() for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e-3])
def test_a_wait_ends_with_nothing(seconds: float) -> None:
    tasks: TaskQueue[int] = TaskQueue()
    assert tasks.get(seconds) is None
    tasks.put(1)
    assert tasks.get(seconds) == 1
    assert tasks.get(seconds) is None


def test_an_item_ends_a_wait() -> None:
    tasks: TaskQueue[float] = TaskQueue()
    timer = threading.Timer(0.05, lambda: tasks.put(1.0))
    timer.start()
    assert tasks.get() == 1.0
    timer.join()


def test_short_waits_end_on_a_busy_machine() -> None:
    """One whose time is up before it has begun, too: queue.SimpleQueue stands still for ever within a second."""
    tasks: TaskQueue[int] = TaskQueue()
    rounds = 0
    over = threading.Event()

    def work() -> None:
        nonlocal rounds
        while not over.is_set():
            tasks.put(0)
            tasks.get()
            tasks.get(1e-6)
            rounds += 1

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    before, end = -1, time.monotonic() + 2.0
    while time.monotonic() < end:
        for _ in range(20):  # takes the interpreter from the worker again and again, wherever it is
            sum(range(10_000))
        time.sleep(0.001)
    for _ in range(100):  # a worker that stands still does so from here on
        before = rounds
        time.sleep(0.05)
        if rounds > before:
            break
    assert rounds > before
    over.set()
    worker.join(10.0)
    assert not worker.is_alive()


def test_every_item_of_many_threads_comes_once() -> None:
    tasks: TaskQueue[int] = TaskQueue()
    count, threads = 2_000, 8

    def put(first: int) -> None:
        for number in range(count):
            tasks.put(first + number)

    putting = [threading.Thread(target=put, args=(index * count,)) for index in range(threads)]
    for thread in putting:
        thread.start()
    got: list[int] = []
    while len(got) < count * threads:
        item = tasks.get(5.0)
        assert item is not None
        got.append(item)
    for thread in putting:
        thread.join()
    assert sorted(got) == list(range(count * threads))
    for index in range(threads):  # of one thread in its order
        of_one = [item for item in got if item // count == index]
        assert of_one == sorted(of_one)
