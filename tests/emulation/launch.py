"""Launch one of the planted kernels: `python -m tests.emulation.launch KERNEL [--blocks 4] [--threads 64] [--freed]`.

The kernel gets y, zeroed memory for (blocks + 1) * threads floats, and that number; y is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tests.emulation.build import build_file
from tests.emulation.load import load
from tests.emulation.process import active

PLANTED = Path(__file__).parent / "planted"


def launch(kernel: str, blocks: int, threads: int, freed: bool = False, ucontext: bool = False) -> list[float]:
    """Launch a planted kernel with 4 bytes of shared memory for each thread, and return y."""
    load()
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    image = build_file([PLANTED / "defects.cu"], active(), ucontext=ucontext).read_bytes()
    function = cuda.module_from_buffer(image).get_function(kernel)
    y = np.zeros((blocks + 1) * threads, np.float32)
    memory = cuda.mem_alloc(y.nbytes)
    cuda.memcpy_htod(memory, y)
    address = np.uintp(int(memory))
    if freed:
        memory.free()
    function(address, np.uint32(y.size), block=(threads, 1, 1), grid=(blocks, 1), shared=4 * threads)
    cuda.Context.synchronize()
    if not freed:
        cuda.memcpy_dtoh(y, memory)
        memory.free()
    del function, memory
    context.pop()
    context.detach()
    return [float(value) for value in y]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.launch", description=__doc__)
    parser.add_argument("kernel")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--freed", action="store_true", help="give the kernel memory that has been freed")
    parser.add_argument("--ucontext", action="store_true", help="switch fibers by the portable functions")
    options = parser.parse_args()
    values = launch(options.kernel, options.blocks, options.threads, options.freed, options.ucontext)
    sys.stdout.write(json.dumps(values) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
