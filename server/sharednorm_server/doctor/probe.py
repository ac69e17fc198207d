"""What runs in a process of its own: imports of packages, and questions to NVIDIA's driver.

Each function prints what it finds out as soon as it knows it, one line of JSON at a time, so that a crash or a hang
loses only what would have come after. This module needs the standard library and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the kernels have code for."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NAME_BYTES = 256


def package(module: str, distribution: str) -> None:
    """Import a module, and say the version of the distribution that it comes with."""
    importlib.import_module(module)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    _say(version=version)


def arithmetic() -> None:
    """Make the device that `serve --device cpu` would make, and say how it describes itself."""
    from sharednorm.errors import SharedNormError  # noqa: PLC0415 - the questions to the driver need none of it
    from sharednorm_server.device.cpu import CpuDevice  # noqa: PLC0415 - what crashes in it is to crash here

    try:
        _say(description=CpuDevice().description)
    except SharedNormError as error:
        sys.exit(str(error))


def gpus(image: str) -> None:
    """Say what the driver says of itself and of each GPU; load compiled kernels on each that they have code for.

    Args:
        image: Path of the compiled kernels; "" for none.
    """
    try:
        driver = _Driver()
    except OSError as error:
        _say(no_library=str(error))
        return
    try:
        _say(version=driver.version())
        driver.call("cuInit", 0)
        count = driver.count()
        found = {ordinal: driver.describe(ordinal) for ordinal in range(count)}
    except _DriverError as error:
        _say(problem=str(error), code=error.code)
        return
    _say(count=count)
    for ordinal, (name, capability, memory) in found.items():
        _say(gpu=ordinal, name=name, capability=capability, memory=memory)
    kernels = Path(image).read_bytes() if image else b""
    for ordinal, (_, capability, _) in found.items():
        if capability >= LEAST_CAPABILITY:
            _try(driver, ordinal, kernels)


def _try(driver: _Driver, ordinal: int, kernels: bytes) -> None:
    try:
        with driver.context(ordinal):
            _say(gpu=ordinal, free=driver.free())
            if kernels:
                driver.load(kernels)
                _say(gpu=ordinal, loaded=True)
    except _DriverError as error:
        _say(gpu=ordinal, problem=str(error), code=error.code)


def _say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class _DriverError(Exception):
    """A call of the driver failed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Driver:
    """Those calls of libcuda.so.1 that are needed here. Raises OSError if it cannot be loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            _DriverError: It fails, or this driver does not have it.
        """
        try:
            function = self._library[name]
        except AttributeError as error:
            raise _DriverError(f"the driver has no {name}", -1) from error
        code = int(function(*arguments))
        if code:
            raise _DriverError(f"{name}: {self._explained(code)}", code)

    def _explained(self, code: int) -> str:
        words = [f"error {code}"]
        for function in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            if function(code, ctypes.byref(text)) == 0 and text.value:
                words.append(text.value.decode("utf-8", "replace"))
        return ", ".join(words)

    def version(self) -> int:
        """Return the latest CUDA that the driver supports: 13000 is 13.0."""
        return self._integer("cuDriverGetVersion")

    def count(self) -> int:
        """Return how many GPUs this process may use."""
        return self._integer("cuDeviceGetCount")

    def describe(self, ordinal: int) -> tuple[str, tuple[int, int], int]:
        """Return the name of a GPU, its compute capability, and its memory in bytes."""
        device = self._device(ordinal)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, _NAME_BYTES, device)
        major, minor = (self._integer("cuDeviceGetAttribute", attribute, device) for attribute in (_MAJOR, _MINOR))
        memory = ctypes.c_size_t()
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        return name.value.decode("utf-8", "replace"), (major, minor), memory.value

    def context(self, ordinal: int) -> _Context:
        """Return the primary context of a GPU, to be entered and left."""
        return _Context(self, self._device(ordinal))

    def free(self) -> int:
        """Return how much memory of the current context's GPU is free, in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def load(self, kernels: bytes) -> None:
        """Load compiled kernels into the current context, and unload them."""
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), kernels)
        self.call("cuModuleUnload", module)

    def _device(self, ordinal: int) -> int:
        return self._integer("cuDeviceGet", ordinal)

    def _integer(self, name: str, *arguments: object) -> int:
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value


class _Context:
    """The primary context of a GPU, current while it is entered."""

    def __init__(self, driver: _Driver, device: int) -> None:
        self._driver = driver
        self._device = device

    def __enter__(self) -> None:
        """Make it, and make it current."""
        handle = ctypes.c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), self._device)
        self._driver.call("cuCtxPushCurrent_v2", handle)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go of it. After an error, that one is told, and not what it led to here."""
        try:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
        except _DriverError:
            if kind is None:
                raise
