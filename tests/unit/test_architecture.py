"""The arrows of the house: which room may import which, read from the source and not from what happened to load.

The drawings in docs/architecture.md say which rooms there are and which may import which; this test reads them there.
Imports inside functions, and those for type checkers alone, count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.rooms import GENERATED, ROOT, drawing, modules, room_of

MAX_FILES = 18
"""Most files of a folder. A room has about 15."""

PROTOBUF = ("google", GENERATED)
GRPC = ("grpc", "grpc_health", "grpc_reflection")
OPTIONAL = {
    "cryptography", "grpc_health", "grpc_reflection", "h5py", "hiredis", "jinja2", "llvmlite", "matplotlib",
    "ml_dtypes", "numba", "opentelemetry", "prometheus_client", "pycuda", "redis", "safetensors", "shtab", "tomli",
    "torch", "tqdm",
}  # fmt: skip
REQUIRED = {"numpy", "grpc", "google"}
OURS = {"sharednorm", "sharednorm_server", "sharednorm_kernels"}


@dataclass(frozen=True)
class Import:
    """One import of one module, by its full name; `top` if it happens when the importing module is loaded."""

    importer: str
    imported: str
    line: int
    top: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


MODULES = modules()


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
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        found += [Import(module, name, node.lineno, id(node) not in lazy) for name in dict.fromkeys(names)]
    return found


IMPORTS = [found for module, path in MODULES.items() for found in _imports(module, path)]


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


DRAWINGS = {package: drawing(package) for package in ("sharednorm", "sharednorm_server")}


def _rooms(package: str) -> set[str]:
    return {room_of(module) for module in MODULES if module.startswith(f"{package}.")} - {package, GENERATED}


@pytest.mark.parametrize("package", DRAWINGS)
def test_the_drawing_shows_everyroom_of(package: str) -> None:
    assert set(DRAWINGS[package]) == _rooms(package)


@pytest.mark.parametrize(("package", "room"), [(package, room) for package in DRAWINGS for room in DRAWINGS[package]])
def test_a_room_imports_only_rooms_below_it(package: str, room: str) -> None:
    allowed = {room, package, *DRAWINGS[package][room], GENERATED}
    # The package's root has its version, and what users import: of the library itself, nothing may use the latter.
    bad = [
        found
        for found in IMPORTS
        if room_of(found.importer) == room
        and found.imported.split(".")[0] == package
        and (room_of(found.imported) not in allowed or found.imported == package)
    ]
    assert [str(found) for found in bad] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if found.imported in MODULES and found.imported != found.importer:
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


def _client(*rooms: str) -> tuple[str, ...]:
    return tuple(f"sharednorm.{room}" for room in rooms)


def _server(*rooms: str) -> tuple[str, ...]:
    return tuple(f"sharednorm_server.{room}" for room in rooms)


KERNELS = ("sharednorm_kernels",)
ABOVE_THE_CODEC = _client("torch", "remote", "coordination", "transport", "layers")


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        pytest.param(("sharednorm",), ("sharednorm_server",), id="the client library does not know the server"),
        pytest.param(KERNELS, ("sharednorm", "sharednorm_server", "numpy"), id="the kernels know nothing else"),
        pytest.param(
            ("sharednorm", *_server("cli", "http", "direct", "rpc", "groups", "layers", "store")),
            KERNELS,
            id="only a device and the doctor know the kernels",
        ),
        pytest.param(
            _server("config", "server", "http", "direct", "rpc", "groups", "layers", "device", "store", "auth"),
            ABOVE_THE_CODEC,
            id="the server is not a client of itself",
        ),
        pytest.param(
            (*_client("core", "arithmetic", "files", "layers"), *_server("groups", "layers", "device", "store")),
            (*PROTOBUF, *GRPC, "sharednorm.codec"),
            id="what decides, computes or remembers does not know the wire",
        ),
        pytest.param(_server("layers", "store"), ("sharednorm.arithmetic",), id="only a device computes with tensors"),
        pytest.param(_server("device"), _server("store"), id="a device does not know the store"),
        pytest.param(_server("store"), _server("device"), id="a store does not know the device"),
        pytest.param(
            _server("layers.registry", "layers.layer", "layers.shared_layer", "layers.training_service"),
            _server("device"),
            id="the registry does not know the device",
        ),
    ],
)
def test_arrows_that_the_drawings_do_not_show(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    checked = [found for found in IMPORTS if _within(found.importer, importers)]
    assert checked, f"no module of {importers} imports anything: the rule has lost its subject"
    assert [str(found) for found in checked if _within(found.imported, forbidden)] == []


@pytest.mark.parametrize(
    ("imported", "users"),
    [
        pytest.param(
            PROTOBUF,
            (*_client("codec", "transport", "coordination", "remote"), GENERATED, *_server("direct", "rpc")),
            id="protobuf",
        ),
        pytest.param(
            ("grpc",),
            (
                *_client("codec.status", "transport"),
                GENERATED,
                *_server("server", "rpc", "http", "doctor", "auth.tls"),
            ),
            id="grpc",
        ),
        pytest.param(("grpc_health", "grpc_reflection"), _server("server", "doctor.server_checks"), id="health"),
        pytest.param(("numba", "llvmlite"), _client("arithmetic.numba"), id="numba"),
        pytest.param(
            _client("arithmetic.numba"), _client("arithmetic.numba", "arithmetic.select"), id="compiled arithmetic"
        ),
        pytest.param(("pycuda",), _server("device.cuda"), id="pycuda"),
        pytest.param(("ml_dtypes",), _client("core.dtypes"), id="ml_dtypes"),
        pytest.param(("torch",), (*_client("torch"), *_server("cli.export_import")), id="torch"),
        pytest.param(("h5py",), _client("files"), id="h5py"),
        pytest.param(("safetensors",), _client("files"), id="safetensors"),
        pytest.param(("opentelemetry",), (*_client("transport.tracing"), *_server("observability")), id="traces"),
        pytest.param(("redis",), _server("store.redis"), id="redis"),
    ],
)
def test_each_package_has_itsroom_of(imported: tuple[str, ...], users: tuple[str, ...]) -> None:
    found = [item for item in IMPORTS if _within(item.imported, imported)]
    assert found, f"nothing imports {imported}: the rule has lost its subject"
    assert [str(item) for item in found if not _within(item.importer, users)] == []


def test_the_client_needs_numpy_grpcio_and_protobuf_and_nothing_else_to_be_imported() -> None:
    known = {*sys.stdlib_module_names, *REQUIRED, "sharednorm"}
    # The compiled arithmetic is loaded at its first use, where numba is installed; the adapters by their users.
    later = _client("arithmetic.numba", "torch")
    loaded = [f for f in IMPORTS if _within(f.importer, ("sharednorm",)) and f.top and not _within(f.importer, later)]
    assert [str(f) for f in loaded if f.imported.split(".")[0] not in known or _within(f.imported, later)] == []


def test_optional_packages_are_those_of_the_extras() -> None:
    assert {found.imported.split(".")[0] for found in IMPORTS} - {
        *sys.stdlib_module_names,
        *REQUIRED,
        *OURS,
    } <= OPTIONAL


def test_no_folder_has_more_files_than_a_reader_can_survey() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    folders: dict[str, int] = {}
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            folders[str(Path(name).parent)] = folders.get(str(Path(name).parent), 0) + 1
    assert {folder: files for folder, files in folders.items() if files > MAX_FILES} == {}
