"""The part of a layer's API that reads and sets its state; nothing here computes with tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import (
    FieldName,
    LayerState,
    StateFields,
    StateUpdate,
    check_steps,
    empty_error,
    given,
    require_initialized,
)
from sharednorm.core.types import Vector
from sharednorm.core.validation import check_domain
from sharednorm.errors import InvalidConfiguration, InvalidShape
from sharednorm.files import state_file
from sharednorm.files.state_file import Source, Target
from sharednorm.layers.backend import LayerBackend
from sharednorm.layers.statistics import StatisticsDelta
from sharednorm.layers.variable import Variable


class LayerView:
    """A layer's configuration, parameters, statistics, counters and files.

    `scale`, `bias`, `mean` and `var` are float32 arrays of shape (1, C, 1, 1), or (1, C, 1, 1, 1) in 3D, read
    from the layer at each access and read-only; to read several of one moment, take a `snapshot`. Assigning
    C values of any such shape sets them in the layer.

    Args:
        backend: What keeps the state.
        name: The layer's name, for messages and files; None if it has none.
    """

    def __init__(self, backend: LayerBackend, name: str | None) -> None:
        self.name = name
        self._backend = backend
        self._vars = _variables(backend)

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle all but the variables, which belong to this object's backend."""
        return {name: value for name, value in self.__dict__.items() if name != "_vars"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Make the variables of a copy's own backend."""
        self.__dict__.update(state)
        self._vars = _variables(self._backend)

    def snapshot(self) -> LayerState:
        """Return parameters, statistics, gradients and counters, all of one moment, as arrays of shape (C,)."""
        return self._backend.read()

    @property
    def maps(self) -> int:
        """Channels, C."""
        return self._backend.config.maps

    @property
    def size(self) -> int:
        """Channels, C, as `BatchNorm` calls them."""
        return self._backend.config.maps

    @property
    def epsilon(self) -> float:
        """What is added to the variance before the square root."""
        return self._backend.config.epsilon

    @property
    def initFactor(self) -> float:
        """Numerator of the averaging factor f = max(initFactor / numOfProps, minFactor)."""
        return self._backend.config.init_factor

    @property
    def minFactor(self) -> float:
        """Lower bound of the averaging factor."""
        return self._backend.config.min_factor

    @property
    def affine(self) -> bool:
        """Whether scale and bias are parameters; otherwise they are fixed at 1 and 0."""
        return self._backend.config.affine

    @property
    def averaging(self) -> str:
        """How the running statistics take in a batch: "standard" or "printed"."""
        return self._backend.config.averaging.value

    @property
    def nonfinite(self) -> str:
        """What a training batch with a NaN or an infinity does: "refuse" or "allow"."""
        return self._backend.config.nonfinite.value

    @property
    def scale(self) -> Vector:
        """Multiplier of the normalized value. Raises LayerEmpty before an empty layer is loaded."""
        return self._shaped(self._initialized("scale")["scale"])

    @scale.setter
    def scale(self, values: npt.ArrayLike) -> None:
        self._backend.update(StateUpdate(scale=given("scale", values)))

    @property
    def bias(self) -> Vector:
        """Added after the multiplication. Raises LayerEmpty before an empty layer is loaded."""
        return self._shaped(self._initialized("bias")["bias"])

    @bias.setter
    def bias(self, values: npt.ArrayLike) -> None:
        self._backend.update(StateUpdate(bias=given("bias", values)))

    @property
    def mean(self) -> Vector:
        """Running mean. Raises LayerEmpty before an empty layer is loaded."""
        return self._shaped(self._initialized("mean")["mean"])

    @mean.setter
    def mean(self, values: npt.ArrayLike) -> None:
        self._backend.update(StateUpdate(mean=given("mean", values)))

    @property
    def var(self) -> Vector:
        """Running variance, unbiased. Raises LayerEmpty before an empty layer is loaded."""
        return self._shaped(self._initialized("var")["var"])

    @var.setter
    def var(self, values: npt.ArrayLike) -> None:
        self._backend.update(StateUpdate(var=given("var", values)))

    @property
    def numOfProps(self) -> int:
        """Steps that the running statistics have taken in; saved and restored. May be set."""
        return self._backend.read_fields("num_of_props")["num_of_props"]

    @numOfProps.setter
    def numOfProps(self, steps: int) -> None:
        self._backend.update(StateUpdate(num_of_props=check_steps(steps)))

    @property
    def domain(self) -> str:
        """Whose running statistics this handle uses; "" for the layer's own. See `inDomain`."""
        return self._backend.domain

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the layer keeps statistics of beside its own, in the order of their names."""
        return self._backend.domains()

    def deleteDomain(self, domain: str) -> None:
        """Forget a domain and its statistics, for everybody: handles that are in it raise LayerNotFound from then on.

        Raises:
            LayerNotFound: The layer has no such domain.
            InvalidName: No domain could have that name.
        """
        self._backend.delete_domain(check_domain(domain))

    @property
    def statsFrozen(self) -> bool:
        """Whether training steps, of all handles of the layer, leave mean, var and numOfProps as they are."""
        return self._backend.read_fields("stats_frozen")["stats_frozen"]

    def freezeStats(self) -> None:
        """Keep the running statistics as they are, for all handles of the layer, until `unfreezeStats`.

        It is apart from the mode: a training forward normalizes by its batch as before, `backward` works, and the step
        counts in `version`, but not in `numOfProps`. In eval mode nothing changes.
        """
        self._backend.update(StateUpdate(stats_frozen=True))

    def unfreezeStats(self) -> None:
        """Have training steps taken into the running statistics again, which go on where they were."""
        self._backend.update(StateUpdate(stats_frozen=False))

    def mergeStats(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered without the layer into its running ones, as one step, once.

        Args:
            delta: What `Statistics.take` gave, here or elsewhere.

        Returns:
            Whether it was taken in now. False: it had been before, and nothing has changed. A layer knows the last 1024
            deltas again.

        Raises:
            InvalidShape: It is of another number of maps.
            InvalidConfiguration: The layer's statistics are frozen, or it is not a delta.
            NonFiniteInput: Its moments do not fit float32, and the layer refuses that.
            LayerEmpty: The layer was created empty and has not been loaded.
        """
        if not isinstance(delta, StatisticsDelta):
            raise InvalidConfiguration(
                f"the delta is a {type(delta).__name__} (expected: what Statistics.take() gave, if it gave something)"
            )
        if delta.mean.shape != (self.maps,) or delta.m2.shape != (self.maps,):
            raise InvalidShape(f"the delta is of {delta.mean.size} maps (expected: {self.maps})")
        return self._backend.merge(delta)

    def resetStats(self) -> None:
        """Set mean, var and numOfProps to 0, 1 and 0, for all handles of the layer. Parameters stay.

        `reset`, which is PuzzleLib's, forgets the handle's last forward instead.
        """
        maps = self._backend.config.maps
        self._backend.update(StateUpdate(mean=np.zeros(maps), var=np.ones(maps), num_of_props=0))

    @property
    def version(self) -> int:
        """Steps that the layer has applied since it was created; never decreases."""
        return self._backend.read_fields("version")["version"]

    @property
    def vars(self) -> Mapping[str, Variable]:
        """The parameters, "scale" and "bias"; also of a layer that is not affine, where they are fixed."""
        return self._vars

    @property
    def attrs(self) -> Mapping[str, Vector]:
        """The statistics, "mean" and "var", both of one moment."""
        found = self._initialized("mean", "var")
        return MappingProxyType({"mean": self._shaped(found["mean"]), "var": self._shaped(found["var"])})

    def getVar(self, name: str) -> Variable:
        """Return `vars[name]`; the name is "scale" or "bias"."""
        return self._vars[name]

    def numOfParams(self) -> int:
        """Return the number of values of scale and bias together."""
        return 2 * self.maps

    def paramSize(self, unit: str | None = None) -> float:
        """Return the size of scale and bias in bytes, or in units of 1024 ("kb") or 1024**2 bytes ("mb").

        Raises:
            InvalidConfiguration: Another unit.
        """
        size = self.numOfParams() * np.dtype(np.float32).itemsize
        if unit is None:
            return size
        divisors = {"kb": 1024, "mb": 1024**2}
        if unit not in divisors:
            raise InvalidConfiguration(f"unit is {unit!r} (expected: None, 'kb' or 'mb')")
        return size / divisors[unit]

    def save(self, hdf: Target | None = None, *, name: str | None = None) -> bytes | None:
        """Save scale, bias, mean, var and numOfProps. `sharednorm.files.state_file` describes the formats.

        Args:
            hdf: A path, whose extension chooses the format: .hdf, .hdf5, .h5, .npz or .safetensors; or an open
                h5py file or group, to which the layer is added; or None for the bytes of an HDF5 file.
            name: Name of the layer in the file; None for the layer's own.

        Returns:
            The bytes if `hdf` is None, otherwise None.

        Raises:
            LayerEmpty: The layer was created empty and has not been loaded.
            InvalidFile: An extension that names no format, or the h5py file already has a layer of that name.
            InvalidConfiguration: The format needs a package that is not installed.
            OSError: The file could not be written; one that was there before is as it was.
        """
        state = self._backend.read()
        require_initialized(state, str(self))
        return state_file.save(hdf, self._name_in_file(name), self._backend.config, state)

    def load(self, hdf: Source, *, name: str | None = None) -> None:
        """Load what `save` or PuzzleLib wrote, all at once.

        Args:
            hdf: A path, the file's bytes, or an open h5py file or group. The content tells the format.
            name: Name of the layer in the file; None for the layer's own.

        Raises:
            InvalidFile: Not such a file, damaged, without this layer, or of a layer of another size.
            InvalidConfiguration: The format needs a package that is not installed.
            OSError: The file could not be read.
        """
        self._backend.update(state_file.load(hdf, self._name_in_file(name), self._backend.config))

    def __str__(self) -> str:
        """Return PuzzleLib's wording: the kind and the name."""
        return f"Module {self._backend.config.kind.label} (name: {self.name})"

    def __repr__(self) -> str:
        """Return the kind, its configuration and the name; reads no state."""
        config, domain = self._backend.config, self._backend.domain
        return (
            f"{config.kind.label}({config.maps}, epsilon={config.epsilon}, initFactor={config.init_factor}, "
            f"minFactor={config.min_factor}, affine={config.affine}, name={self.name!r}, "
            f"averaging={config.averaging.value!r}, nonfinite={config.nonfinite.value!r}"
            f"{f', domain={domain!r}' if domain else ''})"
        )

    def _initialized(self, *names: FieldName) -> StateFields:
        found = self._backend.read_fields("initialized", *names)
        if not found["initialized"]:
            raise empty_error(str(self))
        return found

    def _shaped(self, values: Vector) -> Vector:
        return values.reshape(self._backend.config.state_shape)

    def _name_in_file(self, name: str | None) -> str:
        chosen = self.name if name is None else name
        return "" if chosen is None else chosen


def _variables(backend: LayerBackend) -> Mapping[str, Variable]:
    return MappingProxyType({"scale": Variable(backend, "scale"), "bias": Variable(backend, "bias")})
