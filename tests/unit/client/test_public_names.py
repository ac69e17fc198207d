"""The names that users rely on, and what importing them brings along."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

import sharednorm
import sharednorm.errors

PUBLIC = {
    "BatchNorm", "BatchNorm1D", "BatchNorm2D", "BatchNorm3D", "Layer", "Variable",
    "Group", "Statistics", "StatisticsDelta", "Hub", "LayerInfo", "Progress", "ServerInfo", "SnapshotInfo",
    "TLS", "connect", "__version__",
}  # fmt: skip


def test_the_public_names() -> None:
    errors = {name for name, value in vars(sharednorm.errors).items() if inspect.isclass(value)} - {"ClassVar"}
    assert set(sharednorm.__all__) == PUBLIC | errors
    assert len(sharednorm.__all__) == len(set(sharednorm.__all__))


def test_every_public_name_is_there_and_documented() -> None:
    for name in sharednorm.__all__:
        value = getattr(sharednorm, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_nothing_else_is_public_but_modules() -> None:
    others = {name for name in vars(sharednorm) if not name.startswith("_")} - set(sharednorm.__all__)
    assert {name for name in others if not isinstance(getattr(sharednorm, name), ModuleType)} == set()


@pytest.mark.parametrize("package", ["numba", "h5py", "ml_dtypes", "safetensors", "torch", "sharednorm_server"])
def test_importing_it_does_not_import(package: str) -> None:
    code = f"import sys, sharednorm; raise SystemExit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_arguments_are_the_originals_and_our_own_by_keyword() -> None:
    original = ["epsilon", "initFactor", "minFactor", "sscale", "affine", "name", "empty", "inplace"]
    defaults = [1e-5, 1.0, 0.1, 0.01, True, None, False, False]
    for kind in (sharednorm.BatchNorm, sharednorm.BatchNorm1D, sharednorm.BatchNorm2D, sharednorm.BatchNorm3D):
        parameters = list(inspect.signature(kind).parameters.values())
        assert parameters[0].name == ("size" if kind is sharednorm.BatchNorm else "maps")
        assert [(p.name, p.default) for p in parameters[1:9]] == list(zip(original, defaults, strict=True))
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:9])
        keywords = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert keywords == [("averaging", "standard"), ("nonfinite", "refuse")]
        remote = list(inspect.signature(getattr(sharednorm.Hub, kind.__name__)).parameters.values())
        assert remote[1:-7] == parameters
        added = [("compute", "server"), ("max_staleness", 0.0), ("wire_dtype", None), ("group", None)]
        added += [("push", "sync"), ("max_pending", None), ("domain", "")]
        assert [(p.name, p.default) for p in remote[-7:]] == added
        assert {p.kind for p in remote[-7:]} == {remote[-1].KEYWORD_ONLY}


def test_the_signatures_of_the_hub() -> None:
    assert str(inspect.signature(sharednorm.connect)) == (
        "(address: 'str', *, namespace: 'str' = 'default', token: 'str | None' = None, "
        "tls: 'bool | str | os.PathLike[str] | TLS | None' = None, timeout: 'float' = 30.0, transport: 'str' = 'auto', "
        "progress: 'ProgressCallback | None' = None, consistency: 'str' = 'bounded') -> 'Hub'"
    )
    names = {
        "layers": [],
        "layer": ["name", "compute", "max_staleness", "wire_dtype", "group", "push", "max_pending", "domain"],
        "delete": ["name"],
        "set_train": ["name", "train"],
        "snapshots": ["name"],
        "rollback": ["name", "version"],
        "backup": [],
        "close": [],
        "flush": [],
        "refresh": ["layers"],
        "empty": ["shape", "dtype"],
    }
    for method, arguments in names.items():
        assert list(inspect.signature(getattr(sharednorm.Hub, method)).parameters) == ["self", *arguments]


def test_public_objects_belong_to_the_package_and_not_to_the_module_that_defines_them() -> None:
    for name in sharednorm.__all__:
        value = getattr(sharednorm, name)
        assert isinstance(value, str) or value.__module__ == "sharednorm", name


def test_an_error_is_pickled_by_its_public_name() -> None:
    error = sharednorm.InvalidShape("wrong", {"limit": "maps"})
    data = pickle.dumps(error)
    assert b"sharednorm.errors" not in data
    assert str(pickle.loads(data)) == "wrong"
