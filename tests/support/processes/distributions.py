"""Building the distributions, and clean virtual environments made without a download."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
# What `pip install sharednorm` brings: the three packages that it asks for, and what grpcio asks for.
CLIENT_DEPENDENCIES = ("numpy", "grpcio", "protobuf", "typing_extensions")
# What the build backend needs where it runs without isolation.
BACKEND = ("hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")


@dataclass(frozen=True)
class Distributions:
    """The two files that a release consists of."""

    wheel: Path
    sdist: Path


def run(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command for at most 100 seconds and return its output."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )


def build(source: Path, out: Path, *formats: str) -> None:
    """Build distributions with the backend that is installed here, without a download.

    Without a format: the sdist, and from it the wheel.
    """
    result = run([sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", out, source])
    assert result.returncode == 0, result.stdout + result.stderr


@dataclass(frozen=True)
class Environment:
    """A virtual environment whose packages are links into the one that runs the tests."""

    home: Path

    @classmethod
    def create(cls, home: Path, distributions: Iterable[str] = CLIENT_DEPENDENCIES) -> Environment:
        """Make one with some distributions and nothing else, not even pip."""
        venv.create(home, with_pip=False, symlinks=True)
        environment = cls(home)
        for name in distributions:
            environment._borrow(name)
        return environment

    @property
    def site(self) -> Path:
        """Where its packages are."""
        return self.home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    @property
    def bin(self) -> Path:
        """Where its commands are."""
        return self.home / "bin"

    def install(self, *arguments: str | Path) -> None:
        """Install from local files alone; a dependency that is not there is an error."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet", "--no-index"]
        result = run([*pip, *arguments])
        assert result.returncode == 0, result.stdout + result.stderr

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run code in it, away from the checkout and from the environment variables that steer Python."""
        return run([self.bin / "python", "-I", "-c", code], cwd=self.home)

    def _borrow(self, name: str) -> None:
        distribution = importlib.metadata.distribution(name)
        files = [file for file in distribution.files or () if not file.parts[0].startswith("..")]
        assert files, f"{name} does not say which files it has"
        # google is a namespace that several distributions fill: its children are linked, and not it.
        entries = {file.parts[: 2 if file.parts[0] == "google" else 1] for file in files}
        for parts in entries - {("__pycache__",)}:
            target = self.site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(str(distribution.locate_file("/".join(parts)))))
