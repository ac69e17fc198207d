"""Run kernels on the host: buffers with guard zones, and the launches that make up a forward or a backward.

A launch goes to a compiled image of the kernels directly, without PyCUDA and without a driver between.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sharednorm_kernels import Fused, Geometry, View, entry, finish_geometry, map_geometry
from tests.emulation.process import active
from tests.support.oracle import dtype

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]

GUARD_BYTES = 64
GUARD = 0xA5
POISON = 0xFF  # a NaN in every floating-point type


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


class Buffer:
    """Memory of a kernel: begins at a multiple of 16 and no more, full of NaN, with a guard zone at either end."""

    def __init__(self, shape: int | tuple[int, ...], element: npt.DTypeLike) -> None:
        size = int(np.prod(shape)) * np.dtype(element).itemsize
        raw = np.full(size + 2 * GUARD_BYTES + 32, GUARD, np.uint8)
        begin = GUARD_BYTES + (16 - (raw.ctypes.data + GUARD_BYTES)) % 32
        self.whole, self.begin = raw, begin
        self._zones = raw[:begin], raw[begin + size :]
        self._raw = raw[begin : begin + size]
        self._raw[:] = POISON
        self.values: Array = self._raw.view(element).reshape(shape)

    @classmethod
    def of(cls, values: npt.ArrayLike, element: npt.DTypeLike) -> Buffer:
        """Return a buffer that holds some values."""
        array = np.asarray(values, element)
        buffer = cls(array.shape, element)
        buffer.values[...] = array
        return buffer

    @property
    def address(self) -> int:
        """Where the values begin."""
        return int(self._raw.ctypes.data)

    def guard(self, on: bool) -> None:
        """Under AddressSanitizer, let it catch every access to the guard zones, reads too, or no longer."""
        if active() == "address":
            change = getattr(ctypes.CDLL(None), f"__asan_{'' if on else 'un'}poison_memory_region")
            for zone in self._zones:
                change(ctypes.c_void_p(zone.ctypes.data), ctypes.c_size_t(zone.size))

    def check(self) -> None:
        """Fail if something wrote around the values."""
        for zone in self._zones:
            assert (zone == GUARD).all(), "a kernel wrote outside its buffer"


class Launcher(Protocol):
    """What kernels are run on."""

    def run(self, name: str, geometry: Geometry, *arguments: Buffer | float) -> None:
        """Run a kernel to its end, and check the guard zones of its buffers."""
        ...


class Kernels:
    """A compiled image of the kernels."""

    def __init__(self, image: Path) -> None:
        self._image = ctypes.CDLL(str(image))
        self._image.emu_find.restype = ctypes.c_void_p
        self._image.emu_run.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Launch)]

    def has(self, name: str) -> bool:
        """Return whether the image has a kernel of that name."""
        return bool(self._image.emu_find(name.encode()))

    def run(self, name: str, geometry: Geometry, *arguments: Buffer | float) -> None:
        """Run a kernel to its end, and check the guard zones of its buffers."""
        kernel = self._image.emu_find(name.encode())
        assert kernel, f"there is no kernel {name}"
        values = [_c_value(each) for each in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        launch = _Launch((geometry.blocks, 1, 1), (geometry.threads, 1, 1), geometry.shared_bytes, pointers)
        buffers = [each for each in arguments if isinstance(each, Buffer)]
        for each in buffers:
            each.guard(on=True)
        self._image.emu_run(kernel, ctypes.byref(launch))
        for each in buffers:
            each.guard(on=False)
        for each in buffers:
            each.check()


def _c_value(argument: Buffer | float) -> Any:
    if isinstance(argument, Buffer):
        return ctypes.c_void_p(argument.address)
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument)


@dataclass
class Batch:
    """One batch, its layer, and everything that the kernels write about it."""

    x: Array
    grad: Array
    name: str
    scale: Array
    bias: Array
    epsilon: float = 1e-5
    weight: float = 0.25

    def __post_init__(self) -> None:
        """Bring the inputs to their buffers, and make those of the results."""
        shape, maps, element = self.x.shape, self.x.shape[1], dtype(self.name)
        self.view = View(shape[0], maps, int(np.prod(shape[2:])))
        self.inputs, self.grads = Buffer.of(self.x, element), Buffer.of(self.grad, element)
        self.outputs, self.input_grads = Buffer(shape, element), Buffer(shape, element)
        self.scales, self.biases = Buffer.of(self.scale, np.float32), Buffer.of(self.bias, np.float32)
        self.old_mean = Buffer.of(np.linspace(-1, 1, maps), np.float32)
        self.old_var = Buffer.of(np.linspace(0.5, 2, maps), np.float32)
        self.new_mean, self.new_var = Buffer(maps, np.float32), Buffer(maps, np.float32)
        self.moments = Buffer((2, maps), np.float64)
        self.affine, self.slopes = Buffer((3, maps), np.float32), Buffer((4, maps), np.float32)
        self.scale_grad, self.bias_grad = Buffer(maps, np.float32), Buffer(maps, np.float32)

    @property
    def _statistics(self) -> tuple[Buffer | float, ...]:
        return self.old_mean, self.old_var, self.new_mean, self.new_var, self.weight

    def _entry(self, kernel: str) -> str:
        return entry(kernel, self.name)

    def naive(self, kernels: Launcher) -> None:
        """Compute everything with the naive kernels; the sums are finished as one part a map."""
        view, maps = self.view, self.view.maps
        kernels.run(self._entry("naive_moments"), map_geometry(maps), self.inputs, self.moments, *view.arguments)
        kernels.run(
            "affine_of_moments", map_geometry(maps),
            self.moments, float(view.count), self.scales, self.biases, self.epsilon, self.affine, maps,
        )  # fmt: skip
        kernels.run(
            self._entry("naive_apply"), _value_geometry(view), self.inputs, self.affine, self.outputs, *view.arguments
        )
        sums = Buffer((2, maps), np.float64)
        kernels.run(
            self._entry("naive_backward_sums"), map_geometry(maps),
            self.inputs, self.grads, self.moments, sums, *view.arguments,
        )  # fmt: skip
        self._finish_backward(kernels, Buffer.of(sums.values.T, np.float64), 1)
        kernels.run(
            self._entry("naive_backward_apply"), _value_geometry(view),
            self.inputs, self.grads, self.slopes, self.input_grads, *view.arguments,
        )  # fmt: skip

    def split(self, kernels: Launcher, reduce: Geometry, apply: Geometry) -> None:
        """Compute everything with the split kernels."""
        view, maps = self.view, self.view.maps
        parts = Buffer((maps, reduce.parts, 2), np.float64)
        kernels.run(self._entry("moments"), reduce, self.inputs, parts, *view.arguments, *reduce.arguments)
        kernels.run(
            self._entry("finish_forward"), finish_geometry(maps),
            parts, self.scales, self.biases, self.epsilon, *self._statistics, self.moments, self.affine,
            *view.arguments, reduce.image_parts, reduce.area_parts,
        )  # fmt: skip
        kernels.run(
            self._entry("apply"), apply, self.inputs, self.affine, self.outputs, *view.arguments, *apply.arguments
        )
        self.split_backward(kernels, reduce, apply)

    def split_backward(self, kernels: Launcher, reduce: Geometry, apply: Geometry) -> None:
        """Compute the gradients with the split kernels, from the moments that are there."""
        parts = Buffer((self.view.maps, reduce.parts, 2), np.float64)
        kernels.run(
            self._entry("backward_sums"), reduce,
            self.inputs, self.grads, self.moments, parts, *self.view.arguments, *reduce.arguments,
        )  # fmt: skip
        self._finish_backward(kernels, parts, reduce.parts)
        kernels.run(
            self._entry("backward_apply"), apply,
            self.inputs, self.grads, self.slopes, self.input_grads, *self.view.arguments, *apply.arguments,
        )  # fmt: skip

    def _finish_backward(self, kernels: Launcher, parts: Buffer, number: int) -> None:
        kernels.run(
            "finish_backward", finish_geometry(self.view.maps),
            parts, number, self.moments, float(self.view.count), self.scales, self.epsilon,
            self.slopes, self.scale_grad, self.bias_grad, self.view.maps,
        )  # fmt: skip

    def fused(self, kernels: Launcher, forward: Fused, backward: Fused) -> None:
        """Compute everything with kernels that do a pass in one launch."""
        geometry = forward.geometry
        kernels.run(
            self._entry(f"forward_{forward.kind}"), geometry,
            self.inputs, self.outputs, self.scales, self.biases, self.epsilon, *self._statistics, self.moments,
            *self._scratch(forward, self.affine), *self.view.arguments, *_sharing(forward),
        )  # fmt: skip
        geometry = backward.geometry
        kernels.run(
            self._entry(f"backward_{backward.kind}"), geometry,
            self.inputs, self.grads, self.input_grads, self.moments, self.scales, self.epsilon,
            self.scale_grad, self.bias_grad, *self._scratch(backward, self.slopes), *self.view.arguments,
            *_sharing(backward),
        )  # fmt: skip

    def _scratch(self, launch: Fused, coefficients: Buffer) -> tuple[Buffer, ...]:
        """Return what a ticketed kernel needs besides: coefficients, parts, and counters that are zero."""
        if launch.kind != "ticketed":
            return ()
        maps = self.view.maps
        return (
            coefficients,
            Buffer((maps, launch.geometry.parts, 2), np.float64),
            Buffer.of([0] * (1 + maps), np.uint32),
        )

    def results(self) -> list[bytes]:
        """Return the bytes of every result, to compare two runs bit for bit."""
        buffers = (self.outputs, self.input_grads, self.moments, self.new_mean, self.new_var, self.scale_grad,
                   self.bias_grad)  # fmt: skip
        return [buffer.values.tobytes() for buffer in buffers]


def _sharing(launch: Fused) -> tuple[int, ...]:
    return (*launch.geometry.arguments, launch.lag) if launch.kind == "ticketed" else launch.geometry.arguments


def _value_geometry(view: View) -> Geometry:
    # One thread a value.
    return Geometry(math.ceil(view.images * view.maps * view.area / 256), 256, 0)
