"""Both distributions, built once for each process that runs these tests."""

from __future__ import annotations

import pytest

from tests.support.processes.distributions import ROOT, Distributions, build


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist of this checkout, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Distributions(wheel, sdist)
