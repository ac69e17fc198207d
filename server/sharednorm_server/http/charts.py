"""Pictures of a layer's vectors, as SVG that stands in a page and takes the page's colours."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sharednorm.errors import InvalidFile
from sharednorm_server.http.history import QUANTILES, Sample

# Drawn in colours that nothing else has, and then replaced by the page's.
_INK, _LINE, _MARK = "#010203", "#040506", "#070809"
_CLASSES = {_INK: "currentColor", _LINE: "var(--line)", _MARK: "var(--mark)"}

_STYLE = {
    "svg.fonttype": "none",  # words stay words, which can be read aloud, and need no font
    "svg.hashsalt": "sharednorm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
}

# matplotlib's settings are those of the process.
_drawing = threading.Lock()


def channels_chart(
    values: npt.NDArray[np.float32], marked: Sequence[int], title: str, *, logarithmic: bool = False
) -> str:
    """Return a picture of one value a channel; those that are marked stand out.

    Args:
        values: The values.
        marked: Channels that stand out.
        title: What they are.
        logarithmic: Whether equal distances are equal ratios; what is not above 0 is at the bottom then.
    """
    finite = np.isfinite(values)
    words = f"{title} of {values.size} channels"
    if finite.any():
        low, middle, high = np.quantile(values[finite].astype(np.float64), (0.0, 0.5, 1.0))
        words += f": from {low:.4g} to {high:.4g}, the middle one {middle:.4g}"
    if marked:
        words += "; marked: " + ", ".join(map(str, marked[:10])) + (" and more" if len(marked) > 10 else "")

    return _svg(lambda axes: _draw_channels(axes, values, marked, logarithmic=logarithmic), words)


def save_plot(path: Path, vectors: Mapping[str, npt.NDArray[np.float32]], title: str) -> None:
    """Draw vectors of one value a channel, one below the other, to a file; its extension says of which kind.

    Raises:
        InvalidFile: There is no such kind.
        OSError: The file cannot be written.
    """

    def draw(figure: Figure) -> None:
        for axes, (name, values) in zip(
            figure.subplots(len(vectors), squeeze=False).flat, vectors.items(), strict=True
        ):
            _draw_channels(axes, values, (), logarithmic=name == "var", line="#1f6feb")
            axes.set_ylabel(name)

    _save(path, (8, 2.2 * len(vectors)), title, draw)


def save_bench(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw what calls take by the size of their tensors, and how many bytes travel in a second; see `save_plot`.

    Args:
        path: The file.
        rows: Of each call and size "call", "bytes", "p50_ms", "p90_ms" and "mb_per_s".
        title: Above it.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for call in dict.fromkeys(row["call"] for row in rows):
            mine = [row for row in rows if row["call"] == call]
            sizes = [row["bytes"] / 1e6 for row in mine]
            middle, late = ([row[name] for row in mine] for name in ("p50_ms", "p90_ms"))
            (line,) = left.plot(sizes, middle, marker="o", label=call)
            left.fill_between(sizes, middle, late, color=line.get_color(), alpha=0.2, linewidth=0)
            right.plot(sizes, [row["mb_per_s"] for row in mine], marker="o", label=call)
        for axes, name in ((left, "ms: half of the calls, to nine of ten"), (right, "MB a second, there and back")):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("MB of a tensor")
            axes.set_title(name, fontsize=9)
        left.legend(frameon=False)

    _save(path, (9, 4), title, draw)


def _save(path: Path, inches: tuple[float, float], title: str, draw: Callable[[Figure], None]) -> None:
    style = {**_STYLE, **dict.fromkeys((name for name, value in _STYLE.items() if value == _INK), "black")}
    with _drawing, mpl.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=inches, layout="constrained", dpi=120)
        figure.suptitle(title.replace("$", r"\$"))
        draw(figure)
        try:
            figure.savefig(path)
        except ValueError as error:
            raise InvalidFile(f"{path} is of no kind that can be drawn (expected: .png, .svg or .pdf)") from error


def _draw_channels(
    axes: Axes, values: npt.NDArray[np.float32], marked: Sequence[int], *, logarithmic: bool, line: str = _LINE
) -> None:
    finite = np.isfinite(values)
    at = np.arange(values.size)
    plain = finite.copy()
    plain[list(marked)] = False
    size = float(np.clip(1500 / values.size, 4, 16))
    high = _as_drawn(axes, values, logarithmic=logarithmic)
    axes.scatter(at[plain], high[plain], s=size, c=line, linewidths=0)
    shown = np.array([each for each in marked if finite[each]], np.int64)
    if shown.size:
        axes.scatter(shown, high[shown], s=40, c=_MARK, marker="x", linewidths=1.5)
    axes.set_xlabel("channel")
    axes.set_xlim(-0.5, values.size - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def drift_chart(samples: Sequence[Sample], name: str, title: str, *, logarithmic: bool = False) -> str:
    """Return a picture of how the statistics of all channels have moved: the middle one, and where most are."""
    when = [datetime.fromtimestamp(sample.when, timezone.utc) for sample in samples]
    quantiles = np.array([getattr(sample, name) for sample in samples], np.float64)
    middle = quantiles[:, len(QUANTILES) // 2]
    words = (
        f"{title} over time: the middle channel went from {middle[0]:.4g} to {middle[-1]:.4g} in "
        f"{samples[-1].when - samples[0].when:.0f} seconds"
    )

    def draw(axes: Axes) -> None:
        least, tenth, middle, nine_tenths, most = _as_drawn(axes, quantiles, logarithmic=logarithmic).T
        axes.fill_between(when, least, most, color=_LINE, alpha=0.12, linewidth=0, label="all channels")  # type: ignore[arg-type]
        axes.fill_between(when, tenth, nine_tenths, color=_LINE, alpha=0.3, linewidth=0, label="four of five")  # type: ignore[arg-type]
        axes.plot(when, middle, color=_LINE, linewidth=1.5, label="the middle one")  # type: ignore[arg-type]
        locator = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S", tz=timezone.utc))  # type: ignore[no-untyped-call]
        axes.set_xlabel("time, UTC")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.16), ncols=3)

    return _svg(draw, words)


def _as_drawn(axes: Axes, values: npt.NDArray[Any], *, logarithmic: bool) -> npt.NDArray[Any]:
    above = values[np.isfinite(values) & (values > 0)]
    if not (logarithmic and above.size):
        return values
    axes.set_yscale("log")
    return np.where(values <= 0, above.min() / 10, values)


def _svg(draw: Callable[[Axes], None], words: str) -> str:
    with _drawing, mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, meaning in _CLASSES.items():
        text = text.replace(colour, meaning)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
