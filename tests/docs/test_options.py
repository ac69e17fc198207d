"""The page about the configuration says what the server says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
