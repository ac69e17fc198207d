"""Every reason of an error that the contract or a page names is one that the library declares."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from sharednorm.errors import error_class
from sharednorm.v1 import direct_pb2, layer_pb2, service_pb2, tensor_pb2

ROOT = Path(__file__).parents[2]
CONTRACT = sorted((ROOT / "proto").rglob("*.proto"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

CODES = {code.name: code.value[0] for code in grpc.StatusCode}
VALUES = {
    value.name
    for module in (tensor_pb2, layer_pb2, service_pb2, direct_pb2)
    for enum in module.DESCRIPTOR.enum_types_by_name.values()
    for value in enum.values
}
# Words of the same form that name something else.
VARIABLES = ("SHAREDNORM_", "OTEL_")
OTHERS = {
    *("STATE_DIRECTORY", "XDG_STATE_HOME", "PIP_INDEX_URL"),  # other variables
    *("CPU_BASE", "CUDA_BASE", "CUDA_TOOLKIT"),  # arguments of the images
    *("SCM_RIGHTS", "RLIMIT_FSIZE"),  # of the operating system
    "NOT_SERVING",  # of the health service
    "UPPER_SNAKE",  # the form itself
}


def comments(path: Path) -> str:
    """Return the text of all comments of a file of the contract."""
    return " ".join(re.findall(r"^\s*// ?(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def strange(text: str) -> set[str]:
    """Return the words of a text that have the form of a reason, and are none, nor something else that there is."""
    words = set(re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b", text))
    others = {word for word in words if word.startswith(VARIABLES)} | VALUES | OTHERS | CODES.keys()
    return {word for word in words - others if error_class(word) is None}


def pairs(text: str) -> list[tuple[str, str]]:
    """Return each gRPC code behind which a text names a reason, and that."""
    return re.findall(rf"\b({'|'.join(CODES)}), `?([A-Z]+(?:_[A-Z]+)*)\b", text)


@pytest.mark.parametrize("path", CONTRACT, ids=lambda path: path.name)
def test_the_contract_names_reasons_that_there_are(path: Path) -> None:
    assert strange(comments(path)) == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_reasons_that_there_are(path: Path) -> None:
    assert strange(path.read_text(encoding="utf-8")) == set(), "a word of another kind belongs into OTHERS"


@pytest.mark.parametrize("path", [*CONTRACT, ROOT / "docs" / "protocol.md"], ids=lambda path: path.name)
def test_a_reason_stands_behind_its_own_code(path: Path) -> None:
    text = comments(path) if path.suffix == ".proto" else path.read_text(encoding="utf-8")
    for code, reason in pairs(text):
        cls = error_class(reason)
        assert cls is not None, reason
        assert cls.code == CODES[code], f"{code}, {reason}"


def test_the_contract_has_the_pairs_that_these_tests_look_for() -> None:
    assert len([pair for path in CONTRACT for pair in pairs(comments(path))]) > 50
