"""Ask pip whether sharednorm can be installed beside packages that bring protobuf or grpcio: `make resolve`.

For each package pip resolves three sets, without installing anything: the package alone, beside `sharednorm`, and
beside `sharednorm[server]`. sharednorm fits if pip finds an answer and takes the same release as it takes alone: not an
old one that happens to ask for less. The table goes into docs/dependencies.md.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "dependencies.md"
PACKAGES = ("flwr", "tritonclient[grpc]", "tensorflow", "tensorboard", "onnx", "wandb")
SHOWN = ("protobuf", "grpcio")

_TABLE = re.compile(r"(?<=<!-- resolved -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Pip:
    """pip of a new virtual environment, so that nothing that is installed here has a say."""

    python: Path

    @classmethod
    def create(cls, home: Path) -> Pip:
        """Make the environment, with the newest pip."""
        venv.create(home, with_pip=True, symlinks=True)
        pip = cls(home / "bin" / "python")
        pip("install", "--quiet", "--upgrade", "pip")
        return pip

    def __call__(self, *arguments: str) -> str:
        """Run a command of pip's; its failure is one here, with what it said."""
        command = [str(self.python), "-m", "pip", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if result.returncode:
            raise RuntimeError(f"pip {' '.join(arguments)}:\n{result.stderr}")
        return result.stdout

    def resolve(self, *requirements: str) -> dict[str, str]:
        """Return the releases that pip would install, by the packages' normalized names."""
        text = self("install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *requirements)
        found = [each["metadata"] for each in json.loads(text)["install"]]
        return {normalized(each["name"]): each["version"] for each in found}


def normalized(name: str) -> str:
    """Return a package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def row(pip: Pip, wheel: Path, package: str) -> tuple[str, bool]:
    """Return a package's line of the table, and whether sharednorm fits beside its current release."""
    name = normalized(package.partition("[")[0])
    try:
        alone = pip.resolve(package)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return f"| {package} | cannot be installed alone | | | |", False
    cells = [f"{package} | {alone[name]}"]
    fits = True
    for ours in (str(wheel), f"{wheel}[server]"):
        try:
            found = pip.resolve(ours, package)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            cells.append("does not resolve")
            fits = False
            continue
        versions = ", ".join(f"{each} {found[each]}" for each in SHOWN)
        same = found[name] == alone[name]
        cells.append(versions if same else f"**only {found[name]}**, {versions}")
        fits = fits and same
    limits = ", ".join(f"{each} {alone[each]}" for each in SHOWN if each in alone) or "neither"
    cells.insert(1, limits)
    return f"| {' | '.join(cells)} |", fits


def table(date: datetime.date, lines: list[str]) -> str:
    """Return what stands in the page."""
    head = [
        f"Resolved {date.isoformat()} on {platform.system()} {platform.machine()}, Python {platform.python_version()}.",
        "",
        "| package | current release | it takes alone | with `sharednorm` | with `sharednorm[server]` |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def main() -> int:
    """Resolve everything, write the table, and fail if sharednorm does not fit beside one of the packages."""
    lines, unfit = [], []
    with tempfile.TemporaryDirectory() as directory:
        pip = Pip.create(Path(directory, "environment"))
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", directory, str(ROOT))
        (wheel,) = Path(directory).glob("*.whl")
        for package in PACKAGES:
            line, fits = row(pip, wheel, package)
            print(line, flush=True)
            lines.append(line)
            if not fits:
                unfit.append(package)
    date = datetime.datetime.now(datetime.timezone.utc).date()
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda _: table(date, lines), text), encoding="utf-8")
    if unfit:
        print(f"not shown to fit beside the current release of: {', '.join(unfit)}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
