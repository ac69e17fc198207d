"""Which implementation of the arithmetic a process uses."""

from __future__ import annotations

import importlib.util
import os

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.numpy_impl import NumpyArithmetic
from sharednorm.errors import InvalidConfiguration

ARITHMETIC_VARIABLE = "SHAREDNORM_ARITHMETIC"
INSTALL_NUMBA = "pip install 'sharednorm[fast]'"


def arithmetic(name: str | None = None) -> Arithmetic:
    """Return an implementation.

    Args:
        name: "numpy", "numba", or None: what the environment variable SHAREDNORM_ARITHMETIC names, else numba
            where it is installed, else NumPy.

    Raises:
        InvalidConfiguration: Another name, or numba is asked for and not installed.
    """
    chosen = name or os.environ.get(ARITHMETIC_VARIABLE)
    if not chosen:
        chosen = "numba" if importlib.util.find_spec("numba") else "numpy"
    if chosen == "numpy":
        return NumpyArithmetic()
    if chosen != "numba":
        raise InvalidConfiguration(f"there is no arithmetic {chosen!r} (expected: 'numpy' or 'numba')")
    if not importlib.util.find_spec("numba"):
        raise InvalidConfiguration(f"the arithmetic 'numba' needs the package numba: {INSTALL_NUMBA}")
    from sharednorm.arithmetic.numba.implementation import NumbaArithmetic  # noqa: PLC0415 - importing numba takes a moment

    return NumbaArithmetic()
