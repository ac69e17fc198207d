"""One worker: its part of every batch of digits, a small convolutional network, and DDP over gloo between the workers.

What the workers know of each other comes from their `sharednorm.Group`: their ranks, and that one is gone.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import sklearn.datasets
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import sharednorm
import sharednorm.torch

BATCH = 8
PARTS = {1: (8,), 2: (3, 5), 3: (1, 3, 4), 4: (1, 2, 2, 3)}
"""How many of a batch's samples each worker has, by how many workers there are."""

TRAINING = 1500
"""So many of the 1797 digits are trained with; the rest test."""

WAIT_SECONDS = 3.0
"""How long the workers wait for one that is missing."""


@dataclass(frozen=True)
class Task:
    """What a worker has to do.

    Attributes:
        arm: "whole", one process with whole batches; "separate", each worker normalizes by itself; "group".
        rank: Which worker it is.
        size: How many workers there are.
        address: Of the server.
        steps: How many.
        folder: Where the workers meet, and where they write what they have found.
        killed_at: The step at which it ends, as if its machine were gone; None: it lives.
    """

    arm: str
    rank: int
    size: int
    address: str
    steps: int
    folder: Path
    killed_at: int | None = None


def work(task: Task) -> None:
    """Train, and write the loss of each step's part and the accuracy at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if task.arm == "group":
        with sharednorm.connect(task.address) as hub:
            group = sharednorm.Group("digits", task.size, min_members=2, timeout=WAIT_SECONDS, rank=task.rank)
            model = sharednorm.torch.convert(network(), hub, prefix="digits/", group=group)
            _Run(task, model, group).train()
    else:
        _Run(task, network(), None).train()


def network() -> nn.Module:
    """Return the network, with the same weights at each call.

    It normalizes images alone: PyTorch's own layer refuses one sample of a vector, which one of the workers would have.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


class _Run:
    # A worker's training, over the losses of other workers.
    def __init__(self, task: Task, model: nn.Module, group: sharednorm.Group | None) -> None:
        digits = sklearn.datasets.load_digits()
        self._images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
        self._labels = torch.tensor(digits.target)
        self._task, self._model, self._group = task, model, group
        self._rank, self._size = task.rank, task.size
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self._parallel = model

    def train(self) -> None:
        task = self._task
        order = np.random.default_rng(0).permutation(np.tile(np.arange(TRAINING), 1 + task.steps * BATCH // TRAINING))
        self._meet()
        with (task.folder / f"{task.arm}-{task.rank}.jsonl").open("w", buffering=1) as results:
            step = 0
            while step < task.steps:
                if step == task.killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    loss = self._step(order[step * BATCH : (step + 1) * BATCH])
                except (sharednorm.GroupAborted, RuntimeError) as error:
                    # A worker is missing: the group says so, or DDP, whose connections to it broke.
                    if self._group is None:
                        raise
                    self._meet_again(error)
                    continue
                results.write(json.dumps({"step": step, "loss": loss, "workers": self._size}) + "\n")
                step += 1
            if self._rank == 0:
                results.write(json.dumps({"accuracy": self._accuracy()}) + "\n")
        self._part()

    def _step(self, indices: Any) -> float:
        """Return the summed loss of this worker's part of a batch."""
        parts = PARTS[self._size]
        begin = sum(parts[: self._rank])
        mine = indices[begin : begin + parts[self._rank]]
        self._optimizer.zero_grad()
        loss = cross_entropy(self._parallel(self._images[mine]), self._labels[mine], reduction="sum")
        # DDP takes the average over the workers; the gradient is to be that of the mean over the whole batch.
        (loss * self._size / BATCH).backward()
        self._optimizer.step()
        return float(loss.detach())

    def _accuracy(self) -> float:
        self._model.eval()
        with torch.no_grad():
            found = self._model(self._images[TRAINING:]).argmax(dim=1)
        return float((found == self._labels[TRAINING:]).double().mean())

    def _meet(self) -> None:
        """Form the process group of DDP, of those that are there."""
        task, generation = self._task, 1
        if self._group is not None:
            self._group.join()
            self._rank, self._size = cast("int", self._group.rank), cast("int", self._group.members)
            generation = cast("int", self._group.generation)
        if task.size == 1:
            return
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{task.folder.resolve()}/{task.arm}-{generation}",
            rank=self._rank,
            world_size=self._size,
        )
        self._parallel = DistributedDataParallel(self._model)

    def _meet_again(self, why: Exception) -> None:
        assert self._group is not None
        said = "the group" if isinstance(why, sharednorm.GroupAborted) else "gloo"
        print(f"worker {self._task.rank}: {said} says that a worker is gone; meeting again", flush=True)
        self._part()
        self._group.leave()
        self._meet()

    def _part(self) -> None:
        if torch.distributed.is_initialized():
            self._parallel = self._model
            torch.distributed.destroy_process_group()
