"""Programs that tests need and that are not Python packages."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import NEEDS_PROGRAM


def program(name: str) -> str:
    """Return the path of a program; without it the test is left out."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{NEEDS_PROGRAM}: {name}")
    return found
