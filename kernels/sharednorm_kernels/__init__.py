"""The CUDA kernels of batch normalization, and the Python that finds them and says how they are launched.

The kernels stand in `*.cu` and `*.cuh`; `make kernels` compiles them to one fatbin, which a server loads with
`pycuda.driver.module_from_buffer(fatbin())`. `plan` says which kernel serves which shape. Nothing here needs a GPU.
"""

from __future__ import annotations

from sharednorm_kernels.files import FatbinMissing, fatbin, sources
from sharednorm_kernels.launch_config import (
    SUFFIXES,
    DeviceLimits,
    Fused,
    Geometry,
    Plan,
    View,
    entry,
    finish_geometry,
    map_geometry,
    plan,
    view_of,
)

__all__ = [
    "SUFFIXES",
    "DeviceLimits",
    "FatbinMissing",
    "Fused",
    "Geometry",
    "Plan",
    "View",
    "entry",
    "fatbin",
    "finish_geometry",
    "map_geometry",
    "plan",
    "sources",
    "view_of",
]
