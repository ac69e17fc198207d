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
SOURCES = (ROOT / "client", ROOT / "server", ROOT / "kernels")
GENERATED = ("sharednorm.v1.",)
PROTOBUF = ("google.", *GENERATED)
GRPC = ("grpc.", "grpc_health.", "grpc_reflection.")


def _client(*names: str) -> tuple[str, ...]:
    return tuple(f"sharednorm.{name}" for name in names)


def _server(*names: str) -> tuple[str, ...]:
    return tuple(f"sharednorm_server.{name}" for name in names)


# The rooms. What is not listed belongs to the local layers on the client's side.
CODEC = _client("wire", "convert", "_status", "_frames")
CONNECTION = _client("hub", "remote", "_async_compute", "_attempts", "_calls", "_channel", "_client_compute",
                     "_connect", "_credentials", "_deadline", "_direct", "_exchange", "_fleet", "_group",
                     "_group_compute", "_handling", "_link", "_listing", "_once", "_places", "_progress", "_push",
                     "_reading", "_server", "_shared", "_torch_functions", "_tracing", "_upkeep", "_ways",
                     "torch")  # fmt: skip
COMPILED = _client("_numba_arithmetic", "_numba_backward", "_numba_common", "_numba_forward", "_numba_half",
                   "_numba_moments", "_numba_plan", "_numba_vector")  # fmt: skip
EDGE = _server("__main__", "cli", "commands", "server", "servicer", "messages", "calls", "group_calls", "batches",
               "listen", "tls", "keys", "certificates", "direct", "lane", "regions", "transfers", "bench",
               "web", "page.", "archive", "migration", "tending", "traces")  # fmt: skip
MEANING = _server("service", "moments", "access", "catalog", "budget", "placement", "requests", "layers",
                  "shared_layers", "registry", "ledger", "saved_inputs", "checks", "paging")  # fmt: skip
GROUPS = _server("groups", "synchronization")
CUDA = ("cuda", "_cuda_gpu", "_cuda_kernels", "_cuda_worker")
DEVICE, STORE = _server("device."), _server("store.")
DOCTOR = _server("doctor.")
KERNELS = ("sharednorm_kernels.",)


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


LOCAL = tuple(m for m in MODULES if _within(m, ("sharednorm.",)) and m != "sharednorm"
              and not _within(m, (*CODEC, *CONNECTION, *GENERATED)))  # fmt: skip


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        pytest.param(("sharednorm.",), ("sharednorm_server.",), id="the client library knows no server"),
        pytest.param(LOCAL, (*PROTOBUF, *GRPC, *CODEC, *CONNECTION), id="a local layer knows no transport"),
        pytest.param(CODEC, (*CONNECTION, *_client("layers", "_handle", "_local")), id="the codec knows no handles"),
        pytest.param(MEANING, (*PROTOBUF, *GRPC, *CODEC, *EDGE), id="the service knows no transport"),
        pytest.param(GROUPS, (*PROTOBUF, *GRPC, *CODEC, *EDGE, *DEVICE, *STORE), id="groups know no transport"),
        pytest.param((*MEANING, *DEVICE, *STORE), GROUPS, id="a layer knows no groups"),
        pytest.param(DEVICE, (*PROTOBUF, *GRPC, *CODEC, *EDGE, *MEANING, *STORE), id="a device only computes"),
        pytest.param(STORE, (*PROTOBUF, *GRPC, *CODEC, *EDGE, *MEANING, *DEVICE), id="a store only remembers"),
        pytest.param((*MEANING, *STORE), _client("normalization"), id="only a device computes with tensors"),
        pytest.param(
            _server("layers", "shared_layers", "registry", "moments", "requests", "checks", "paging"),
            DEVICE,
            id="the registry knows no device",
        ),
        pytest.param(
            _server("servicer", "messages", "calls"), (*DEVICE, *STORE, *_server("layers")), id="the servicer asks"
        ),
        pytest.param(("sharednorm_server.",), CONNECTION, id="the server is not a client of itself"),
        pytest.param(KERNELS, ("sharednorm.", "sharednorm_server.", "numpy."), id="the kernels know nobody"),
        pytest.param(("sharednorm.", *EDGE, *MEANING, *STORE), KERNELS, id="only a device knows the kernels"),
        pytest.param((*MEANING, *DEVICE, *STORE), DOCTOR, id="nobody leans on the doctor"),
        pytest.param(
            (*MEANING, *GROUPS, *DEVICE, *STORE, *_server("servicer", "calls", "direct", "lane")),
            _server("web", "page.", "metrics", "figures", "traces"),
            id="who is watched knows no watcher",
        ),
    ],
)  # fmt: skip
def test_arrows_point_one_way(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert _offenders(importers, forbidden) == []


@pytest.mark.parametrize(
    ("imported", "users"),
    [
        pytest.param(
            PROTOBUF,
            (
                *CODEC,
                *CONNECTION,
                *GENERATED,
                *_server("servicer", "messages", "group_calls", "batches", "lane", "transfers"),
            ),
            id="protobuf",
        ),
        pytest.param(
            ("grpc.",), (*CONNECTION, *_client("_status"), *GENERATED, *EDGE, *_server("doctor.ask")), id="grpc"
        ),
        pytest.param(("grpc_health.", "grpc_reflection."), _server("server", "doctor.ask"), id="health and reflection"),
        pytest.param(("numba.", "llvmlite."), COMPILED, id="numba"),
        pytest.param(COMPILED, (*COMPILED, *_client("normalization")), id="compiled arithmetic"),
        pytest.param(("pycuda.",), _server(*(f"device.{name}" for name in CUDA)), id="pycuda"),
        pytest.param(("ml_dtypes.",), _client("config"), id="ml_dtypes"),
        pytest.param(("torch.",), (*_client("torch", "_torch_functions"), *_server("archive")), id="torch"),
        pytest.param(_client("torch", "_torch_functions"), _client("torch"), id="the adapter of torch"),
        pytest.param(("h5py.",), _client("_formats", "files"), id="h5py"),
        pytest.param(("safetensors.",), _client("_formats"), id="safetensors"),
        pytest.param(("opentelemetry.",), _client("_tracing"), id="opentelemetry"),
        pytest.param(("redis.",), _server("store.redis", "store._redis_line"), id="redis"),
    ],
)
def test_each_package_has_its_room(imported: tuple[str, ...], users: tuple[str, ...]) -> None:
    found = [item for item in IMPORTS if _within(item.imported, imported)]
    assert found, f"nothing imports {imported}: the rule has lost its subject"
    assert [str(item) for item in found if not _within(item.importer, users)] == []


def test_every_room_is_there() -> None:
    rooms = (*CODEC, *CONNECTION, *COMPILED, *EDGE, *MEANING, *GROUPS, *DEVICE, *STORE, *DOCTOR, *KERNELS, *GENERATED)
    assert [room for room in rooms if room.rstrip(".") not in MODULES] == []


def test_every_module_of_the_server_has_its_room() -> None:
    others = _server("config", "settings", "tensors", "movers", "watching", "metrics", "figures", "logs")
    rooms = (*EDGE, *MEANING, *GROUPS, *DEVICE, *STORE, *DOCTOR, *others, "sharednorm_server")
    assert [m for m in MODULES if _within(m, ("sharednorm_server.",)) and not _within(m, rooms)] == []


def test_the_client_needs_numpy_grpcio_and_protobuf_and_nothing_else_to_be_imported() -> None:
    known = {*sys.stdlib_module_names, "numpy", "grpc", "google", "sharednorm"}
    # The compiled arithmetic is loaded at the first use of it, where numba is installed; the adapter by its users.
    later = (*COMPILED, *_client("torch", "_torch_functions"))
    loaded = [f for f in IMPORTS if _within(f.importer, ("sharednorm.",)) and f.top and f.importer not in later]
    assert [str(found) for found in loaded if _root(found) not in known or found.imported in COMPILED] == []


def test_optional_packages_are_those_of_the_extras() -> None:
    known = {
        *sys.stdlib_module_names,
        "numpy",
        "grpc",
        "google",
        "sharednorm",
        "sharednorm_server",
        "sharednorm_kernels",
    }
    extras = {
        "numba",
        "llvmlite",
        "ml_dtypes",
        "h5py",
        "safetensors",
        "pycuda",
        "grpc_health",
        "grpc_reflection",
        "torch",
        "tqdm",
        "cryptography",
        "tomli",
        "prometheus_client",
        "jinja2",
        "matplotlib",
        "shtab",
        "opentelemetry",
        "redis",
    }
    assert {_root(found) for found in IMPORTS} - known <= extras


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
