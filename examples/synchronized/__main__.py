"""Four workers with tiny, uneven batches train one network on the CPU, and their batches are normalized as one.

The same network is trained three times on the same batches of eight handwritten digits: by one process that has whole
batches, which is the truth; by four processes that have one, two, two and three samples of each, with DDP over gloo,
and with PyTorch's own batch normalization, each by itself; and by the same four with `sharednorm.torch` and a group.
Then one of these is killed, and the others go on with the whole batches between them.

    make demo-torch        or        python -m examples.synchronized [--steps N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from examples.demo.processes import server
from examples.synchronized.worker import BATCH, PARTS, Task, work

PICTURE = Path("demo-output") / "synchronized.png"
WORKERS = 4
PATIENCE = 300.0
"""Seconds that one training may take."""

TOLERANCE = 0.02
"""Of the mean loss of a batch: rounding errors of float32 grow from step to step."""

_NAMES = {
    "whole": "one process, whole batches",
    "separate": "4 workers, each normalizes by itself",
    "group": "4 workers, normalized as one (sharednorm)",
}
_COLORS = {"whole": "#BBBBBB", "separate": "#D55E00", "group": "#0072B2"}


@dataclass
class Course:
    """What a training has given.

    Attributes:
        losses: Mean loss of each step's whole batch.
        workers: How many there were at each step.
        accuracy: Of the digits that were not trained with, 0 to 1.
    """

    losses: npt.NDArray[np.float64]
    workers: npt.NDArray[np.int64]
    accuracy: float = field(default=float("nan"))


def main() -> int:
    """Run the example; return 0 if the synchronized training is the truth and the separate one is not, else 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.synchronized", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each training (default: %(default)s)")
    steps = parser.parse_args().steps
    if steps < 3:
        parser.error("--steps has to be at least 3")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    killed_at = steps * 2 // 3
    with server() as (address, line):
        print(line, flush=True)
        courses = {}
        for arm, size in (("whole", 1), ("separate", WORKERS), ("group", WORKERS)):
            print(f"{_NAMES[arm]}: {steps} batches of {BATCH}, parts {PARTS[size]}", flush=True)
            courses[arm] = _train(arm, size, address, steps, killed_at if arm == "group" else None)
    draw(courses, killed_at, PICTURE)
    return _verdict(courses, killed_at, begin)


def _train(arm: str, size: int, address: str, steps: int, killed_at: int | None) -> Course:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            Task(arm, rank, size, address, steps, Path(folder), killed_at if rank == size - 1 else None)
            for rank in range(size)
        ]
        processes = [context.Process(target=work, args=(task,), daemon=True) for task in tasks]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE
        try:
            for process, task in zip(processes, tasks, strict=True):
                process.join(max(0.0, end - time.monotonic()))
                expected = 0 if task.killed_at is None else -signal.SIGKILL
                if process.exitcode != expected:
                    raise RuntimeError(f"worker {task.rank} of {arm!r} ended with {process.exitcode}, not {expected}")
        finally:
            for process in processes:
                process.kill()
                process.join(10)
        return _read(arm, size, steps, Path(folder))


def _read(arm: str, size: int, steps: int, folder: Path) -> Course:
    course = Course(np.zeros(steps), np.zeros(steps, np.int64))
    for rank in range(size):
        for line in (folder / f"{arm}-{rank}.jsonl").read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if "accuracy" in found:
                course.accuracy = found["accuracy"]
            else:
                course.losses[found["step"]] += found["loss"] / BATCH
                course.workers[found["step"]] = found["workers"]
    return course


def _verdict(courses: dict[str, Course], killed_at: int, begin: float) -> int:
    truth = courses["whole"].losses
    off = {arm: float(np.abs(course.losses - truth).max()) for arm, course in courses.items()}
    print("\nlargest difference of a step's mean loss from the truth, and accuracy at the end:")
    for arm, course in courses.items():
        print(f"  {_NAMES[arm]:42} {off[arm]:9.2g}    {course.accuracy:6.1%}")
    left = int(courses["group"].workers[-1])
    print(f"one worker was killed at step {killed_at}; {left} finished the other {len(truth) - killed_at} steps")
    right = off["group"] < TOLERANCE < off["separate"] and left == WORKERS - 1
    print("AS ONE" if right else "NOT AS ONE")
    print(f"picture: {PICTURE.resolve()}\n{time.monotonic() - begin:.1f} seconds")
    return 0 if right else 1


def draw(courses: dict[str, Course], killed_at: int, path: Path) -> None:
    """Draw the three courses, and how far two of them are from the truth."""
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=130)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    truth, places = courses["whole"].losses, np.arange(1, 1 + len(courses["whole"].losses))
    for arm, width in (("separate", 1.2), ("whole", 5.0), ("group", 1.4)):
        upper.plot(places, courses[arm].losses, color=_COLORS[arm], lw=width, label=_NAMES[arm])
    for arm in ("separate", "group"):
        difference = np.maximum(np.abs(courses[arm].losses - truth), 1e-9)
        lower.plot(places, difference, color=_COLORS[arm], lw=1.2)
    lower.set_yscale("log")
    upper.set_title(
        f"Training on handwritten digits, batches of {BATCH} as parts of {', '.join(map(str, PARTS[WORKERS]))} samples"
    )
    upper.set_ylabel("mean loss of the batch")
    lower.set_ylabel("difference from one process")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.axvline(killed_at + 0.5, color="gray", lw=1, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
    lower.annotate("one worker is killed, three go on", (killed_at + 0.5, 0.44), xycoords=("data", "axes fraction"),
                   xytext=(5, 0), textcoords="offset points", fontsize=9, color="gray")  # fmt: skip
    upper.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the processes of the example have ended", file=sys.stderr)
        sys.exit(130)
