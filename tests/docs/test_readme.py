"""What the documents say is so: their examples run and print what they say, and their commands are there.

A fenced block of Python is run; the block of text behind it is its output. All blocks of one document share their
variables, as if a reader typed them one after the other, and talk to a server that knows nothing yet.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

import sharednorm
from benchmarks.tables import updated
from sharednorm.errors import error_classes
from sharednorm_server.config.sources import settle
from sharednorm_server.observability.tracing import wanted
from tests.emulation.build import SANITIZERS
from tests.support import lock_audit
from tests.support.processes.make import make
from tests.support.processes.old_state import commands
from tests.support.processes.redis import redis_server
from tests.support.processes.server import server_process

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BUILTIN = (ValueError, TypeError, LookupError, ConnectionError, TimeoutError)
ADDRESS = "127.0.0.1:50051"  # of the documents, and a server's default

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]+)")


def _blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    found = _BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def _examples(document: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each block of Python with the output that it should have, or None if none is given."""
    blocks = _blocks(document, "python", "text")
    for index, (language, text) in enumerate(blocks):
        if language == "python":
            following = blocks[index + 1] if index + 1 < len(blocks) else ("", "")
            yield text, following[1] if following[0] == "text" else None


def _commands() -> list[str]:
    lines = [line for document in DOCUMENTS for _, text in _blocks(document, "sh") for line in text.splitlines()]
    return list(dict.fromkeys(line.partition(" #")[0].strip() for line in lines if line.strip()))


def _with_examples() -> Iterator[Any]:
    for document in DOCUMENTS:
        code = "".join(text for _, text in _blocks(document, "python"))
        if code:
            yield pytest.param(document, id=str(document), marks=[pytest.mark.torch] * ("import torch" in code))


@pytest.mark.parametrize("document", list(_with_examples()))
def test_examples_print_what_the_document_says(document: Path, tmp_path: Path) -> None:
    variables: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(server_process())
        boxes = {}
        if any("box-a:50051" in code for code, _ in _examples(document)):  # several servers, and what they share
            redis = stack.enter_context(redis_server(tmp_path / "redis"))
            state = "--state", redis.url()
            boxes = {f"box-{which}:50051": stack.enter_context(server_process(*state)).address for which in "ab"}
        for code, expected in _examples(document):
            printed = io.StringIO()
            local = code.replace(ADDRESS, server.address).replace("/tmp/", f"{tmp_path}/")
            for name, address in boxes.items():
                local = local.replace(name, address)
            with contextlib.redirect_stdout(printed):
                exec(compile(local, str(document), "exec"), variables)
            assert printed.getvalue() == (expected or ""), code


def test_the_readme_has_examples() -> None:
    assert len(list(_examples(Path("README.md")))) >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_into_the_repository_lead_somewhere(document: Path) -> None:
    links = _LINK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("command", _commands())
def test_commands_are_there(command: str) -> None:
    program = next((name for name in CHECKS if command.startswith(name)), None)
    assert program is not None, f"no test knows how to check the command {command!r}"
    CHECKS[program](command)


def _check_make(command: str) -> None:
    result = make(*shlex.split(command)[1:], "--dry-run")
    assert result.returncode == 0, result.stderr


def _check_schedule(command: str) -> None:
    setting, _, rest = command.partition(" ")
    _check_make(rest)
    name = setting.partition("=")[0]
    assert name in (ROOT / "tests" / "emulation" / "scheduler.cpp").read_text(encoding="utf-8")


def _check_audit(command: str) -> None:
    setting, _, rest = command.partition(" ")
    _check_make(rest)
    assert setting == f"{lock_audit.SWITCH}=1"


def _check_sanitizer(command: str) -> None:
    # What they do is tested beside them; here, that these words are understood.
    sanitizer, *arguments = command.partition(" tests.emulation.process ")[2].split()
    assert sanitizer in SANITIZERS
    assert (ROOT / arguments[-1]).exists()


def _check_pip(command: str) -> None:
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    asked = [name for names in re.findall(r"\[([\w,]+)\]", command) for name in names.split(",")]
    assert set(asked) <= set(declared)


def _check_packages(command: str) -> None:
    known = (ROOT / "examples" / "cpp" / "Makefile").read_text(encoding="utf-8")
    assert {*shlex.split(command)[2:]} <= {"make", *known.split()}


def _check_cpp(command: str) -> None:
    # It is built and run in test_cpp.py; here, that the file of that name is what make builds.
    path, address = shlex.split(command)
    dry = make("-C", "examples/cpp", "--dry-run")
    assert f"-o {Path(path).relative_to('examples/cpp')}" in dry.stdout
    assert address == ADDRESS


def _check_serve(command: str) -> None:
    arguments = shlex.split(command, comments=True)[2:]
    for option in ("--listen", "--http-listen"):
        if option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
            if option == "--http-listen":
                arguments += [option, "127.0.0.1:0"]
    if "--config" in arguments:
        with TemporaryDirectory() as made:
            file = Path(made) / arguments[arguments.index("--config") + 1]
            file.write_text(_toml_of("docs/configuration.md").replace("/run/sharednorm", made))
            words = ["-m", "sharednorm_server", "serve", "--config", str(file), "--print-config"]
            assert f"max_layers = 500  # {file}" in run_python(*words)
        return
    if "--help" in arguments:
        help_text = run_python("-m", "sharednorm_server", *shlex.split(command)[1:])
        assert "--listen" in help_text
        return
    if "--tokens" in arguments:
        with TemporaryDirectory() as made:
            make_keys(Path(made))
            paths = [f"{made}/{word}" if "/" in word or word == "tokens" else word for word in arguments]
            with server_process(*paths) as server:
                assert server.stop() == 0
        return
    with TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        if any(word.startswith("redis:") for word in arguments):
            redis = stack.enter_context(redis_server(Path(made) / "redis"))
            arguments = [word.replace("127.0.0.1:6379", redis.address) for word in arguments]
        server = stack.enter_context(server_process(*arguments))
        assert server.stop() == 0


def _toml_of(document: str) -> str:
    """Return the first file of TOML in a document."""
    return next(text for _, text in _blocks(Path(document), "toml"))


def _check_variable(command: str) -> None:
    setting, _, rest = shlex.join(shlex.split(command, comments=True)).partition(" ")
    name, _, value = setting.partition("=")
    assert rest == "sharednorm serve"
    found = settle({}, {name: value}, None)
    assert found.sources == {name.removeprefix("SHAREDNORM_").lower(): name}


def _check_compose(command: str) -> None:
    words = shlex.split(command)
    after = dict(itertools.pairwise(words))
    files = [words[place + 1] for place, word in enumerate(words) if word in {"-f", "--file"}]
    assert files
    profiles: set[str] = set()
    for file in files:
        composed = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        profiles |= {name for service in composed["services"].values() for name in service.get("profiles", ())}
    assert "--profile" not in after or after["--profile"] in profiles


def _check_owner(command: str) -> None:
    owner = shlex.split(command)[2]
    assert f"USER {owner}:{owner}" in (ROOT / "docker" / "cpu.Dockerfile").read_text(encoding="utf-8")


def _check_keys(command: str) -> None:
    with TemporaryDirectory() as place:
        make_keys(Path(place))
        (Path(place) / "docker" / "secrets").mkdir(parents=True)
        words = [*shlex.split(command)[1:], *(["--directory", "other"] if "certs" in command else [])]
        assert run_python("-m", "sharednorm_server", *words, cwd=place)


def make_keys(place: Path) -> None:
    """Make the files that the server of the README is started with."""
    for words in ("certs create --directory certs --host localhost", "token create --file tokens --name ana"):
        run_python("-m", "sharednorm_server", *words.split(), cwd=str(place))


def _check_upkeep(command: str) -> None:
    with TemporaryDirectory() as place, server_process("--state", f"sqlite://{place}") as server:
        with sharednorm.connect(server.address) as hub:
            hub.BatchNorm2D(2, name="stem/bn")(np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1))
        words = [word.replace("12000", "1") for word in shlex.split(command, comments=True)[1:]]
        assert run_python("-m", "sharednorm_server", *words, "--server", server.address)


def _check_migrate(command: str) -> None:
    with TemporaryDirectory() as place, redis_server(Path(place) / "redis", "--appendonly", "yes") as redis:
        with server_process("--state", f"sqlite://{place}/state") as server, sharednorm.connect(server.address) as hub:
            hub.BatchNorm2D(2, name="stem/bn")(np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1))
            assert server.stop() == 0
        words = [*shlex.split(command)[1:]]
        words = [word.replace("/var/lib/sharednorm", f"{place}/state") for word in words]
        words = [word.replace("127.0.0.1:6379", redis.address) for word in words]
        printed = "copied 1 layer\n"
        if len(words) == 2:  # to the layout of this release
            for filling in commands("redis-1", "sharednorm"):
                redis.ask(*filling)
            printed = f"{words[1]} has the layout of this release: 4 layers changed\n"
        assert run_python("-m", "sharednorm_server", *words) == printed


def _check_tending(command: str) -> None:
    with TemporaryDirectory() as place, server_process() as server:
        with sharednorm.connect(server.address) as hub:
            hub.BatchNorm2D(2, name="stem/bn")(np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1))
        words = [*shlex.split(command)[1:], "--server", server.address]
        if "import" in words:
            run_python("-m", "sharednorm_server", "export", "layers", "--server", server.address, cwd=place)
        assert run_python("-m", "sharednorm_server", *words, cwd=place)


def _check_completion(command: str) -> None:
    assert run_python("-m", "sharednorm_server", *shlex.split(command)[1:])


def test_the_commands_are_those_that_there_are() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    usage = run_python("-m", "sharednorm_server", "--help")
    there = set(re.findall(r"^    (\w+)\s", usage, re.MULTILINE))
    assert len(there) >= 14
    assert all(f"`{name}" in page for name in there)


def _check_traces(command: str) -> None:
    variable, *words = shlex.split(command)
    name, _, value = variable.partition("=")
    assert wanted({name: value}) == "otlp"
    _check_serve(shlex.join(words))


def _check_help(command: str) -> None:
    assert "usage: sharednorm" in run_python("-m", "sharednorm_server", *shlex.split(command)[1:])


def _check_bench(command: str) -> None:
    with server_process() as server:
        words = [*shlex.split(command)[1:], "--server", server.address, "--seconds", "0.01"]
        assert "backward" in run_python("-m", "sharednorm_server", *words)


def _check_query(command: str) -> None:
    with server_process() as server:
        run_python(str(ROOT / "examples" / "remote.py"), server.address, "2")
        printed = run_python("-m", "sharednorm_server", *shlex.split(command)[1:], "--server", server.address)
    assert "example/bn" in printed


def _check_doctor(command: str) -> None:
    assert "serve --device cpu" in run_python("-m", "sharednorm_server", *shlex.split(command)[1:])


def _check_script(command: str) -> None:
    script, *arguments = shlex.split(command)[1:]
    with server_process() as server:
        given = arguments or ([server.address, "2"] if "remote" in script else [])
        assert run_python(str(ROOT / script), *given)


def run_python(*arguments: str, cwd: str | None = None) -> str:
    """Run this Python on something that must succeed and say nothing on stderr; return what it prints."""
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


CHECKS: dict[str, Callable[[str], None]] = {
    "make ": _check_make,
    "SHAREDNORM_EMULATED_SCHEDULE=": _check_schedule,
    "SHAREDNORM_LOCK_AUDIT=": _check_audit,
    ".venv/bin/python -m tests.emulation.process ": _check_sanitizer,
    "pip install ": _check_pip,
    "apt-get install ": _check_packages,
    "examples/cpp/build/client ": _check_cpp,
    "sharednorm serve": _check_serve,
    "SHAREDNORM_MAX_LAYERS=": _check_variable,
    "OTEL_EXPORTER_OTLP_ENDPOINT=": _check_traces,
    "docker compose ": _check_compose,
    "chown ": _check_owner,
    "sharednorm certs create": _check_keys,
    "sharednorm token create": _check_keys,
    "sharednorm --help": _check_help,
    "sharednorm stats --help": _check_help,
    "sharednorm completion": _check_completion,
    "sharednorm export": _check_tending,
    "sharednorm import": _check_tending,
    "sharednorm watch": _check_tending,
    "sharednorm delete": _check_tending,
    "sharednorm snapshots": _check_upkeep,
    "sharednorm rollback": _check_upkeep,
    "sharednorm backup": _check_upkeep,
    "sharednorm migrate": _check_migrate,
    ".venv/bin/sharednorm doctor": _check_doctor,
    ".venv/bin/sharednorm bench": _check_bench,
    ".venv/bin/sharednorm ls": _check_query,
    ".venv/bin/sharednorm stats": _check_query,
    ".venv/bin/python examples/": _check_script,
}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: str(path.name))
def test_examples_run(script: Path) -> None:
    _check_script(f"python {script.relative_to(ROOT)}")


def test_the_readme_lists_every_error_as_it_is() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (\w+) \| (?:`(\w+)`)? ?\|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    codes = {number: code.name for code in grpc.StatusCode for number, _ in [code.value]}
    assert rows == [
        (cls.__name__, cls.reason, codes[cls.code], next((b.__name__ for b in cls.__bases__ if b in BUILTIN), ""))
        for cls in error_classes()
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_quote_the_results_that_are_committed(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert updated(text) == text, "python -m benchmarks.tables writes them"


def test_every_reason_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### ([A-Z_]+)$", page, re.MULTILINE)) == sorted({cls.reason for cls in error_classes()})


def test_every_page_is_on_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r": (\w+\.md)$", site, re.MULTILINE)) == pages | {"readme.md", "changelog.md"}
