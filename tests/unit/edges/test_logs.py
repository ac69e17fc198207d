"""The log: for people, and for programs; and that one finds what belongs to a call."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import sharednorm
from sharednorm_server.observability.logs import configure, in_call, new_call
from tests.support.processes.server import server_process


@contextmanager
def configured(level: str, form: str) -> Iterator[logging.Logger]:
    """Give a logger whose records go where a process that is configured so has them; pytest's handlers stand aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        before = logging.root.level
        configure(level, form)
        yield logging.getLogger("sharednorm_server.test")
        logging.root.setLevel(before)


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    call = new_call("Forward")
    with configured("info", "human") as log:
        log.debug("nobody sees that")
        log.warning("two\nlines")
        with in_call(call):
            log.info("of a %s", "call")
            log.info("two\nlines")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"[-\d]+ [:,\d]+ WARNING sharednorm_server\.test: two", lines[0])
    assert lines[2].endswith(f" INFO sharednorm_server.test: of a call [Forward {call.id}]")
    assert lines[3].endswith(f"two [Forward {call.id}]")
    assert lines[4] == "lines"


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    call = new_call("Forward")
    with configured("debug", "json") as log:
        with in_call(call):
            log.error('defect "%s"', "x", exc_info=ValueError("é\n"))
        log.debug("later")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first.pop("exception").endswith("ValueError: é\n")
    assert first == {
        "level": "error", "logger": "sharednorm_server.test", "message": 'defect "x"', "method": "Forward",
        "request_id": call.id,
    }  # fmt: skip
    assert second.keys() == {"time", "level", "logger", "message"}


def test_calls_are_told_apart() -> None:
    assert len({new_call("A").id for _ in range(100)}) == 100


def test_what_a_server_logs_of_a_call() -> None:
    with server_process("--log-format", "json", "--log-level", "debug") as process:
        with sharednorm.connect(process.address) as hub:
            for _ in range(2):
                with pytest.raises(sharednorm.LayerNotFound):
                    hub.layer("none")
        process.stop()
        records = [json.loads(line) for line in process.log().splitlines()]
    refused = [record for record in records if "refused: LAYER_NOT_FOUND" in record["message"]]
    assert [record["method"] for record in refused] == ["GetLayer"] * 2
    assert len({record["request_id"] for record in refused}) == 2
    assert any(record["message"].startswith("stopping: ") and "request_id" not in record for record in records)
