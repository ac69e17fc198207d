"""All checks of this machine, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharednorm_server.doctor import gpus, machine
from sharednorm_server.doctor.checks import Check, reason


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        checks: Every check, in order.
        verdicts: For each device that could be asked for, why a server cannot start with it; "" if one can.
    """

    checks: tuple[Check, ...]
    verdicts: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return all of it in lists, dictionaries and texts."""
        return {
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "devices": {name: {"ready": not why, "reason": why} for name, why in self.verdicts.items()},
        }


def examine(*, cuda: bool) -> Report:
    """Look at this machine; with `cuda` at its GPUs, too."""
    here = machine.examine()
    checks, verdicts = here.checks, {"cpu": reason((*here.server, *here.cpu))}
    if cuda:
        found = gpus.examine()
        checks += (*found.common, *found.each)
        needed = (*here.server, *found.common)
        # "cuda" is the first; without any, the driver's check says so.
        verdicts["cuda"] = reason((*needed, *found.each[:1]))
        verdicts |= {check.name: reason((*needed, check)) for check in found.each[1:]}
    return Report(checks, verdicts)
