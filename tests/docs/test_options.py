"""The page about the configuration says what the server says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from sharednorm.codec import wire
from sharednorm.core import limits
from sharednorm_server.direct.shared_memory import MAX_REGIONS
from sharednorm_server.groups.coordinator import MAX_GROUPS
from sharednorm_server.http.server import MAX_CONNECTIONS

ROOT = Path(__file__).parents[2]


def test_the_table_of_options_is_that_of_the_server() -> None:
    spec = importlib.util.spec_from_file_location("options", ROOT / "docs" / "options.py")
    assert spec is not None
    assert spec.loader is not None
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    page = options.PAGE.read_text(encoding="utf-8")
    assert options.updated(page) == page, "python docs/options.py writes it"
    assert page.count("| `--") >= 28


def test_what_is_fixed_is_what_it_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").partition("## What is fixed")[2]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE))
    numbers = {what: [int(each) for each in re.findall(r"\d+", told)] for what, told in rows.items() if what != "---"}
    assert numbers == {
        "maps of a layer": [limits.MAX_MAPS],
        "axes of a tensor": [wire.MAX_RANK, 2, 5],
        "bytes of a layer's name": [limits.MAX_NAME_BYTES],
        "characters of a namespace, of a domain's name, of a group's name": [
            limits.MAX_NAMESPACE_CHARACTERS, limits.MAX_DOMAIN_NAME_CHARACTERS, limits.MAX_GROUP_NAME_CHARACTERS
        ],
        "domains of a layer": [limits.MAX_DOMAINS],
        "members of a group; groups of a server": [limits.MAX_GROUP_MEMBERS, MAX_GROUPS],
        "seconds of a group's timeout": [limits.MAX_GROUP_SECONDS],
        "requests in one `BatchPushMoments` or `BatchGetStats`, and maps of them all": [
            limits.MAX_BATCH_ENTRIES, limits.MAX_BATCH_MAPS
        ],
        "bytes of a tensor in one message; larger ones come as a stream, or on a direct connection": [
            wire.MAX_UNARY_BYTES
        ],
        "regions of shared memory of one client": [MAX_REGIONS],
        "connections by HTTP at a time": [MAX_CONNECTIONS],
    }  # fmt: skip
