"""Modules of `sharednorm.torch` as parts of models: state_dict, conversion there and back, copies, other processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import sharednorm
from sharednorm.errors import (
    ConfigurationMismatch,
    InvalidConfiguration,
    InvalidName,
    LayerNotFound,
    ServerUnavailable,
)
from sharednorm.remote.handle import backend_of
from tests.support.processes.server import in_process
from tests.support.torch_modules import COMPUTE, KINDS, SHAPES, close, names, ours, tensor, theirs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def hub() -> Iterator[sharednorm.Hub]:
    with in_process() as server, sharednorm.connect(server.address) as opened:
        yield opened


# --- state_dict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "SyncBatchNorm"])
def test_state_dict_goes_both_ways(hub: sharednorm.Hub, kind: str) -> None:
    own = theirs("BatchNorm2d" if kind == "SyncBatchNorm" else kind, 4)
    shape = SHAPES["BatchNorm2d" if kind == "SyncBatchNorm" else kind]
    for number in range(3):
        own(tensor(number, shape))
    torch.nn.init.normal_(own.weight)
    if kind == "SyncBatchNorm":
        own = torch.nn.SyncBatchNorm.convert_sync_batchnorm(own)
    module = ours(hub, "BatchNorm2d" if kind == "SyncBatchNorm" else kind, 4)
    module.load_state_dict(own.state_dict(), strict=True)
    assert module.num_batches_tracked == 3
    again = type(own)(4)
    again.load_state_dict(module.state_dict(), strict=True)
    for (name, found), (_, right) in zip(again.state_dict().items(), own.state_dict().items(), strict=True):
        assert torch.equal(found, right), name
        assert found.dtype == right.dtype


def test_state_dict_that_does_not_fit(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm2d", 4)
    good = theirs("BatchNorm2d", 4).state_dict()
    module(tensor(1, (3, 4, 5, 6)))
    before = module.running_mean
    without = {name: value for name, value in good.items() if name != "running_var"}
    with pytest.raises(RuntimeError, match="running_var"):
        module.load_state_dict(without)
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        module.load_state_dict({**good, "running_mean": torch.zeros(5)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        module.load_state_dict({**good, "other": torch.zeros(5)})
    module.load_state_dict({**good, "running_mean": before}, strict=True)
    assert torch.equal(module.running_mean, before)
    plain = ours(hub, "BatchNorm2d", 4, track_running_stats=False)
    with pytest.raises(RuntimeError, match="Unexpected"):
        plain.load_state_dict(good)


def test_state_dict_without_a_count(hub: sharednorm.Hub) -> None:
    own = theirs("BatchNorm2d", 4)
    own(tensor(1, (3, 4, 5, 6)))
    old = dict(own.state_dict())
    del old["num_batches_tracked"]  # as before PyTorch 0.4.1
    for module in (theirs("BatchNorm2d", 4), ours(hub, "BatchNorm2d", 4)):
        for number in range(2):
            module(tensor(number, (3, 4, 5, 6)))
        module.load_state_dict(old, strict=True)
        assert module.num_batches_tracked == 2
        assert torch.equal(module.running_mean, own.running_mean)


def test_statistics_of_a_new_layer(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm2d", 4)
    module(tensor(1, (3, 4, 5, 6)))
    torch.nn.init.normal_(module.weight)
    module.reset_running_stats()
    assert not module.running_mean.any()
    assert module.num_batches_tracked == 0
    module(tensor(1, (3, 4, 5, 6)))
    module.reset_parameters()
    assert (module.running_var == 1).all()
    assert (module.weight == 1).all()


# --- Models ---------------------------------------------------------------------------------------------------------


def network() -> Any:
    torch.manual_seed(3)
    shared = torch.nn.BatchNorm1d(6)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(6)),
        shared,
        torch.nn.ReLU(),
        shared,
    )


def test_a_model_there_and_back(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    model = network()
    x = tensor(1, (5, 1, 8, 8))
    for _ in range(3):
        model(x)
    before = copy.deepcopy(model.state_dict())
    right = copy.deepcopy(model)
    weights = [model[1].weight, model[3].bias]
    prefix = next(names) + "/"
    assert adapter.convert(model, hub, prefix=prefix) is model
    assert isinstance(model[1], adapter.BatchNorm2d)
    assert isinstance(model[3], adapter.BatchNorm1d)
    assert model[3] is model[5]
    assert model[1].name == prefix + "1"
    assert model[1].weight is weights[0]
    assert model[3].bias is weights[1]
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    model(x).square().sum().backward()
    right(x).square().sum().backward()
    close(model[0].weight.grad, right[0].weight.grad, 1e-4)
    model.eval()
    assert not model[1].training
    again = adapter.revert(model)
    assert again is model
    assert type(model[1]) is torch.nn.BatchNorm2d
    assert not model[1].training
    right.eval()
    close(model(x), right(x), 1e-4)
    assert model[3].num_batches_tracked == right[3].num_batches_tracked
    assert f"{prefix}1" in [info.name for info in hub.layers()]


def test_layers_that_exist_keep_their_statistics(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    prefix = next(names) + "/"
    first = adapter.convert(network(), hub, prefix=prefix)
    first(tensor(1, (5, 1, 8, 8)))
    second = adapter.convert(network(), hub, prefix=prefix)
    assert second[1].num_batches_tracked == 1
    assert torch.equal(second[1].running_mean, first[1].running_mean)
    adapter.convert(network(), hub, prefix=prefix, load=True)
    assert first[1].num_batches_tracked == 0


def test_a_model_that_is_one_layer(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    name = next(names)
    module = adapter.convert(torch.nn.BatchNorm3d(3), hub, prefix=name, compute="server")
    assert module.name == name
    assert type(adapter.revert(module)) is torch.nn.BatchNorm3d
    synchronized = adapter.convert(torch.nn.SyncBatchNorm(3), hub, prefix=next(names), synchronized=adapter.BatchNorm1d)
    assert isinstance(synchronized, adapter.BatchNorm1d)
    assert adapter.convert(module, hub) is module  # nothing left to convert


def test_what_cannot_be_converted(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    class Mine(torch.nn.BatchNorm2d):  # type: ignore[misc, name-defined]
        pass

    prefix, first = next(names) + "/", torch.nn.BatchNorm2d(3)
    for module, error, message in (
        (torch.nn.LazyBatchNorm2d(), InvalidConfiguration, "1 is a LazyBatchNorm2d .* run a lazy module once before"),
        (Mine(3), InvalidConfiguration, "1 is a Mine"),
        (torch.nn.BatchNorm2d(3, momentum=2.0), InvalidConfiguration, "initFactor|minFactor"),
        (torch.nn.ModuleDict({"n" * 600: torch.nn.BatchNorm2d(3)}), InvalidName, "512"),
    ):
        model = torch.nn.Sequential(first, module)
        with pytest.raises(error, match=message):
            adapter.convert(model, hub, prefix=prefix)
        assert model[0] is first
    with pytest.raises(InvalidConfiguration, match="there is no option 'computer'"):
        adapter.convert(torch.nn.Sequential(first), hub, prefix=prefix, computer="client")
    with pytest.raises(InvalidConfiguration, match=r"expected: what sharednorm\.connect"):
        adapter.convert(torch.nn.Sequential(first), hub.address, prefix=prefix)  # type: ignore[arg-type]
    with pytest.raises(InvalidName, match="pass prefix="):
        adapter.convert(first, hub)
    assert not [info.name for info in hub.layers() if info.name.startswith(prefix)]  # nothing was created


def test_a_server_that_refuses_a_layer_leaves_the_model_as_it_is(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    prefix = next(names) + "/"
    ours(hub, "BatchNorm2d", 5, name=prefix + "1")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    before = list(model)
    with pytest.raises(ConfigurationMismatch, match="maps"):
        adapter.convert(model, hub, prefix=prefix)
    assert list(model) == before
    adapter.convert(model, hub, prefix=next(names) + "/")
    before = list(model)
    hub.delete(model[1].name)
    with pytest.raises(LayerNotFound):
        adapter.revert(model)
    assert list(model) == before


def test_a_derived_class_is_not_reverted(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    class Mine(adapter.BatchNorm2d):
        pass

    with pytest.raises(InvalidConfiguration, match="0 is a Mine"):
        adapter.revert(torch.nn.Sequential(Mine(3, hub=hub, name=next(names))))


@pytest.mark.parametrize("name", ["bfloat16", "float64"])
def test_a_model_of_another_type_there_and_back(hub: sharednorm.Hub, name: str) -> None:
    from sharednorm import torch as adapter

    dtype = getattr(torch, name)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4)).to(dtype)
    adapter.revert(adapter.convert(model, hub, prefix=next(names) + "/"))
    assert {value.dtype for value in model.state_dict().values()} == {dtype, torch.int64}
    model(tensor(1, (3, 4, 5, 6), dtype).requires_grad_()).sum().backward()


@pytest.mark.parametrize("compute", COMPUTE)
def test_copies_are_modules_of_the_same_layer(hub: sharednorm.Hub, compute: str) -> None:
    module = ours(hub, "BatchNorm2d", 4, compute=compute)
    module.eval()
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert made.name == module.name
        assert not made.training
        assert made.weight is not module.weight
        made.train()
        made(tensor(1, (3, 4, 5, 6)))
    assert module.num_batches_tracked == 2
    for each in (module, pickle.loads(pickle.dumps(module))):
        assert f"compute='{compute}'" in repr(each)
        assert f"'{module.name}'" in repr(each)
        assert hub.address in repr(each)


def test_a_model_is_unpickled_without_its_server() -> None:
    with in_process() as server, sharednorm.connect(server.address) as hub:
        group = sharednorm.Group("run", 1)
        modules = [ours(hub, "BatchNorm2d", 4), ours(hub, "BatchNorm2d", 4, compute="server"),
                   ours(hub, "BatchNorm2d", 4, group=group)]  # fmt: skip
        address, kept = server.address, pickle.dumps(torch.nn.Sequential(*modules, modules[0]))
    model = pickle.loads(kept)
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [module.name for module in made] == [modules[k].name for k in (0, 1, 2, 0)]
        assert made[0] is made[3]
        assert (made[0].num_features, made[0].eps) == (4, 1e-5)
        assert address in repr(made)
        with pytest.raises(ServerUnavailable, match=f"no answer from {address}"):
            made[0](tensor(1, (3, 4, 5, 6)))


def test_modules_that_are_unpickled_share_one_hub(hub: sharednorm.Hub) -> None:
    with sharednorm.connect(hub.address, namespace="together") as first:
        group = sharednorm.Group("run", 1)
        model = torch.nn.Sequential(*(ours(first, "BatchNorm2d", 4, group=group) for _ in range(4)))
        kept = pickle.dumps(model)
    again = pickle.loads(kept)
    with ThreadPoolExecutor(4) as threads:
        backends = list(threads.map(lambda module: backend_of(module.layer), again))
    connections = [backend.connection for backend in backends if backend is not None]
    assert {id(connection) for connection in connections} == {id(connections[0])}
    again(tensor(1, (3, 4, 5, 6))).sum().backward()  # as one member of one group
    assert [int(module.num_batches_tracked) for module in again] == [1, 1, 1, 1]


def test_a_layer_that_is_gone(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm2d", 4)
    kept = pickle.dumps(module)
    hub.delete(module.name)
    again = pickle.loads(kept)
    ours(hub, "BatchNorm2d", 4, name=module.name)  # another layer of that name
    with pytest.raises(LayerNotFound):
        again(tensor(1, (3, 4, 5, 6)))


CHILD = """
import pickle, sys, torch
from pathlib import Path
module = pickle.loads(Path(sys.argv[1]).read_bytes())
module(torch.ones(3, 4, 5, 6) * torch.arange(3.0).view(3, 1, 1, 1))
print(int(module.num_batches_tracked))
"""


def test_a_module_in_another_process(hub: sharednorm.Hub, tmp_path: Path) -> None:
    module = ours(hub, "BatchNorm2d", 4)
    module(tensor(1, (3, 4, 5, 6)))
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "module")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "2\n", done.stderr
    assert module.num_batches_tracked == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_beside_workers_that_load_data(hub: sharednorm.Hub, method: str) -> None:
    data = torch.utils.data.TensorDataset(tensor(1, (12, 4, 3, 3)))
    module = ours(hub, "BatchNorm2d", 4)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=method, timeout=60)
    for (batch,) in loader:
        module(batch)
    assert module.num_batches_tracked == 3


@pytest.mark.parametrize("compute", COMPUTE)
def test_modules_in_domains(hub: sharednorm.Hub, compute: str) -> None:
    name = next(names)
    sites = {domain: ours(hub, "BatchNorm2d", 4, name=name, compute=compute, domain=domain) for domain in ("a", "b")}
    wide = {domain: torch.nn.BatchNorm2d(4).double() for domain in sites}
    for number, domain in enumerate("abaab"):
        x = tensor(number, (3, 4, 5, 6))
        close(sites[domain](x), wide[domain](x.double()), 1e-5)
    for domain, module in sites.items():
        close(module.running_mean, wide[domain].running_mean, 1e-5)
        close(module.running_var, wide[domain].running_var, 1e-5)
        assert module.layer.domain == domain
        assert f"domain '{domain}'" in repr(module)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert again.num_batches_tracked == wide[domain].num_batches_tracked
        x = tensor(9, (3, 4, 5, 6))
        close(module.eval()(x), wide[domain].eval()(x.double()), 1e-5)
    assert hub.layer(name).numOfProps == 0


def test_a_model_is_converted_into_a_domain(hub: sharednorm.Hub) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model(tensor(1, (2, 3, 8, 8)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prefix = next(names)
    shared = sharednorm.torch.convert(copy.deepcopy(model), hub, prefix, domain="site-a")
    for key, value in shared.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert hub.layer(f"{prefix}1").domains == ("site-a",)
    # A domain that exists keeps what it has.
    model(tensor(2, (2, 3, 8, 8)))
    again = sharednorm.torch.convert(model, hub, prefix, domain="site-a")
    assert again[1].num_batches_tracked == 1
    with pytest.raises(InvalidName, match="domain"):
        sharednorm.torch.convert(torch.nn.BatchNorm2d(4), hub, prefix, domain="\n")
