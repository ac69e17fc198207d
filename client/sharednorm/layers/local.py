"""Layers that run in this process."""

from __future__ import annotations

import numpy as np

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import initial_state
from sharednorm.core.types import LayerKind
from sharednorm.core.validation import check_name
from sharednorm.layers.batch_norm import Layer
from sharednorm.layers.local_backend import LocalBackend


class _LocalBatchNorm(Layer):
    # The constructor's parameters, which the four members share.

    def __init__(self, config: LayerConfig, sscale: float, name: str | None, empty: bool, inplace: bool) -> None:
        if name is not None and name != "":
            check_name(name)
        # The global generator, as PuzzleLib: numpy.random.seed decides what a layer begins with.
        state = initial_state(config, sscale, np.random, empty=empty)
        super().__init__(LocalBackend(config, state), name, inplace, train=True)


class BatchNorm(_LocalBatchNorm):
    """A layer in this process for matrices, (N, C).

    Args:
        size: Channels, C.
        epsilon: Added to the variance before the square root, > 0.
        initFactor: Numerator of the averaging factor f = max(initFactor / n, minFactor) of step n, >= 0.
        minFactor: Lower bound of f, 0 to 1. With 0 the running statistics are those of all batches so far,
            each batch with the same weight.
        sscale: Standard deviation of the initial scale around 1, >= 0; drawn from `numpy.random`.
        affine: Whether scale and bias are parameters; otherwise they are fixed at 1 and 0.
        name: The layer's name, for messages and files.
        empty: Whether the layer waits for `load` before it can be used.
        inplace: Whether the output replaces the input. Such a layer only works in eval mode.
        averaging: "standard", running = (1 - f) * running + f * batch; "printed", the weights exchanged.
        nonfinite: What a NaN or an infinity in a training batch does: "refuse" raises NonFiniteInput and
            changes nothing; "allow" uses the batch like any other.

    Raises:
        InvalidConfiguration: A value is out of its range; the message names it.
        InvalidName: The name is too long or has control characters.
    """

    def __init__(
        self,
        size: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
    ) -> None:
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM, size, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        super().__init__(config, sscale, name, empty, inplace)


class BatchNorm1D(_LocalBatchNorm):
    """A layer in this process for sequences, (N, C, L). The arguments are those of `BatchNorm`; C is maps."""

    def __init__(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
    ) -> None:
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_1D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        super().__init__(config, sscale, name, empty, inplace)


class BatchNorm2D(_LocalBatchNorm):
    """A layer in this process for images, (N, C, H, W). The arguments are those of `BatchNorm`; C is maps."""

    def __init__(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
    ) -> None:
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_2D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        super().__init__(config, sscale, name, empty, inplace)


class BatchNorm3D(_LocalBatchNorm):
    """A layer in this process for volumes, (N, C, D, H, W). The arguments are those of `BatchNorm`; C is maps."""

    def __init__(
        self,
        maps: int,
        epsilon: float = 1e-5,
        initFactor: float = 1.0,
        minFactor: float = 0.1,
        sscale: float = 0.01,
        affine: bool = True,
        name: str | None = None,
        empty: bool = False,
        inplace: bool = False,
        *,
        averaging: str = "standard",
        nonfinite: str = "refuse",
    ) -> None:
        config = LayerConfig.parse(
            LayerKind.BATCH_NORM_3D, maps, epsilon, initFactor, minFactor, affine, averaging, nonfinite
        )
        super().__init__(config, sscale, name, empty, inplace)
