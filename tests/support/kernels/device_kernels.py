"""Run kernels through PyCUDA, on the buffers of `kernel_run`: on a real GPU, or on the emulated driver."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm_kernels import Geometry
from tests.support.kernels import cuda
from tests.support.kernels.kernel_run import Buffer


class DeviceKernels:
    """The kernels on the first GPU, the naive ones too, with the interface of `kernel_run.Kernels`. For one thread."""

    def __init__(self) -> None:
        cuda.prepare()
        from pycuda import driver

        from sharednorm_server.device.cuda.context import limits_of

        driver.init()
        device = driver.Device(0)
        self._driver = driver
        self._shared_bytes = limits_of(device).shared_bytes
        self._context = device.retain_primary_context()
        self._context.push()
        self._module: Any = driver.module_from_buffer(cuda.reference_kernels())
        self._functions: dict[str, Any] = {}

    def close(self) -> None:
        """Leave the context."""
        self._functions.clear()
        self._module = None
        self._context.pop()
        self._context.detach()

    def has(self, name: str) -> bool:
        """Return whether there is a kernel of that name."""
        try:
            self._module.get_function(name)
        except self._driver.LogicError:
            return False
        return True

    def run(self, name: str, geometry: Geometry, *arguments: Buffer | float) -> None:
        """Run a kernel to its end, and check the guard zones of its buffers."""
        copies = {id(each): self._copy(each) for each in arguments if isinstance(each, Buffer)}
        values = [copies[id(each)][1] if isinstance(each, Buffer) else each for each in arguments]
        formats = "".join("P" if isinstance(a, Buffer) else "i" if isinstance(a, int) else "d" for a in arguments)
        function = self._module.get_function(name)
        function.set_attribute(self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared_bytes)
        function.prepare(formats).prepared_async_call(
            (geometry.blocks, 1), (geometry.threads, 1, 1), None, *values, shared_size=geometry.shared_bytes
        )
        self._driver.Context.synchronize()
        for each in arguments:
            if isinstance(each, Buffer):
                memory, address = copies[id(each)]
                self._driver.memcpy_dtoh(each.whole, address - each.begin)
                each.check()
        for memory, _ in copies.values():
            memory.free()

    def _copy(self, buffer: Buffer) -> tuple[Any, int]:
        """Copy a buffer with its guard zones; return the memory, and where its values begin: at 16 modulo 32."""
        memory = self._driver.mem_alloc(buffer.whole.nbytes + 32)
        address = int(memory) + buffer.begin + (16 - buffer.begin) % 32
        self._driver.memcpy_htod(address - buffer.begin, np.ascontiguousarray(buffer.whole))
        return memory, address
