"""Commands that ask a server, as somebody types them."""

from __future__ import annotations

from sharednorm_server.server import RunningServer
from tests.support.processes.server import run


def done(server: RunningServer, *words: str) -> str:
    """Run a command that has to succeed and to say nothing on stderr; return what it prints."""
    result = run([*words, "--server", server.address])
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refused(server: RunningServer, *words: str) -> str:
    """Run a command that has to fail, with one line; return the line."""
    result = run([*words, "--server", server.address])
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("sharednorm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
