"""The same bits for any number of threads, any number of callers, and in any process."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sharednorm.arithmetic.select import arithmetic
from sharednorm.arithmetic.thread_pool import Threads, num_threads, set_num_threads
from sharednorm.errors import InvalidConfiguration
from tests.support import oracle

EPSILON = 1e-5
# Many channels and few, rows and columns, folded samples and left-over ones, large enough for several threads.
SHAPES = (
    (40, 64, 14, 14),
    (8, 16, 56, 56),
    (2, 1, 1025, 1025),
    (3, 3, 700, 211),
    (70001, 7),
    (300, 1031),
    (1027, 127, 7),
)
WAIT = 60


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


def digest(shape: tuple[int, ...], name: str = "float32") -> str:
    """Return a hash of all that the compiled arithmetic makes of one tensor."""
    compute = arithmetic("numba")
    x, grad = oracle.random_tensor(1, shape, name), oracle.random_tensor(2, shape, name)
    scale = np.linspace(0.5, 2, shape[1]).astype(np.float32)
    y, batch = compute.forward(x, scale, scale, EPSILON)
    alone = compute.moments(x)
    again = compute.normalize(x, alone.mean, alone.biased_var, scale, scale, EPSILON)
    gradients = compute.backward(x, grad, batch, scale, EPSILON)
    result = hashlib.sha256()
    for each in (y, batch.mean, batch.m2, alone.mean, alone.m2, again, *gradients):
        assert each is not None
        result.update(each.tobytes())
    return result.hexdigest()


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...], name: str) -> None:
    found = set()
    for count in (1, 2, 3, 5, 8, 2, 1):
        set_num_threads(count)
        found.add(digest(shape, name))
    assert len(found) == 1


def test_many_callers_at_once() -> None:
    set_num_threads(3)
    wanted = {shape: digest(shape) for shape in SHAPES}
    jobs = [*SHAPES, *SHAPES, *reversed(SHAPES)]
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(digest, jobs, timeout=WAIT))
    assert found == [wanted[shape] for shape in jobs]


def test_the_number_of_threads_may_change_under_way() -> None:
    wanted = digest(SHAPES[0])
    stop = threading.Event()

    def change() -> None:
        count = 1
        while not stop.wait(0.002):
            count = count % 5 + 1
            set_num_threads(count)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(3) as callers:
            found = set(callers.map(digest, [SHAPES[0]] * 12, timeout=WAIT))
    finally:
        stop.set()
        changer.join(WAIT)
    assert found == {wanted}


def test_numpy_gives_the_same_bits_every_time() -> None:
    x = oracle.random_tensor(1, (8, 16, 56, 56))
    scale = np.ones(16, np.float32)
    first, second = (arithmetic("numpy").forward(x, scale, scale, EPSILON) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1].m2, second[1].m2)


class TestTeam:
    def test_helpers_are_waited_for_when_the_system_gives_no_more_threads(self) -> None:
        team, helping, done = Threads(), threading.Event(), []
        team.resize(3)
        team.run(lambda: None, 2)  # the first helper has started

        def work() -> None:
            if threading.current_thread() is threading.main_thread():
                assert helping.wait(WAIT)
            else:
                helping.set()
                time.sleep(0.2)
                done.append(True)

        before = threading.stack_size(1 << 50)  # no system has room for such a thread
        try:
            team.run(work, 3)
        finally:
            threading.stack_size(before)
            found = len(done)
            team.resize(1)
        assert found >= 1

    def test_what_a_helper_raises_reaches_the_caller(self) -> None:
        team, raised = Threads(), threading.Event()
        team.resize(2)

        def work() -> None:
            if threading.current_thread() is threading.main_thread():
                assert raised.wait(WAIT)
            else:
                raised.set()
                raise ArithmeticError("a helper's")

        with pytest.raises(ArithmeticError, match="a helper's"):
            team.run(work, 2)
        team.resize(1)

    def test_a_helper_that_comes_late_does_nothing(self) -> None:
        team, begun, over, calls = Threads(), threading.Barrier(3), threading.Event(), []
        team.resize(2)

        def occupy() -> None:
            begun.wait(WAIT)
            over.wait(WAIT)

        other = threading.Thread(target=team.run, args=(occupy, 2))
        other.start()
        begun.wait(WAIT)  # the other caller and the only helper are at it
        team.run(lambda: calls.append(threading.current_thread()), 2)
        over.set()
        other.join(WAIT)
        team.run(lambda: time.sleep(0.1), 2)  # the helper has been through all that it was called for
        team.resize(1)
        assert calls == [threading.main_thread()]


class TestNumber:
    def test_default_is_what_this_process_may_use(self) -> None:
        code = "from sharednorm.arithmetic.thread_pool import num_threads; print(num_threads())"
        assert 1 <= int(run(code, SHAREDNORM_NUM_THREADS="")) <= len(os.sched_getaffinity(0))

    def test_environment(self) -> None:
        code = "from sharednorm.arithmetic.thread_pool import num_threads; print(num_threads())"
        assert run(code, SHAREDNORM_NUM_THREADS="7") == "7"

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
    def test_bad_environment(self, value: str) -> None:
        code = """
            from sharednorm.errors import InvalidConfiguration
            from sharednorm.arithmetic.thread_pool import num_threads
            try:
                num_threads()
            except InvalidConfiguration as error:
                print(ascii(str(error)))
        """
        assert "SHAREDNORM_NUM_THREADS is" in run(code, SHAREDNORM_NUM_THREADS=value)

    @pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None])
    def test_bad_value(self, value: object) -> None:
        before = num_threads()
        with pytest.raises(InvalidConfiguration, match="number of threads is"):
            set_num_threads(value)  # type: ignore[arg-type]
        assert num_threads() == before


class TestProcesses:
    def test_spawned(self) -> None:
        wanted = [digest(shape) for shape in SHAPES[:2]]
        with multiprocessing.get_context("spawn").Pool(2) as processes:
            assert processes.map_async(digest, SHAPES[:2]).get(WAIT) == wanted

    def test_forked(self) -> None:
        # A process of its own, since this one has threads of other tests.
        code = """
            import os
            import signal
            import numpy as np
            from sharednorm.arithmetic.select import arithmetic
            from sharednorm.arithmetic.thread_pool import set_num_threads
            set_num_threads(3)
            x = np.random.default_rng(1).normal(size=(40, 64, 14, 14)).astype(np.float32)
            ones = np.ones(64, np.float32)
            compute = arithmetic("numba")
            y, _ = compute.forward(x, ones, ones, 1e-5)
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                again, _ = compute.forward(x, ones, ones, 1e-5)
                os._exit(0 if np.array_equal(y, again) else 1)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status))
        """
        assert run(code) == "0"

    def test_at_the_end_of_the_interpreter(self) -> None:
        code = """
            import atexit
            import numpy as np
            from sharednorm.arithmetic.select import arithmetic
            from sharednorm.arithmetic.thread_pool import set_num_threads
            set_num_threads(3)
            x = np.ones((40, 64, 14, 14), np.float32)
            atexit.register(lambda: print(arithmetic("numba").moments(x).mean.sum()))
        """
        assert run(code) == "64.0"


class TestImport:
    def test_numba_is_not_imported_until_it_is_asked_for(self) -> None:
        code = """
            import sys
            import sharednorm.arithmetic.select
            sharednorm.arithmetic.select.arithmetic("numpy")
            print("numba" in sys.modules)
            sharednorm.arithmetic.select.arithmetic("numba")
            print("numba" in sys.modules)
        """
        assert run(code).split() == ["False", "True"]

    def test_works_without_numba(self) -> None:
        code = """
            import importlib.util
            import sys
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, package=None: None if name == "numba" else find(name, package)
            sys.modules["numba"] = None
            from sharednorm.errors import InvalidConfiguration
            from sharednorm.arithmetic.select import arithmetic
            print(arithmetic().name)
            try:
                arithmetic("numba")
            except InvalidConfiguration as error:
                print(error)
        """
        lines = run(code, SHAREDNORM_ARITHMETIC="").splitlines()
        assert lines[0] == "numpy"
        assert "pip install 'sharednorm[fast]'" in lines[1]


def run(code: str, **environment: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    lines = code.strip("\n").splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip())
    text = "\n".join(line[margin:] for line in lines)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
