"""The compiled kernels on a GPU, and the one place that knows their parameters. For the thread that owns the GPU."""

from __future__ import annotations

from typing import Any

import pycuda.driver as cuda

from sharednorm_kernels import Geometry, entry

# A kernel's parameters as struct knows them: P an address, d a float64, i an int32; in the order of sharednorm.cu.
_VIEW = "iii"  # images, maps, area
_CUT = "ii"  # image_parts, area_parts
_SHARING = "iiii"  # image_parts, area_parts, group, lanes
_STATISTICS = "PPPPd"  # old_mean, old_var, new_mean, new_var, weight

_OF_ALL_TYPES = {
    "finish_backward": "PiPdPdPPPi",
}
_OF_EACH_TYPE = {
    "moments": f"PP{_VIEW}{_SHARING}",
    "finish_moments": f"PP{_VIEW}{_CUT}",
    "finish_forward": f"PPPd{_STATISTICS}PP{_VIEW}{_CUT}",
    "apply": f"PPP{_VIEW}{_SHARING}",
    "evaluate": f"PPPPPdP{_VIEW}{_SHARING}",
    "normalize": f"PPdPPdP{_VIEW}{_SHARING}",
    "backward_sums": f"PPPP{_VIEW}{_SHARING}",
    "backward_apply": f"PPPP{_VIEW}{_SHARING}",
}
# Ticketed ones also get coefficients, parts and counters, and at the end their lag.
_FORWARD_TICKETED = f"PPPPd{_STATISTICS}PPPP{_VIEW}{_SHARING}i"
_BACKWARD_TICKETED = f"PPPPPdPPPPP{_VIEW}{_SHARING}i"
_FORWARD_AT_ONCE = f"PPPPd{_STATISTICS}P{_VIEW}{_SHARING}"
_BACKWARD_AT_ONCE = f"PPPPPdPP{_VIEW}{_SHARING}"

# Up to here a kernel may have shared memory without asking for it.
_DEFAULT_SHARED_BYTES = 48 << 10


class Kernels:
    """The kernels of one module, found when they are first launched.

    Args:
        image: What `make kernels` compiles.
        shared_bytes: Most dynamic shared memory that a block may ask for.

    Raises:
        pycuda.driver.Error: The image has no code for this GPU.
    """

    def __init__(self, image: bytes, shared_bytes: int) -> None:
        self._module = cuda.module_from_buffer(image)
        self._shared_bytes = shared_bytes
        self._functions: dict[str, Any] = {}

    def launch(self, stream: Any, kernel: str, dtype_name: str | None, geometry: Geometry, *arguments: float) -> None:
        """Put a launch into a stream.

        Args:
            stream: A pycuda.driver.Stream.
            kernel: Its name without the element type.
            dtype_name: The element type, or None for a kernel that serves all.
            geometry: Blocks, threads and shared memory.
            arguments: Addresses and numbers, in the kernel's order.
        """
        name = kernel if dtype_name is None else entry(kernel, dtype_name)
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._find(name, _parameters(kernel))
        function.prepared_async_call(
            (geometry.blocks, 1), (geometry.threads, 1, 1), stream, *arguments, shared_size=geometry.shared_bytes
        )

    def clear(self, stream: Any, address: int, words: int) -> None:
        """Put the writing of zeros into a stream: so many words of 4 bytes."""
        cuda.memset_d32_async(address, 0, words, stream)

    def _find(self, name: str, parameters: str) -> Any:
        function = self._module.get_function(name)
        if self._shared_bytes > _DEFAULT_SHARED_BYTES:
            function.set_attribute(cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared_bytes)
        return function.prepare(parameters)


def _parameters(kernel: str) -> str:
    known = _OF_ALL_TYPES.get(kernel) or _OF_EACH_TYPE.get(kernel)
    if known is not None:
        return known
    if kernel.endswith("_ticketed"):
        return _FORWARD_TICKETED if kernel.startswith("forward_") else _BACKWARD_TICKETED
    return _FORWARD_AT_ONCE if kernel.startswith("forward_") else _BACKWARD_AT_ONCE
