"""The command line: what it prints, where, and with which exit code; never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm import __version__
from sharednorm.errors import LimitExceeded
from sharednorm_server.cli.main import main
from sharednorm_server.config.options import OPTIONS
from tests.support.processes import server
from tests.support.stock import StockClient, channel_to


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    result = server.run(arguments)
    assert "Traceback" not in result.stdout + result.stderr
    return result


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"sharednorm {__version__}\n")


def test_help_names_the_commands_and_gives_an_example() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "serve" in result.stdout
    assert "example: sharednorm serve --listen" in result.stdout


def test_help_of_serve_explains_every_option() -> None:
    text = run("serve", "--help").stdout
    for name in OPTIONS:
        assert re.search(rf"^  --{name.replace('_', '-')}\b", text, re.MULTILINE), name
    assert "example: sharednorm serve" in text


@pytest.mark.parametrize(
    "arguments", [(), ("frobnicate",), ("serve", "--durability", "perhaps"), ("serve", "--frobnicate")]
)
def test_a_wrong_use_is_explained(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: sharednorm" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--listen", "nonsense"), "'nonsense' is not an address to listen on"),
        (("--listen", "0.0.0.0:0"), "pass --insecure if the network is trusted"),
        (("--device", "gpu"), "'gpu' is no device (expected: cpu, cuda, cuda:1, or several GPUs as cuda:0,cuda:1)"),
        (("--device-memory-bytes", "0"), "device-memory-bytes is 0 (expected: a size, at least 1)"),
        (
            ("--state", "postgres://me:secret@x"),
            "'postgres://x' is no state (expected: memory:, sqlite:///DIRECTORY, or sqlite:DIRECTORY",
        ),
        (("--state", "sqlite:///proc/x"), "the state cannot be kept in /proc/x: "),
        (("--workers", "0"), "--workers: workers is 0 (expected: a whole number, 1 to 1024)"),
        (("--workers", "many"), "--workers: workers is 'many' (expected: a whole number, 1 to 1024)"),
        (("--compute-threads", "0"), "compute-threads is 0 (expected: a whole number, at least 1)"),
        (("--shutdown-grace", "-1"), "shutdown-grace is -1.0"),
        (("--max-tensor-bytes", "much"), "'much' is not a size"),
        (("--activation-cache-bytes", "1GB"), "'1GB' is not a size"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run("serve", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("sharednorm: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_configuration_is_printed_and_nothing_is_started() -> None:
    result = run("serve", "--print-config", "--listen", "0.0.0.0:1", "--max-concurrent-rpcs", "7")
    assert (result.returncode, result.stderr) == (0, "")
    assert 'listen = "0.0.0.0:1"  # --listen\n' in result.stdout
    assert "max_concurrent_rpcs = 7  # --max-concurrent-rpcs\n" in result.stdout


def test_a_server_that_is_configured_by_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('state = "memory:"\nmax_layers = 1\n')
    environment = {"SHAREDNORM_MAX_TENSOR_BYTES": "1KiB"}
    with server.server_process("--config", str(file), env=environment) as process:
        for transport in ("grpc", "direct"):
            with sharednorm.connect(process.address, transport=transport) as hub:
                layer = hub.BatchNorm2D(3, name="a")
                with pytest.raises(LimitExceeded, match="max_layers = 1"):
                    hub.BatchNorm2D(3, name="b")
                for shape in ((10, 3, 10, 10), (10, 3, 400, 400)):
                    with pytest.raises(LimitExceeded) as caught:
                        layer(np.zeros(shape, np.float32))
                    assert caught.value.metadata == {"limit": "max_tensor_bytes", "value": "1024"}


def test_the_start_up_line() -> None:
    with server.server_process("--compute-threads", "2") as process:
        assert re.fullmatch(
            rf"sharednorm {re.escape(__version__)} listening on 127\.0\.0\.1:[1-9][0-9]*, "
            r"device cpu \(numba, 2 threads\), state memory:",
            process.banner,
        )
        assert process.stop() == 0
        assert process.process.stdout is not None
        assert process.process.stdout.read() == ""  # exactly one line


def test_the_start_up_line_of_a_socket(tmp_path: Path) -> None:
    with server.server_process("--compute-threads", "1", listen=f"unix:{tmp_path / 's'}") as process:
        assert f" listening on unix:{tmp_path / 's'}, device cpu (numba, 1 thread), state memory:" in process.banner


def test_the_start_up_line_is_one_line_in_the_characters_of_stdout(tmp_path: Path) -> None:
    with server.server_process(
        listen=f"unix:{tmp_path}/\n\u00e4", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ) as process:
        assert f" listening on unix:{tmp_path}/\\n\\xe4, device cpu " in process.banner


def test_a_server_without_stdout(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    command = [sys.executable, "-m", "sharednorm_server", "serve", "--listen", address]
    with subprocess.Popen(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + server.START_SECONDS
            while not (tmp_path / "s").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            listed = server.run(["ls", "--server", address])
            process.terminate()
            _, log = process.communicate(timeout=server.STOP_SECONDS)
        finally:
            process.kill()
    assert (listed.returncode, listed.stderr) == (0, "")
    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_the_arithmetic_is_the_one_that_was_asked_for() -> None:
    with server.server_process(env={"SHAREDNORM_ARITHMETIC": "numpy"}) as process:
        assert "device cpu (numpy, " in process.banner


def test_an_arithmetic_that_is_not_there() -> None:
    result = server.run(["serve", "--listen", "127.0.0.1:0"], env={"SHAREDNORM_ARITHMETIC": "abacus"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("sharednorm: ")
    assert "abacus" in result.stderr


def python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"} | env
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout


def test_grpc_does_not_hook_into_forks() -> None:
    code = "import sharednorm_server.server; from grpc._cython import cygrpc; print(cygrpc.is_fork_support_enabled())"
    assert python(code) == "False\n"


@pytest.mark.parametrize("missing", ["grpc_health", "grpc_reflection"])
def test_a_missing_extra_says_what_installs_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules.update({missing}=None, numba=None, ml_dtypes=None); "
        "from sharednorm_server.cli.main import main; sys.stderr = sys.stdout; print(main(['serve']))"
    )
    assert python(code) == f"sharednorm: the server needs {missing}: pip install 'sharednorm[server]'\n2\n"


def test_log_level_debug_tells_about_refused_calls() -> None:
    with server.server_process("--log-level", "debug") as process, channel_to(process.address) as channel:
        with pytest.raises(grpc.RpcError, match="does not exist"):
            StockClient.on(channel).stats("nobody")
        assert process.stop() == 0
        assert "GetStats refused: LAYER_NOT_FOUND" in process.log()


@pytest.mark.parametrize(
    "words", [["serve", "--http", "127.0.0.1:0"], ["watch", "--int", "1"], ["serve", "--grace", "1"]]
)
def test_an_option_has_no_other_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {words[1]}" in capsys.readouterr().err
