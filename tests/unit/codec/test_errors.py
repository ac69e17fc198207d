"""The table of errors, and what they become for the wire."""

from __future__ import annotations

import ast
import inspect
import pickle
import re

import grpc
import pytest

from sharednorm import errors
from sharednorm.codec.convert import ERROR_KEY, error_from_detail, error_to_detail, error_to_status
from sharednorm.errors import (
    InternalError,
    LayerNotFound,
    SharedNormError,
    error_class,
    error_classes,
)
from sharednorm.v1 import service_pb2

every_error = pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)

ANYTHING_IN_TEXT = "Grad hat 3 Maps, erwartet 5 — 層 \U0001f9ca\n\ttab, 100 % and \x00"


# --- The table --------------------------------------------------------------------------------------


def drawn_hierarchy() -> dict[str, str]:
    """Read the drawing at the top of the module: class name to the name of its base."""
    bases, path = {}, ["SharedNormError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│ ]*)[├└]── (\w+)", line)
        if match:
            depth = len(match[1]) // 4 + 1
            bases[match[2]] = path[depth - 1]
            path[depth:] = [match[2]]
    return bases


def test_the_drawing_shows_every_class_under_its_base() -> None:
    assert drawn_hierarchy() == {cls.__name__: cls.__bases__[0].__name__ for cls in error_classes()}


def test_every_class_of_the_module_is_in_the_table() -> None:
    defined = [node.name for node in ast.walk(ast.parse(inspect.getsource(errors))) if isinstance(node, ast.ClassDef)]
    assert ["SharedNormError", *(cls.__name__ for cls in error_classes())] == defined


@every_error
def test_a_reason_is_one_word_and_finds_its_class(cls: type[SharedNormError]) -> None:
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", cls.reason)
    assert error_class(cls.reason) is cls
    assert cls.code in {code.value[0] for code in grpc.StatusCode}
    assert cls.code != grpc.StatusCode.OK.value[0]


def test_a_second_class_of_a_reason_is_refused() -> None:
    with pytest.raises(TypeError, match="share the reason INVALID_SHAPE"):
        type("Other", (SharedNormError,), {}, reason="INVALID_SHAPE", code=3)
    assert error_class("INVALID_SHAPE") is errors.InvalidShape


@every_error
def test_errors_cross_a_process_boundary_whole(cls: type[SharedNormError]) -> None:
    error = pickle.loads(pickle.dumps(cls(ANYTHING_IN_TEXT, {"maps": "3"})))
    assert (type(error), error.message, error.metadata) == (cls, ANYTHING_IN_TEXT, {"maps": "3"})
    assert str(error) == ANYTHING_IN_TEXT


@every_error
@pytest.mark.parametrize(
    "value", [ANYTHING_IN_TEXT, ValueError("of a library"), ValueError(), OSError(2, "gone"), 7, None, b"bytes", ["a"]]
)
def test_an_error_is_made_of_whatever_a_text_is_made_of(cls: type[SharedNormError], value: object) -> None:
    error = cls(value)
    assert (error.message, str(error), error.args, error.metadata) == (str(value), str(value), (str(value),), {})
    assert str(pickle.loads(pickle.dumps(error))) == str(value)


@every_error
def test_an_error_is_raised_again_as_libraries_do(cls: type[SharedNormError]) -> None:
    """As Gymnasium's AsyncVectorEnv does with what a worker has raised: by its class, of the error itself."""
    value = cls("Data has 4 maps (expected: 3)", {"maps": "4"})
    with pytest.raises(cls) as caught:
        raise type(value)(value)
    assert (caught.value.message, caught.value.metadata) == (value.message, value.metadata)
    assert caught.value.metadata is not value.metadata
    assert cls(value, {}).metadata == {}
    assert str(cls()) == ""


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 5000, "層" * 5000, "\ud800" * 5000])
def test_messages_are_cut_to_4_kib_of_whole_characters(text: str) -> None:
    message = InternalError(text).message
    assert 4096 - 3 <= len(message.encode("utf-8")) <= 4096
    assert text.encode("utf-8", "backslashreplace").decode().startswith(message)


# --- Details ----------------------------------------------------------------------------------------


@every_error
def test_an_error_survives_as_a_detail(cls: type[SharedNormError]) -> None:
    sent = cls(ANYTHING_IN_TEXT, {"limit": "max_tensor_bytes", "Größe": "12"})
    detail = service_pb2.ErrorDetail.FromString(error_to_detail(sent).SerializeToString())
    got = error_from_detail(detail)
    assert (type(got), got and got.message, got and got.metadata) == (cls, sent.message, sent.metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {"maps": "9" * 100_000},
        {f"field {number}": "é" * 50 for number in range(1000)},
        {"k" * 100_000: "v"},
        {"\ud800": "\udfff" * 900},
        {"é" * 400: "é" * 400},
    ],
    ids=["long value", "many", "long key", "surrogates", "two bytes a character"],
)
def test_metadata_is_cut_to_1_kib(metadata: dict[str, str]) -> None:
    detail = error_to_detail(InternalError("m" * 4096, metadata))
    assert sum(len((key + value).encode()) for key, value in detail.metadata.items()) <= 1024
    assert len(detail.SerializeToString()) < 5632
    assert len(detail.metadata) >= 1


def test_short_metadata_is_not_cut_by_what_comes_after_it() -> None:
    detail = error_to_detail(InternalError("m", {"first": "whole", "second": "x" * 5000, "third": "y"}))
    assert detail.metadata["first"] == "whole"
    assert set(detail.metadata) == {"first", "second"}


def test_the_status_message_is_short_and_ascii_whatever_the_error_says() -> None:
    code, text, trailing = error_to_status(LayerNotFound("層" * 2000, {}))
    assert code is grpc.StatusCode.NOT_FOUND
    assert text.isascii()
    assert len(text) <= 512
    assert [key for key, _ in trailing] == [ERROR_KEY]
