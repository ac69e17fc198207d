"""The rooms of the house, as docs/architecture.md draws them: `python -m tests.support.rooms` prints their sizes.

A room is a package directly below `sharednorm` or `sharednorm_server`, or a module that stands there by itself.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = {"sharednorm": "client", "sharednorm_server": "server", "sharednorm_kernels": "kernels"}
GENERATED = "sharednorm.v1"
_SOURCES = {".py", ".cu", ".cuh"}


def modules() -> dict[str, Path]:
    """Return the modules of the three packages, by their full names."""
    found = {}
    for folder in FOLDERS.values():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """Return the room of a module, "sharednorm.codec" for example; the package itself for what stands in its root."""
    parts = module.split(".")
    return ".".join(parts[:1] if parts[1:] in (["_version"], ["__main__"], ["__init__"]) else parts[:2])


def drawing(package: str) -> dict[str, set[str]]:
    """Return the rooms of a package in the order of the arrows, and which rooms each may import.

    That is whatever an arrow of the drawing leads to, and on.
    """
    found = re.search(rf"%% {package}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    if not found:
        raise ValueError(f"{PAGE.name} has no drawing of {package}")
    arrows: dict[str, set[str]] = {}
    for line in found[1].splitlines():
        steps = [[name.strip() for name in step.split("&")] for step in line.split("-->")]
        for names, following in zip(steps, [*steps[1:], []], strict=True):
            for name in filter(None, names):
                arrows.setdefault(name, set()).update(following)

    def reached(room: str) -> set[str]:
        return arrows[room].union(*(reached(each) for each in arrows[room]))

    return {f"{package}.{room}": {f"{package}.{each}" for each in reached(room)} for room in arrows}


def sizes() -> list[tuple[str, int, int]]:
    """Return each room, in the order of the arrows, with its files and its lines; generated code is left out."""
    rows = []
    for package, folder in FOLDERS.items():
        rooms: dict[str, list[Path]] = {room: [] for room in (*_order(package), package)}
        for path in sorted((ROOT / folder / package).rglob("*")):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            if path.suffix in _SOURCES and room_of(name) != GENERATED:
                rooms[room_of(name) if len(rooms) > 1 else package].append(path)
        for room, paths in rooms.items():
            rows.append((room, len(paths), sum(len(path.read_bytes().splitlines()) for path in paths)))
    return rows


def _order(package: str) -> list[str]:
    return [] if package == "sharednorm_kernels" else list(drawing(package))


def main() -> None:
    """Print the sizes as a table."""
    rows = sizes()
    for room, files, lines in (*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))):
        sys.stdout.write(f"{room:32} {files:4} files {lines:7} lines\n")


if __name__ == "__main__":
    main()
