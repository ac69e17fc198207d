"""What the demo shows at its end: a table to print, and a picture of the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from examples.demo.processes import Reading
from examples.demo.shards import BATCH_SIZE, CHANNELS, DIGITS, PHOTOS, Shard, Statistics

# Okabe and Ito's colors, which also people who see few colors can tell apart.
WORKER_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
CHANNEL_COLORS = {DIGITS: ("#000000", "#D55E00", "#56B4E9", "#999933"), PHOTOS: ("#CC3311", "#228833", "#4477AA")}
EXPLANATION = {DIGITS: "four feature maps of handwritten digits", PHOTOS: "three colors of photographs"}


@dataclass(frozen=True)
class Outcome:
    """The statistics of one layer, from every side.

    Attributes:
        layer: Its name.
        alone: Of each worker's shard by itself.
        together: Of all shards, computed in float64 by NumPy alone.
        shared: What the server holds.
        steps: How many steps the server counts.
        batches: How many batches each shard has.
    """

    layer: str
    alone: list[Statistics]
    together: Statistics
    shared: Statistics
    steps: int
    batches: list[int]

    @property
    def difference(self) -> float:
        """Largest difference of what is shared from what is true, relative to the truth."""
        pairs = ((self.shared.mean, self.together.mean), (self.shared.var, self.together.var))
        return max(float(np.max(np.abs(found - true) / np.abs(true))) for found, true in pairs)

    @property
    def spread(self) -> float:
        """The same for what is alone: how far off the shard is that is off most."""
        return max(
            float(np.max(np.abs(found - true) / np.abs(true)))
            for shard in self.alone
            for found, true in ((shard.mean, self.together.mean), (shard.var, self.together.var))
        )


def table(outcome: Outcome) -> str:
    """Return the statistics of one layer as a table of at most 80 columns."""
    channels = CHANNELS[outcome.layer]
    width = 7 * len(channels)
    names = "".join(f"{channel:>7}" for channel in channels)
    rows = [
        *(
            (f"worker {i} alone", n, own)
            for i, (n, own) in enumerate(zip(outcome.batches, outcome.alone, strict=True), 1)
        ),
        ("on the server", outcome.steps, outcome.shared),
        ("all data", sum(outcome.batches), outcome.together),
    ]
    lines = [
        f"{outcome.layer}: {EXPLANATION[outcome.layer]}, {BATCH_SIZE[outcome.layer]} images a batch",
        f"{'':14}{'':5}{'mean':>{width}}   {'variance':>{width}}".rstrip(),
        f"{'':14}{'steps':>5}{names}   {names}",
    ]
    for label, number, statistics in rows:
        if label == "on the server":
            lines.append("-" * (22 + 2 * width))
        values = ("".join(f"{value:7.4f}" for value in side) for side in (statistics.mean, statistics.var))
        lines.append(f"{label:14}{number:5}" + "   ".join(values))
    return "\n".join(lines)


def draw(
    outcomes: list[Outcome], shards: list[Shard], readings: list[Reading], killed_at: dict[str, int], path: Path
) -> None:
    """Write a picture: the shards, the statistics, and how the shared ones came about."""
    figure = Figure(figsize=(13, 9.6), layout="constrained", dpi=110)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[1, 2.8]))
    top.suptitle("Four workers, four different shards", fontsize=13, fontweight="bold")
    _draw_shards(top, shards)
    bottom.suptitle("One layer of each name, on one server", fontsize=13, fontweight="bold")
    axes = bottom.subplots(2, 3, width_ratios=[1, 1, 1.5])
    for (mean, var, course), outcome in zip(axes, outcomes, strict=True):
        _draw_statistics(mean, outcome, "mean")
        _draw_statistics(var, outcome, "variance")
        own = [reading for reading in readings if reading.layer == outcome.layer]
        _draw_course(course, outcome, own, killed_at[outcome.layer])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_shards(figure: SubFigure, shards: list[Shard]) -> None:
    parts = np.asarray(figure.subfigures(1, len(shards)))
    for part, shard, color in zip(parts, shards, WORKER_COLORS, strict=True):
        counts = f"{len(shard.batches[DIGITS])} + {len(shard.batches[PHOTOS])} batches"
        part.suptitle(f"{shard.name}: {counts}\ndigits {shard.digits}; {shard.photo}", color=color, fontsize=10)
        for axes, layer in zip(part.subplots(1, 2), (DIGITS, PHOTOS), strict=True):
            axes.imshow(_mosaic(shard.samples[layer]), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")


def _mosaic(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return nine images as a square of three by three with white between them; gray ones dark on light."""
    dark = 1 - images if images.ndim == 3 else images
    border = [(0, 0), *[(0, max(1, images.shape[1] // 8))] * 2, *[(0, 0)] * (images.ndim - 3)]
    framed = np.pad(dark, border, constant_values=1)
    rows = [np.concatenate(list(framed[i : i + 3]), axis=1) for i in (0, 3, 6)]
    return np.concatenate(rows, axis=0)


def _draw_statistics(axes: Axes, outcome: Outcome, what: str) -> None:
    def side(statistics: Statistics) -> npt.NDArray[np.float64]:
        return statistics.mean if what == "mean" else statistics.var

    places = np.arange(len(CHANNELS[outcome.layer]))
    axes.bar(places, side(outcome.together), width=0.8, color="#DDDDDD", label="all data together (float64)")
    for index, (own, color) in enumerate(zip(outcome.alone, WORKER_COLORS, strict=True)):
        axes.plot(places + (index - 1.5) * 0.16, side(own), "o", color=color, ms=6, label=f"worker {index + 1} alone")
    axes.hlines(
        side(outcome.shared), places - 0.32, places + 0.32, color="black", lw=2.2, label="shared, on the server"
    )
    axes.set_xticks(places, CHANNELS[outcome.layer])
    axes.set_title(f"{outcome.layer}: {what}", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_course(axes: Axes, outcome: Outcome, readings: list[Reading], killed_at: int) -> None:
    numbers = [reading.number for reading in readings]
    colors = CHANNEL_COLORS[outcome.layer]
    for index, (channel, color) in enumerate(zip(CHANNELS[outcome.layer], colors, strict=True)):
        axes.axhline(outcome.together.mean[index], color=color, lw=1, ls=":")
        axes.plot(numbers, [reading.mean[index] for reading in readings], ".-", color=color, lw=1.2, label=channel)
    axes.axvline(killed_at, color="gray", lw=1)
    axes.annotate("a worker is killed and replaced", (killed_at, 0.2), xycoords=("data", "axes fraction"),
                  xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color="gray")  # fmt: skip
    axes.set_title(f"{outcome.layer}: shared mean as the evaluator saw it (dotted: all data)", fontsize=10)
    axes.set_xlabel("steps of the layer")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize=8, ncols=len(colors), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
