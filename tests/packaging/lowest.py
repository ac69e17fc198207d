"""Print the oldest releases that pyproject.toml allows, as constraints for pip: `python tests/packaging/lowest.py`.

Of what users install; what only tests and checks need is left as it comes. Needs nothing but Python 3.10, since it runs
before anything is installed.
"""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
USERS = ("fast", "bfloat16", "hdf5", "safetensors", "server", "redis", "traces")

_LOWEST = re.compile(r'"([\w-]+)>=([\d.]+)')


def lowest() -> dict[str, str]:
    """Return the oldest release of each package."""
    text = PROJECT.read_text(encoding="utf-8")
    lists = [re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)]
    lists += [re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL) for name in USERS]
    found: dict[str, str] = {}
    for each in lists:
        assert each is not None, "pyproject.toml has lost a list of packages"
        found |= dict(_LOWEST.findall(each[1]))
    return found


if __name__ == "__main__":
    for name, version in lowest().items():
        print(f"{name}=={version}")
