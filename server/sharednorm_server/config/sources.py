"""Where a server's configuration comes from: flags, then the environment, then a file, then the defaults."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.config.options import DEFAULTS, OPTIONS, Option, ServerConfig, default_state
from sharednorm_server.errors import StartError

PREFIX = "SHAREDNORM_"
FILE_VARIABLE = "SHAREDNORM_CONFIG"

# Variables of that prefix which are others' business.
_ELSEWHERE = {FILE_VARIABLE, "SHAREDNORM_TOKEN", "SHAREDNORM_TLS_CA", "SHAREDNORM_ARITHMETIC", "SHAREDNORM_NUM_THREADS",
              "SHAREDNORM_FATBIN"}  # fmt: skip

_TOML_QUOTES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


@dataclass(frozen=True)
class Settings:
    """A server's configuration, and what each option of it was set by: a flag, a variable, a file, or nothing."""

    config: ServerConfig
    sources: Mapping[str, str]

    def toml(self) -> str:
        """Return it as the file that would give the same."""
        lines = []
        for name, option in OPTIONS.items():
            value, source = getattr(self.config, name), self.sources.get(name, "the default")
            if value is None and option.unset:
                lines.append(f"# {name} =  # {option.unset}")
                continue
            lines.append(f"{name} = {_toml(option, value)}  # {source}")
        return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of a server."""
    for name, option in OPTIONS.items():
        words = option.help.replace("%", "%%")
        # What is not given is not there, so that the environment and the file can be asked.
        about: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{words}; default: {default_text(name)}"}
        if option.flag:
            about |= {"action": "store_const", "const": "true", "help": words}
        elif option.choices:
            about |= {"choices": option.choices}
        else:
            about |= {"metavar": option.metavar}
        parser.add_argument(f"--{name.replace('_', '-')}", **about)


def default_text(name: str) -> str:
    """Return what an option is if nobody says anything, in words."""
    if name == "state":
        return "a directory of $STATE_DIRECTORY or $XDG_STATE_HOME, or ~/.local/state/sharednorm"
    option, value = OPTIONS[name], DEFAULTS[name]
    return option.unset if value is None and option.unset else option.show(value)


def settle(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> Settings:
    """Return the configuration that flags, variables and a file make together; each goes before those behind it.

    Args:
        flags: What the command line says, by the names of options; others may be among it.
        environment: The variables, of which those that begin with SHAREDNORM_ count.
        file: A TOML file with options at its top; None: the one that SHAREDNORM_CONFIG names, if any.

    Raises:
        StartError: The file cannot be read.
        InvalidConfiguration: There is an option that no server has, or a value is out of its range.
    """
    where = Path(environment[FILE_VARIABLE]) if file is None and environment.get(FILE_VARIABLE) else file
    found: dict[str, tuple[str, str]] = {}
    if where is not None:
        found |= {name: (text, str(where)) for name, text in _read(where).items()}
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable == PREFIX + name.upper() and name in OPTIONS:
            found[name] = text, variable
        elif variable.startswith(PREFIX) and variable not in _ELSEWHERE:
            _require_no_other(variable)
    found |= {name: (text, f"--{name.replace('_', '-')}") for name, text in flags.items() if name in OPTIONS}
    values: dict[str, Any] = {"state": default_state()}
    for name, (text, source) in found.items():
        values[name] = _value(name, text, source)
    return Settings(ServerConfig(**values), {name: source for name, (_, source) in found.items()})


def _value(name: str, text: str, source: str) -> Any:
    try:
        return OPTIONS[name].read(name, text)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{source}: {error.message}") from None


def _read(path: Path) -> dict[str, str]:
    toml = _toml_library()
    try:
        document = toml.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"the configuration {path} cannot be read: {error}") from error
    except toml.TOMLDecodeError as error:
        raise StartError(f"{path} is no TOML: {error}") from error
    texts = {}
    for name, value in document.items():
        if name not in OPTIONS:
            raise InvalidConfiguration(f"{path}: there is no option {name!a}{_perhaps(name)}")
        if not isinstance(value, (str, int, float)):
            raise InvalidConfiguration(f"{path}: {name} is of a wrong type (expected: {OPTIONS[name].expected})")
        texts[name] = str(value)
    return texts


def _toml_library() -> Any:
    try:
        return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError as error:
        raise StartError(f"a configuration file needs {error.name}: pip install 'sharednorm[server]'") from error


def _require_no_other(variable: str) -> None:
    # The prefix is also that of variables which are not for a server; one that looks like an option is a slip.
    close = _close_to(variable.removeprefix(PREFIX).lower())
    if close:
        raise InvalidConfiguration(
            f"the environment has {variable}, which is no option (did you mean {PREFIX}{close.upper()}?)"
        )


def _perhaps(name: str) -> str:
    close = _close_to(name)
    return f" (did you mean {close}?)" if close else ""


def _close_to(name: str) -> str:
    return next(iter(difflib.get_close_matches(name, list(OPTIONS), 1, 0.8)), "")


def _toml(option: Option, value: object) -> str:
    text = option.show(value)
    if isinstance(value, (int, float)) and option.metavar != "SIZE":
        return text
    return f'"{text.translate(_TOML_QUOTES)}"'
