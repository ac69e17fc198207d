"""How the statistics of layers have moved lately: a summary every few seconds, of those that were trained meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sharednorm.errors import SharedNormError
from sharednorm_server.layers.layer import Layer
from sharednorm_server.store.base import LayerKey

EVERY_SECONDS = 2.0
SAMPLES = 180
"""Of each layer; the oldest leave first."""
_LATELY_SECONDS = 15.0
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A layer at one moment.

    Attributes:
        when: Seconds since the epoch.
        version: Of the layer.
        tag: Of its record.
        mean: Quantiles of the running means of its channels: least, a tenth, the middle one, nine tenths, most.
        var: Those of the running variances.
    """

    when: float
    version: int
    tag: bytes
    mean: npt.NDArray[np.float32]
    var: npt.NDArray[np.float32]


class History:
    """Keeps samples of layers.

    Args:
        layers: Returns those that are alive.
        clock: Seconds since the epoch.
    """

    def __init__(self, layers: Callable[[], Sequence[Layer]], clock: Callable[[], float] = time.time) -> None:
        self._layers, self._clock = layers, clock
        self._lock = threading.Lock()
        self._samples: dict[LayerKey, deque[Sample]] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take a sample every few seconds, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def take(self) -> None:
        """Take a sample of each layer that has changed since its last one, and forget those that are gone."""
        layers = {layer.key: layer for layer in self._layers()}
        for key, layer in layers.items():
            try:
                record = layer.committed()
            except SharedNormError:  # it was deleted a moment ago
                continue
            state, now = record.state, self._clock()
            with self._lock:
                known = self._samples.setdefault(key, deque(maxlen=SAMPLES))
                if known and known[-1].tag == record.tag:
                    known[-1] = replace(known[-1], when=now)  # it rests, until now
                    continue
            if state.initialized:
                sample = Sample(now, state.version, record.tag, _quantiles(state.mean), _quantiles(state.var))
                with self._lock:
                    known.append(sample)
        with self._lock:
            for key in self._samples.keys() - layers.keys():
                del self._samples[key]

    def samples(self, key: LayerKey) -> list[Sample]:
        """Return the samples of a layer, the oldest first."""
        with self._lock:
            return list(self._samples.get(key, ()))

    def rate(self, key: LayerKey) -> float | None:
        """Return the steps a second that a layer has taken lately; None: that is not known."""
        samples = self.samples(key)
        if not samples:
            return None
        lately = [sample for sample in samples if sample.when >= samples[-1].when - _LATELY_SECONDS]
        seconds = lately[-1].when - lately[0].when
        return (lately[-1].version - lately[0].version) / seconds if seconds > 0 else 0.0

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_SECONDS):
            self._take_or_tell()

    def _take_or_tell(self) -> None:
        try:
            self.take()
        except Exception:  # noqa: BLE001 - the page lacks a sample, and the server goes on
            _log.exception("defect in the history of layers")


def _quantiles(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.full(len(QUANTILES), np.nan, np.float32)
    return np.quantile(finite, QUANTILES).astype(np.float32)
