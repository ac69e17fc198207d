"""What a layer is configured with, and which tensors it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from sharednorm.core.limits import MAX_MAPS
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.core.validation import brief, choice_of, is_finite, is_integer, require
from sharednorm.errors import InvalidShape, TooFewValues


@dataclass(frozen=True)
class LayerConfig:
    """What two handles of one layer must agree on.

    Attributes:
        kind: Which member of the family.
        maps: Channels, C, 1 to 2**17.
        epsilon: Added to the variance before the square root, > 0.
        init_factor: Numerator of the averaging factor f = max(init_factor / n, min_factor), >= 0.
        min_factor: Lower bound of f, 0 to 1. With 0 and init_factor 1 the average is cumulative.
        affine: Whether scale and bias are parameters; otherwise they are fixed at 1 and 0.
        averaging: Which side of the average f weighs.
        nonfinite: What a non-finite training batch does.

    Raises:
        InvalidConfiguration: A value is out of its range; the message names it.
    """

    kind: LayerKind
    maps: int
    epsilon: float = 1e-5
    init_factor: float = 1.0
    min_factor: float = 0.1
    affine: bool = True
    averaging: Averaging = Averaging.STANDARD
    nonfinite: NonFinitePolicy = NonFinitePolicy.REFUSE

    def __post_init__(self) -> None:
        """Check every range once, where the object is made, and keep plain Python numbers."""
        require(isinstance(self.kind, LayerKind), "kind", self.kind, "a LayerKind")
        require(is_integer(self.maps) and 1 <= self.maps <= MAX_MAPS, "maps", self.maps, f"1 to {MAX_MAPS}")
        require(is_finite(self.epsilon) and self.epsilon > 0, "epsilon", self.epsilon, "a finite number > 0")
        require(is_finite(self.init_factor) and self.init_factor >= 0, "initFactor", self.init_factor,
               "a finite number >= 0")  # fmt: skip
        require(is_finite(self.min_factor) and 0 <= self.min_factor <= 1, "minFactor", self.min_factor, "0 to 1")
        require(isinstance(self.affine, bool), "affine", self.affine, "True or False")
        require(isinstance(self.averaging, Averaging), "averaging", self.averaging, "an Averaging")
        require(isinstance(self.nonfinite, NonFinitePolicy), "nonfinite", self.nonfinite, "a NonFinitePolicy")
        object.__setattr__(self, "maps", int(self.maps))
        for name in ("epsilon", "init_factor", "min_factor"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def parse(
        cls,
        kind: LayerKind,
        maps: int,
        epsilon: float,
        init_factor: float,
        min_factor: float,
        affine: bool,
        averaging: str,
        nonfinite: str,
    ) -> LayerConfig:
        """Return the configuration that a constructor's arguments describe; the two choices come by their names.

        Raises:
            InvalidConfiguration: A value is out of its range or not among the choices; the message names it.
        """
        return cls(
            kind, maps, epsilon, init_factor, min_factor, affine,
            choice_of(Averaging, "averaging", averaging), choice_of(NonFinitePolicy, "nonfinite", nonfinite),
        )  # fmt: skip

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of scale, bias, mean and var: (1, C, 1, 1), and (1, C, 1, 1, 1) in 3D."""
        return (1, self.maps, *(1,) * (self.kind.state_rank - 2))

    def factor(self, step: int) -> float:
        """Return the averaging factor f of a step, counted from 1; at most 1."""
        return min(1.0, max(self.init_factor / step, self.min_factor))

    def differences(self, other: LayerConfig) -> dict[str, tuple[object, object]]:
        """Return the fields in which two configurations differ, with both values."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}

    def check_shape(self, shape: tuple[int, ...], *, train: bool, what: str = "Data", together: bool = False) -> None:
        """Check that a tensor of that shape may be fed to the layer.

        Args:
            shape: The tensor's shape.
            train: Whether it is a training batch, which needs two values a channel.
            what: "Data" or "Grad", for the message.
            together: Whether batches of others are normalized with it, so that it may have no sample, or one value.

        Raises:
            InvalidShape: The rank or the channels are wrong, or an axis has size 0.
            TooFewValues: A training batch has one value a channel.
        """
        rank = self.kind.rank
        if len(shape) != rank:
            wanted = "2d matrix" if rank == 2 else f"{rank}d tensor"
            raise InvalidShape(f"{what} must be {wanted}, got shape {brief(shape)}")
        if shape[1] != self.maps:
            raise InvalidShape(f"{what} has {shape[1]} maps (expected: {self.maps})")
        if min(shape[1:] if together else shape) < 1:
            raise InvalidShape(f"{what} is empty: shape {brief(shape)} (expected: every size at least 1)")
        if train and not together and math.prod(shape) == self.maps:
            raise TooFewValues(
                f"{what} of shape {brief(shape)} has one value a map, of which no variance can be taken "
                "(expected: at least 2 in train mode; use evalMode() or a larger batch)"
            )
