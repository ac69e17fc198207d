"""Which channels of a layer look as if something had gone wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharednorm_server.store.base import LayerRecord

DEAD_SHARE = 1e-6
"""A channel is dead if it varies so much less than the middle one of its layer, or not above the layer's epsilon."""
EXPLODING_SHARE = 1e6
"""A channel explodes if it varies so much more than the middle one, or if it has what is no finite number."""


@dataclass(frozen=True)
class Health:
    """What stands out among a layer's channels.

    Attributes:
        dead: Those that hardly vary, or whose scale is 0: nothing comes out of them but their bias.
        exploding: Those that vary far more than the others, or have no finite numbers.
    """

    dead: tuple[int, ...] = ()
    exploding: tuple[int, ...] = ()


def health_of(record: LayerRecord) -> Health:
    """Return what stands out; of a layer that has learned nothing yet, nothing does."""
    state = record.state
    if not state.initialized or not state.num_of_props:
        return Health()
    mean, var, scale, bias = (np.asarray(each, np.float64) for each in (state.mean, state.var, state.scale, state.bias))
    finite = np.isfinite(mean) & np.isfinite(var) & np.isfinite(scale) & np.isfinite(bias)
    middle = float(np.median(var[finite])) if finite.any() else 0.0
    with np.errstate(invalid="ignore"):  # of what is no number the next line decides
        dead = finite & ((var <= max(middle * DEAD_SHARE, min(record.config.epsilon, middle))) | (scale == 0.0))
        exploding = ~finite | ((middle > 0.0) & (var > middle * EXPLODING_SHARE))
    return Health(tuple(map(int, np.flatnonzero(dead & ~exploding))), tuple(map(int, np.flatnonzero(exploding))))
