"""A parameter of a layer and its gradient, as `layer.vars` gives them."""

from __future__ import annotations

from typing import Literal

import numpy.typing as npt

from sharednorm.core.state import StateUpdate, empty_error, given
from sharednorm.core.types import Vector
from sharednorm.layers.backend import LayerBackend


class Variable:
    """The scale or the bias of a layer.

    `data` and `grad` are read from the layer at each access, as read-only float32 arrays of the state's
    shape, (1, C, 1, 1) or (1, C, 1, 1, 1); assigning C values of any such shape sets them in the layer.
    """

    def __init__(self, backend: LayerBackend, name: Literal["scale", "bias"]) -> None:
        self.name = name
        self._backend = backend

    @property
    def data(self) -> Vector:
        """The parameter's values.

        Raises:
            LayerEmpty: The layer was created empty and has not been loaded yet.
        """
        return self._read(self.name)

    @data.setter
    def data(self, values: npt.ArrayLike) -> None:
        new = given(self.name, values)
        self._backend.update(StateUpdate(scale=new) if self.name == "scale" else StateUpdate(bias=new))

    @property
    def grad(self) -> Vector:
        """The accumulated gradient; zeros if the layer is not affine.

        Raises:
            LayerEmpty: The layer was created empty and has not been loaded yet.
        """
        return self._read("scale_grad" if self.name == "scale" else "bias_grad")

    @grad.setter
    def grad(self, values: npt.ArrayLike) -> None:
        new = given(f"{self.name}_grad", values)
        self._backend.update(StateUpdate(scale_grad=new) if self.name == "scale" else StateUpdate(bias_grad=new))

    def __repr__(self) -> str:
        """For people; reads nothing from the layer."""
        return f"Variable({self.name!r}, {self._backend.config.maps} values)"

    def _read(self, name: Literal["scale", "bias", "scale_grad", "bias_grad"]) -> Vector:
        found = self._backend.read_fields("initialized", name)
        if not found["initialized"]:
            raise empty_error("the layer")
        return found[name].reshape(self._backend.config.state_shape)
