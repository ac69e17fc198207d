"""What a layer is configured with, what may be fed to it, and what it may be called.

The rules stand here once; the local layers, the handles and the server all ask them.
"""

from __future__ import annotations

import enum
import math
import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from sharednorm.errors import InvalidConfiguration, InvalidName, InvalidShape, TooFewValues, UnsupportedDType

Array: TypeAlias = npt.NDArray[Any]
"""A tensor: float32, float16 or bfloat16, channels on axis 1."""

Vector: TypeAlias = npt.NDArray[np.float32]
"""One float32 per channel, shape (C,)."""

DEFAULT_NAMESPACE = "default"
MAX_NAME_BYTES = 512
MAX_GROUP_NAME_CHARACTERS = 256
MAX_DOMAIN_NAME_CHARACTERS = 256
MAX_DOMAINS = 1024
MAX_GROUP_MEMBERS = 1024
MAX_GROUP_SECONDS = 86_400.0
MAX_NAMESPACE_CHARACTERS = 128
MAX_MAPS = 1 << 17
"""So that the messages beside a tensor stay within a few MiB: a state of that many maps is 3 MiB."""

MAX_BATCH_ENTRIES = 1024
"""Most layers that are read, and most steps that are taken, in one call of many."""

MAX_BATCH_MAPS = MAX_MAPS
"""Most maps that these have together, so that such a call is not larger than one of the widest layer."""

MAX_SECONDS = 1e8
"""Longest time that anybody is asked to wait, three years. Timers of gRPC and of threads overflow beyond."""

DTYPE_NAMES = ("float32", "float16", "bfloat16")


class LayerKind(enum.Enum):
    """A member of the family; the value is the rank of the tensors that it takes."""

    BATCH_NORM = 2
    BATCH_NORM_1D = 3
    BATCH_NORM_2D = 4
    BATCH_NORM_3D = 5

    @property
    def rank(self) -> int:
        """Number of axes of an input, batch and channels included."""
        return self.value

    @property
    def state_rank(self) -> int:
        """Number of axes of scale, bias, mean and var: (1, C, 1, 1), and (1, C, 1, 1, 1) in 3D."""
        return max(4, self.value)

    @property
    def label(self) -> str:
        """PuzzleLib's name of it: "BatchNorm", "BatchNorm1D", "BatchNorm2D" or "BatchNorm3D"."""
        return "BatchNorm" if self is LayerKind.BATCH_NORM else f"BatchNorm{self.value - 2}D"


class Averaging(enum.Enum):
    """How the running statistics take in a batch, with f = max(initFactor / n, minFactor).

    STANDARD is `running = (1 - f) * running + f * batch`, as cuDNN, torch and PuzzleLib's code compute
    it. PRINTED has the two weights the other way round, as PuzzleLib's documentation prints it.
    """

    STANDARD = "standard"
    PRINTED = "printed"


class NonFinitePolicy(enum.Enum):
    """What a training batch with a NaN or an infinity does: it is refused, or used like any other."""

    REFUSE = "refuse"
    ALLOW = "allow"


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
        _check(isinstance(self.kind, LayerKind), "kind", self.kind, "a LayerKind")
        _check(is_integer(self.maps) and 1 <= self.maps <= MAX_MAPS, "maps", self.maps, f"1 to {MAX_MAPS}")
        _check(is_finite(self.epsilon) and self.epsilon > 0, "epsilon", self.epsilon, "a finite number > 0")
        _check(is_finite(self.init_factor) and self.init_factor >= 0, "initFactor", self.init_factor,
               "a finite number >= 0")  # fmt: skip
        _check(is_finite(self.min_factor) and 0 <= self.min_factor <= 1, "minFactor", self.min_factor, "0 to 1")
        _check(isinstance(self.affine, bool), "affine", self.affine, "True or False")
        _check(isinstance(self.averaging, Averaging), "averaging", self.averaging, "an Averaging")
        _check(isinstance(self.nonfinite, NonFinitePolicy), "nonfinite", self.nonfinite, "a NonFinitePolicy")
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
            _choice(Averaging, "averaging", averaging), _choice(NonFinitePolicy, "nonfinite", nonfinite),
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
            raise InvalidShape(f"{what} must be {wanted}, got shape {_brief(shape)}")
        if shape[1] != self.maps:
            raise InvalidShape(f"{what} has {shape[1]} maps (expected: {self.maps})")
        if min(shape[1:] if together else shape) < 1:
            raise InvalidShape(f"{what} is empty: shape {_brief(shape)} (expected: every size at least 1)")
        if train and not together and math.prod(shape) == self.maps:
            raise TooFewValues(
                f"{what} of shape {_brief(shape)} has one value a map, of which no variance can be taken "
                "(expected: at least 2 in train mode; use evalMode() or a larger batch)"
            )


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    # NumPy puts the name together at each call, which takes as long as a small call's arithmetic.
    return str(dtype.name)


def check_dtype(dtype: np.dtype[Any], calctype: np.dtype[Any] | None = None) -> str:
    """Check an element type and return its name, "float32", "float16" or "bfloat16".

    Either byte order is accepted; results are always in the machine's.

    Args:
        dtype: The tensor's.
        calctype: The one that the layer was told to expect, or None for any.

    Raises:
        UnsupportedDType: It is none of the three, or not `calctype`.
    """
    name = _name_of(dtype)
    if calctype is not None and name != _name_of(calctype):
        raise UnsupportedDType(f"Expected dtype {calctype}, got {dtype}")
    if name not in DTYPE_NAMES:
        raise UnsupportedDType(
            f"Unsupported dtype {dtype} (expected: {', '.join(DTYPE_NAMES)}; convert with .astype(np.float32))"
        )
    return name


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy type of one of `DTYPE_NAMES`, in the machine's byte order.

    Raises:
        UnsupportedDType: It is bfloat16, and `ml_dtypes` is not installed; or another name.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: PLC0415 - optional
        except ModuleNotFoundError as error:
            raise UnsupportedDType(
                "bfloat16 needs the package ml_dtypes: pip install 'sharednorm[bfloat16]'"
            ) from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if name not in DTYPE_NAMES:
        raise UnsupportedDType(f"Unsupported dtype {name!r} (expected: {', '.join(DTYPE_NAMES)})")
    return np.dtype(name)


def check_name(name: object) -> str:
    """Check a layer's name and return it.

    Raises:
        InvalidName: Not a string, empty or blank, over 512 bytes of UTF-8, or with control characters.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidName(
            f"a remote layer is shared by its name: pass name='...' (expected: a non-empty string, got {_brief(name)})"
        )
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > MAX_NAME_BYTES:
        raise InvalidName(f"the layer's name has {size} bytes of UTF-8 (expected: at most {MAX_NAME_BYTES})")
    _check_characters("layer", name)
    return name


def check_group_name(what: str, name: object) -> str:
    """Check the name of a group, or of one of its members, and return it.

    Raises:
        InvalidName: Not a string, empty or blank, over 256 characters, or with control characters.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_GROUP_NAME_CHARACTERS:
        raise InvalidName(
            f"the {what}'s name is {_brief(name)} (expected: a string of 1 to {MAX_GROUP_NAME_CHARACTERS} characters)"
        )
    _check_characters(what, name)
    return name


def check_domain(domain: object) -> str:
    """Check the name of a domain and return it; "" stands for a layer's own statistics.

    Raises:
        InvalidName: Not a string, blank, over 256 characters, or with control characters.
    """
    if not isinstance(domain, str) or (domain and not domain.strip()) or len(domain) > MAX_DOMAIN_NAME_CHARACTERS:
        raise InvalidName(
            f"the domain's name is {_brief(domain)} (expected: a string of 1 to {MAX_DOMAIN_NAME_CHARACTERS} "
            "characters; '' for the layer's own statistics)"
        )
    _check_characters("domain", domain)
    return domain


def check_namespace(namespace: object) -> str:
    """Check a namespace and return it; the empty one is "default".

    Raises:
        InvalidName: Not a string, over 128 characters, or with control characters.
    """
    if not isinstance(namespace, str):
        raise InvalidName(f"a namespace is a string, got {_brief(namespace)}")
    if len(namespace) > MAX_NAMESPACE_CHARACTERS:
        raise InvalidName(
            f"the namespace has {len(namespace)} characters (expected: at most {MAX_NAMESPACE_CHARACTERS})"
        )
    _check_characters("namespace", namespace)
    return namespace or DEFAULT_NAMESPACE


def check_flag(name: str, value: object) -> bool:
    """Check a switch, Python's True or False or NumPy's, and return it.

    Raises:
        InvalidConfiguration: It is something else; "eval", for one, would pass for True.
    """
    _check(isinstance(value, (bool, np.bool_)), name, value, "True or False")
    return bool(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number that a float can hold; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_characters(what: str, text: str) -> None:
    # Cc is control characters; Cs is lone surrogates, which have no UTF-8. What is printable has neither.
    if text.isprintable():
        return
    bad = [c for c in text if unicodedata.category(c) in {"Cc", "Cs"}]
    if bad:
        raise InvalidName(
            f"the {what}'s name has the control character U+{ord(bad[0]):04X} "
            f"(expected: printable characters, any script): {_brief(text)}"
        )


def _check(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise InvalidConfiguration(f"{name} is {_brief(value)} (expected: {expected})")


_Choice = TypeVar("_Choice", bound=enum.Enum)


def _choice(choices: type[_Choice], name: str, value: object) -> _Choice:
    for choice in choices:
        if value is choice or (isinstance(value, str) and value == choice.value):
            return choice
    expected = " or ".join(repr(choice.value) for choice in choices)
    raise InvalidConfiguration(f"{name} is {_brief(value)} (expected: {expected})")


def _brief(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
