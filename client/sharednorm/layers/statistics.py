"""Statistics that are gathered without a layer, and merged into one later, each part of them once."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from sharednorm.arithmetic.formulas import merge
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.dtypes import check_dtype
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_MAPS
from sharednorm.core.state import Moments, refuse_nonfinite
from sharednorm.core.types import Array, LayerKind
from sharednorm.core.validation import is_integer
from sharednorm.errors import InvalidConfiguration, InvalidShape

__all__ = ["Statistics", "StatisticsDelta"]

_ID_BYTES = 16


@dataclass(frozen=True, eq=False)
class StatisticsDelta:
    """What `Statistics` have gathered since the last one; it can be pickled, sent, and merged into a layer once.

    Attributes:
        id: Its name, which no other has: a layer that has taken it in takes it in no more.
        count: Values per channel.
        mean: Their mean, float64 (C,).
        m2: Sum of their squared deviations from it, float64 (C,).
    """

    id: bytes
    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @property
    def moments(self) -> Moments:
        """The moments of all values together."""
        return Moments(self.count, self.mean, self.m2)


@final
class Statistics:
    """Moments per channel of batches that no layer has seen: of data on another machine, say, or of a whole epoch.

    `take` gives what has come since it was last called, as a delta; `bn.mergeStats(delta)` takes that into a layer's
    running statistics, once, however often it is sent. So a worker that sends what it has every now and then, and again
    when an answer was lost, counts nothing twice. Any number of threads may use it.

    Args:
        maps: Channels, C.

    Raises:
        InvalidConfiguration: That is not an integer of at least 1, or more than a layer has.
    """

    def __init__(self, maps: int) -> None:
        if not is_integer(maps) or not 1 <= maps <= MAX_MAPS:
            raise InvalidConfiguration(f"maps is {ascii(maps)[:60]} (expected: an integer, 1 to {MAX_MAPS})")
        self._maps = int(maps)
        self._lock = threading.Lock()
        self._total: Moments | None = None
        self._untaken: Moments | None = None

    def __repr__(self) -> str:
        """Say how much there is."""
        return f"<Statistics of {self._maps} maps, {self.count} values each>"

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle what was gathered."""
        with self._lock:
            return {"_maps": self._maps, "_total": self._total, "_untaken": self._untaken}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Go on with what was gathered."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Values per channel, of all batches."""
        return 0 if self._total is None else self._total.count

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean of all values, float64 (C,); 0 before there are any."""
        return np.zeros(self._maps) if self._total is None else self._total.mean.copy()

    @property
    def var(self) -> npt.NDArray[np.float64]:
        """Unbiased variance of all values, float64 (C,); 1 before there are two a channel."""
        total = self._total
        return np.ones(self._maps) if total is None or total.count < 2 else total.unbiased_var

    def add(self, batch: Array) -> None:
        """Take in a batch.

        Args:
            batch: float32, float16 or bfloat16; (N, C) and any number of further axes, up to three. Empty: nothing.

        Raises:
            InvalidShape: Another number of axes or maps.
            UnsupportedDType: Not a NumPy array, or another element type.
            NonFiniteInput: A NaN or an infinity; nothing was taken in.
        """
        x = np.asarray(batch)
        kinds = {kind.rank: kind for kind in LayerKind}
        if x.ndim not in kinds:
            raise InvalidShape(f"the batch has {x.ndim} axes (expected: {', '.join(map(str, sorted(kinds)))})")
        LayerConfig(kinds[x.ndim], self._maps).check_shape(x.shape, train=True, together=True)
        check_dtype(x.dtype)
        if x.size == 0:
            return
        found = arithmetic().moments(x)
        with np.errstate(over="ignore", invalid="ignore"):
            refuse_nonfinite(found)
        self._take_in(found)

    def merge(self, other: Statistics | StatisticsDelta) -> None:
        """Take in what others have gathered.

        Raises:
            InvalidShape: They have another number of maps.
        """
        with other._lock if isinstance(other, Statistics) else threading.Lock():
            found = other._total if isinstance(other, Statistics) else other.moments
        if found is None:
            return
        if found.mean.shape != (self._maps,):
            raise InvalidShape(f"the statistics are of {found.mean.size} maps (expected: {self._maps})")
        self._take_in(found)

    def take(self) -> StatisticsDelta | None:
        """Return what has come since this was last called; None if there is nothing, or one value a channel."""
        with self._lock:
            untaken = self._untaken
            if untaken is None or untaken.count < 2:
                return None
            self._untaken = None
        return StatisticsDelta(secrets.token_bytes(_ID_BYTES), untaken.count, untaken.mean, untaken.m2)

    def _take_in(self, found: Moments) -> None:
        with self._lock:
            self._total = found if self._total is None else merge([self._total, found])
            self._untaken = found if self._untaken is None else merge([self._untaken, found])
