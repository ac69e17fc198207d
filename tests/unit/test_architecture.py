"""The arrows of the house: which module may import which, read from the source and not from what happened to load.

A rule names a module or, with a trailing dot, everything in a package. Imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "client", ROOT / "server")
GENERATED = "sharednorm.v1."
TRANSPORT = ("grpc", "grpc.", "grpc_health.", "grpc_reflection.", "google.", "sharednorm.v1", GENERATED)
WIRE = ("sharednorm.wire", "sharednorm.convert")
CONNECTION = ("sharednorm.hub", "sharednorm.remote", "sharednorm._calls")
SERVER = "sharednorm_server."
EDGE = tuple(SERVER + name for name in ("cli", "server", "servicer"))


@dataclass(frozen=True)
class Import:
    """One import of one module, by its full name; `top` if it happens when the importing module is loaded."""

    importer: str
    imported: str
    line: int
    top: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def _modules() -> dict[str, Path]:
    found = {}
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(module: str, path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} has a relative import; the house uses full names"
            base = node.module or ""
            names = [f"{base}.{a.name}" if _is_module(f"{base}.{a.name}") else base for a in node.names]
        else:
            continue
        found += [Import(module, name, node.lineno, id(node) not in lazy) for name in dict.fromkeys(names)]
    return found


def _is_module(name: str) -> bool:
    return name in MODULES or name in {"google.protobuf", "grpc_health.v1", "grpc_reflection.v1alpha"}


IMPORTS = [found for module, path in MODULES.items() for found in _imports(module, path)]


def _within(name: str, rules: tuple[str, ...]) -> bool:
    return any(name.startswith(rule) or name == rule[:-1] if rule.endswith(".") else name == rule for rule in rules)


def _offenders(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    checked = [found for found in IMPORTS if _within(found.importer, importers)]
    assert checked, f"no module of {importers} imports anything: the rule has lost its subject"
    return [str(found) for found in checked if _within(found.imported, forbidden)]


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        pytest.param(("sharednorm.",), (SERVER,), id="the client library knows no server"),
        pytest.param((SERVER + "service",), (*TRANSPORT, *WIRE, *EDGE), id="the service knows no transport"),
        pytest.param((SERVER + "layers",), (*TRANSPORT, *WIRE, *EDGE, SERVER + "device."), id="layers compute nothing"),
        pytest.param(
            (SERVER + "device.",),
            (*TRANSPORT, *WIRE, *EDGE, SERVER + "store.", SERVER + "service", SERVER + "layers"),
            id="a device knows no RPC and no store",
        ),
        pytest.param(
            (SERVER + "store.",),
            (*TRANSPORT, *WIRE, *EDGE, SERVER + "device.", SERVER + "service", SERVER + "layers"),
            id="a store knows no RPC and no device",
        ),
        pytest.param((SERVER + "store.",), ("sharednorm.normalization",), id="a store computes nothing"),
        pytest.param((SERVER + "servicer",), (SERVER + "device.", SERVER + "store."), id="the servicer asks"),
        pytest.param((SERVER,), CONNECTION, id="the server is not a client of itself"),
        pytest.param(
            tuple(f"sharednorm.{name}" for name in ("errors", "config", "state", "normalization", "layers", "files")),
            (*TRANSPORT, *WIRE, *CONNECTION),
            id="a local layer knows no transport",
        ),
        pytest.param(WIRE, (*CONNECTION, "sharednorm.layers"), id="the wire knows no handles"),
    ],
)  # fmt: skip
def test_arrows_point_one_way(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert _offenders(importers, forbidden) == []


def test_only_the_edges_touch_protobuf() -> None:
    allowed = (*WIRE, *CONNECTION, "sharednorm.v1.", *EDGE)
    users = {found.importer for found in IMPORTS if _within(found.imported, ("google.", "sharednorm.v1", GENERATED))}
    assert {user for user in users if not _within(user, allowed)} == set()


def test_only_the_edges_touch_grpc() -> None:
    allowed = ("sharednorm.convert", *CONNECTION, "sharednorm.v1.", *EDGE)
    users = {found.importer for found in IMPORTS if _within(found.imported, ("grpc.",))}
    assert {user for user in users if not _within(user, allowed)} == set()


def test_the_client_needs_numpy_grpcio_and_protobuf_and_nothing_else_to_be_imported() -> None:
    known = {*sys.stdlib_module_names, "numpy", "grpc", "google", "sharednorm"}
    at_import = {str(f) for f in IMPORTS if _within(f.importer, ("sharednorm.",)) and f.top and _root(f) not in known}
    # The compiled arithmetic is a module of its own, which is loaded only where numba is installed.
    assert {text for text in at_import if "numba" not in text} == set()


def test_optional_packages_are_those_of_the_extras() -> None:
    known = {*sys.stdlib_module_names, "numpy", "grpc", "google", "sharednorm", "sharednorm_server"}
    optional = {_root(found) for found in IMPORTS} - known
    assert optional <= {"numba", "ml_dtypes", "h5py", "safetensors", "grpc_health", "grpc_reflection"}


def test_no_two_modules_import_each_other_when_they_are_loaded() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if found.top and found.imported in MODULES and found.imported != found.importer:
            graph[found.importer].add(found.imported)
    finished: set[str] = set()
    for module in graph:
        _visit(module, graph, (), finished)


def _visit(module: str, graph: dict[str, set[str]], path: tuple[str, ...], finished: set[str]) -> None:
    assert module not in path, "an import cycle: " + " -> ".join((*path[path.index(module) :], module))
    if module not in finished:
        for imported in sorted(graph[module]):
            _visit(imported, graph, (*path, module), finished)
        finished.add(module)


def _root(found: Import) -> str:
    return found.imported.partition(".")[0]
