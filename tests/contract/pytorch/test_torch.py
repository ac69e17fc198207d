"""`sharednorm.torch` against PyTorch's own modules: outputs, gradients, statistics; alone and in groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import (
    ConfigurationMismatch,
    InvalidConfiguration,
    InvalidName,
    InvalidShape,
    NonFiniteInput,
    TooFewValues,
    UnsupportedDType,
)
from tests.support import oracle
from tests.support.members import Members, all_of
from tests.support.processes.server import in_process
from tests.support.torch_modules import COMPUTE, KINDS, SHAPES, close, names, ours, same_step, step, tensor, theirs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def hub() -> Iterator[sharednorm.Hub]:
    with in_process() as server, sharednorm.connect(server.address) as opened:
        yield opened


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_with_an_optimizer(hub: sharednorm.Hub, kind: str, compute: str) -> None:
    module, wide = ours(hub, kind, 4, compute=compute), theirs(kind, 4).double()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (module, wide)]
    rng = np.random.default_rng(0)
    for number in range(50):
        shape = (int(rng.integers(2, 9)), *SHAPES[kind][1:])
        if number % 10 == 9:
            module.eval()
            wide.eval()
        same_step(module, wide, tensor(3 * number, shape), tensor(3 * number + 1, shape) * 0.1, atol=2e-5)
        module.train()
        wide.train()
        for optimizer in optimizers:
            optimizer.step()
    for name in ("running_mean", "running_var"):
        assert getattr(module, name).dtype == torch.float32
        close(getattr(module, name), getattr(wide, name), 1e-5)
    assert module.num_batches_tracked == wide.num_batches_tracked == 45
    close(module.weight, wide.weight, 1e-3)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 1e-3, "momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_arguments(hub: sharednorm.Hub, options: dict[str, Any], compute: str) -> None:
    module, wide = ours(hub, "BatchNorm2d", 4, compute=compute, **options), theirs("BatchNorm2d", 4, **options).double()
    assert (module.num_features, module.eps, module.momentum) == (wide.num_features, wide.eps, wide.momentum)
    for number in range(4):
        same_step(module, wide, tensor(number, (3, 4, 2, 2)), tensor(number + 50, (3, 4, 2, 2)))
    module.eval()
    wide.eval()
    same_step(module, wide, tensor(9, (3, 4, 2, 2)), tensor(10, (3, 4, 2, 2)))
    assert list(module.state_dict()) == list(wide.state_dict())
    if module.track_running_stats:
        close(module.running_mean, wide.running_mean, 1e-5)
    else:
        assert module.running_mean is module.running_var is module.num_batches_tracked is None


def test_training_that_runs_ahead_of_the_server(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm2d", 4, push="async", max_pending=4)
    wide = theirs("BatchNorm2d", 4).double()
    for number in range(30):
        same_step(module, wide, tensor(number, (3, 4, 2, 2)), tensor(number + 50, (3, 4, 2, 2)))
    close(module.running_var, wide.running_var, 1e-5)  # behind all steps
    assert module.num_batches_tracked == 30
    module.eval()
    wide.eval()
    same_step(module, wide, tensor(9, (3, 4, 2, 2)), tensor(10, (3, 4, 2, 2)))


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_matrix(hub: sharednorm.Hub, compute: str) -> None:
    same_step(ours(hub, "BatchNorm1d", 4, compute=compute), theirs("BatchNorm1d", 4).double(), tensor(1, (7, 4)),
              tensor(2, (7, 4)))  # fmt: skip


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(hub: sharednorm.Hub, name: str, compute: str) -> None:
    dtype = getattr(torch, name)
    for options in ({}, {"dtype": dtype}):  # parameters in float32, or as the tensors
        module, wide = ours(hub, "BatchNorm2d", 4, compute=compute, **options), theirs("BatchNorm2d", 4).double()
        x, grad = tensor(1, (3, 4, 5, 6), dtype), tensor(2, (3, 4, 5, 6), dtype)
        same_step(module, wide, x, grad, atol=8 * oracle.rounding(name) * 3)
        close(module.running_var, wide.running_var, 1e-5)  # of sums that are wide


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_tensors_that_travel_in_fewer_bits(hub: sharednorm.Hub, name: str) -> None:
    module = ours(hub, "BatchNorm2d", 4, compute="server", wire_dtype=name)
    wide = theirs("BatchNorm2d", 4).double()
    dtype = getattr(torch, name)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, grad = (tensor(seed, (3, 4, 5, 6), dtype).float().to(memory_format=memory_format) for seed in (1, 2))
        same_step(module, wide, x, grad, atol=8 * oracle.rounding(name))  # of the way back
    close(module.running_var, wide.running_var, 1e-5)
    y = module(x)
    assert torch.equal(y, y.to(dtype).float())  # by the weight 1, it is what has travelled
    assert not torch.equal(y, ours(hub, "BatchNorm2d", 4, compute="server")(x))


def test_statistics_that_may_be_older(hub: sharednorm.Hub) -> None:
    name, x = next(names), tensor(1, (3, 4, 5, 6))
    trainer, fresh, lazy = (ours(hub, "BatchNorm2d", 4, name=name, max_staleness=age) for age in (0.0, 0.0, 600.0))
    before = lazy.eval()(x)
    trainer(x)
    assert torch.equal(lazy(x), before)
    assert not torch.equal(fresh.eval()(x), before)
    hub.refresh(lazy.layer)
    assert torch.equal(lazy(x), fresh(x))


@pytest.mark.parametrize("compute", COMPUTE)
def test_autocast(hub: sharednorm.Hub, compute: str) -> None:
    convolution = torch.nn.Conv2d(3, 4, 3)
    module, own = ours(hub, "BatchNorm2d", 4, compute=compute), theirs("BatchNorm2d", 4)
    x = tensor(1, (2, 3, 8, 8))
    outputs = []
    for each in (module, own):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = each(convolution(x))
        y.float().square().sum().backward()
        outputs.append((y, each.weight.grad.clone()))
    assert outputs[0][0].dtype == outputs[1][0].dtype == torch.bfloat16
    close(outputs[0][0], outputs[1][0], 0.05)
    close(outputs[0][1], outputs[1][1], 0.05 * float(outputs[1][1].abs().max()))


@pytest.mark.parametrize("compute", COMPUTE)
def test_strides(hub: sharednorm.Hub, compute: str) -> None:
    module, wide = ours(hub, "BatchNorm2d", 4, compute=compute), theirs("BatchNorm2d", 4).double()
    x = tensor(1, (3, 4, 5, 6))
    for each in (x.to(memory_format=torch.channels_last), tensor(2, (6, 5, 4, 3)).permute(3, 2, 1, 0), x[:, :, ::2]):
        same_step(module, wide, each, tensor(3, tuple(each.shape)).flip(0))
    last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for mode in (True, False):
            y = module.train(mode)(last)
            assert y.is_contiguous(memory_format=torch.channels_last)
            close(y, wide.train(mode)(last.double()), 1e-5)


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_view_whose_sign_is_changed_as_it_is_read(hub: sharednorm.Hub, compute: str) -> None:
    x = torch.complex(tensor(1, (7, 4)), tensor(2, (7, 4))).conj().imag
    assert x.is_neg()
    module, wide = ours(hub, "BatchNorm1d", 4, compute=compute), theirs("BatchNorm1d", 4).double()
    close(module(x), wide(x.double()), 1e-5)


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_module_that_is_used_twice_in_a_graph(hub: sharednorm.Hub, compute: str) -> None:
    module, wide = ours(hub, "BatchNorm1d", 4, compute=compute), theirs("BatchNorm1d", 4).double()
    x = tensor(1, (7, 4))
    for each, data in ((module, x), (wide, x.double())):
        (each(data).sin() + each(torch.relu(each(data * 2)))).square().sum().backward()
    close(module.weight.grad, wide.weight.grad, 1e-4)
    assert module.num_batches_tracked == 3


def test_without_gradients(hub: sharednorm.Hub) -> None:
    module, wide = ours(hub, "BatchNorm2d", 4), theirs("BatchNorm2d", 4).double()
    x = tensor(1, (3, 4, 5, 6))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(module(x), wide(x.double()), 1e-5)
    module.requires_grad_(False)
    assert not module(x).requires_grad
    y = module(x.clone().requires_grad_())
    y.sum().backward()
    assert module.weight.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(hub: sharednorm.Hub, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    module, wide = ours(hub, "BatchNorm2d", 4), theirs("BatchNorm2d", 4).double()
    for each, dtype in ((module, torch.float32), (wide, torch.float64)):
        x = tensor(1, (3, 4, 5, 6), dtype).requires_grad_()
        checkpoint(lambda data, each=each: each(data).square(), x, use_reentrant=reentrant).sin().sum().backward()
    close(module.weight.grad, wide.weight.grad, 1e-4)
    # As with PyTorch's own, the batch is taken in again when the forward is repeated.
    assert module.num_batches_tracked == wide.num_batches_tracked == 2


def test_an_input_that_is_changed_before_its_backward(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm1d", 4)
    x = tensor(1, (7, 4)).requires_grad_() * 1
    y = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compute", COMPUTE)
def test_parameters_that_are_changed_before_their_backward(hub: sharednorm.Hub, compute: str, training: bool) -> None:
    for module in (theirs("BatchNorm1d", 4), ours(hub, "BatchNorm1d", 4, compute=compute)):
        module.train(training)
        y = module(tensor(1, (7, 4)).requires_grad_())
        with torch.no_grad():
            module.bias.add_(1)
        y.sum().backward()  # for which the bias does not matter
        np.testing.assert_allclose(module.bias.grad, 7)
        y = module(tensor(1, (7, 4)).requires_grad_())
        with torch.no_grad():
            module.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_second_derivatives_are_refused(hub: sharednorm.Hub) -> None:
    module = ours(hub, "BatchNorm1d", 4)
    x = tensor(1, (7, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("compute", COMPUTE)
def test_what_is_refused_changes_nothing(hub: sharednorm.Hub, compute: str) -> None:
    module = ours(hub, "BatchNorm2d", 4, compute=compute)
    bad = tensor(1, (3, 4, 5, 6))
    bad[1, 2, 3, 4] = float("nan")
    for x, error, message in (
        (tensor(1, (3, 4, 5, 6)).double(), UnsupportedDType, "of torch.float64 .expected: float32"),
        (tensor(1, (3, 4, 5, 6)).int(), UnsupportedDType, "of torch.int32 .expected: float32"),
        (torch.empty(3, 4, 5, 6, device="meta"), UnsupportedDType, "is on meta .expected: the CPU"),
        (tensor(1, (3, 4, 5, 6)).numpy(), UnsupportedDType, "is a numpy.ndarray .expected: a torch.Tensor"),
        ([1.0], UnsupportedDType, "is a builtins.list .expected: a torch.Tensor"),
        (tensor(1, (3, 4, 5, 6)).to_sparse(), UnsupportedDType, "is a torch.sparse_coo tensor .expected: a dense"),
        (tensor(1, (3, 4, 5)), ValueError, "expected 4D input .got 3D input"),
        (tensor(1, (3, 5, 5, 6)), InvalidShape, "has 5 maps .expected: 4"),
        (tensor(1, (1, 4, 1, 1)), TooFewValues, "one value a map"),
        (bad, NonFiniteInput, "in 1 of 4 maps .2."),
    ):
        with pytest.raises(error, match=message):
            module(x)
    assert module.num_batches_tracked == 0


def test_arguments_that_cannot_be(hub: sharednorm.Hub) -> None:
    for options, error in (
        ({"compute": "gpu"}, InvalidConfiguration),
        ({"momentum": 2.0}, InvalidConfiguration),
        ({"eps": 0.0}, InvalidConfiguration),
        ({"name": ""}, InvalidName),
        ({"name": 3}, InvalidName),
        ({"compute": "server", "max_staleness": 1.0}, InvalidConfiguration),
    ):
        with pytest.raises(error):
            ours(hub, "BatchNorm2d", 4, **options)
    with pytest.raises(InvalidConfiguration, match=r"hub is '127.*expected: what sharednorm.connect"):
        ours(hub.address, "BatchNorm2d", 4)  # type: ignore[arg-type]
    ours(hub, "BatchNorm2d", 4, name="taken")
    with pytest.raises(ConfigurationMismatch, match="maps"):
        ours(hub, "BatchNorm2d", 5, name="taken")
    module = ours(hub, "BatchNorm2d", 4)
    with pytest.raises(AttributeError):
        module.momentum = 0.5  # it would not reach the server


# --- Groups ---------------------------------------------------------------------------------------------------------


def test_members_are_one_batch(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    sizes, name = [2, 5, 0], next(names)
    x, grad = tensor(1, (7, 4, 3, 3)), tensor(2, (7, 4, 3, 3))
    wide = theirs("BatchNorm2d", 4).double()
    right, right_grad = step(wide, x.double(), grad.double())
    with Members(hub.address, 3, "auto", name) as members:
        modules = [
            adapter.BatchNorm2d(4, hub=each, name=name, group=group)
            for each, group in zip(members.hubs, members.groups, strict=True)
        ]
        results = all_of(3, lambda rank: step(modules[rank], x.split(sizes)[rank], grad.split(sizes)[rank]))
        close(torch.cat([y for y, _ in results]), right, 1e-5)
        close(torch.cat([x_grad for _, x_grad in results]), right_grad, 1e-5)
        # The gradients of the parameters are each member's own part, as SyncBatchNorm's: their sum is the whole.
        close(sum(module.weight.grad for module in modules), wide.weight.grad, 1e-4)
        close(sum(module.bias.grad for module in modules), wide.bias.grad, 1e-4)
        assert modules[0].num_batches_tracked == 1
        close(modules[1].running_var, wide.running_var, 1e-5)
        modules[0].eval()
        modules[0](x)  # alone


def test_members_whose_statistics_nobody_keeps(hub: sharednorm.Hub) -> None:
    from sharednorm import torch as adapter

    name, x = next(names), tensor(1, (6, 4))
    wide = theirs("BatchNorm1d", 4, track_running_stats=False).double()
    with Members(hub.address, 2, "auto", name) as members:
        modules = [
            adapter.BatchNorm1d(4, track_running_stats=False, hub=each, name=name, group=group)
            for each, group in zip(members.hubs, members.groups, strict=True)
        ]
        results = all_of(2, lambda rank: modules[rank](x.split(3)[rank]))
        close(torch.cat(results), wide(x.double()), 1e-5)


DDP = """
import os, sys
import torch
import sharednorm, sharednorm.torch
from torch.nn.parallel import DistributedDataParallel

address, rank, size = sys.argv[1], int(sys.argv[2]), 2
torch.distributed.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=size)
torch.manual_seed(0)
with sharednorm.connect(address) as hub:
    group = sharednorm.Group("ddp", size, rank=rank)
    first, last = torch.nn.Conv2d(1, 3, 3), torch.nn.Linear(108, 2)
    model = torch.nn.Sequential(first, torch.nn.BatchNorm2d(3), torch.nn.Flatten(), last)
    model = sharednorm.torch.convert(model, hub, prefix="ddp/", group=group)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7)
    for step in range(5):
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(2, (8,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(parallel(x[rank::size]), y[rank::size]).backward()
        optimizer.step()
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, sys.argv[4])
    group.leave()

    # Without a group the batches of both are taken in, each by itself; DDP must not replace what the server knows.
    alone = sharednorm.torch.BatchNorm1d(3, momentum=None, hub=hub, name="alone")
    parallel = DistributedDataParallel(alone)
    for step in range(4):
        parallel(torch.randn(6, 3, generator=generator) + rank).sum().backward()
    torch.distributed.barrier()
    assert alone.num_batches_tracked == 4 * size
    assert 0.1 < float(alone.running_mean.mean()) < 0.9, alone.running_mean
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_ddp_are_one(hub: sharednorm.Hub, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    meeting = f"file://{tmp_path}/meeting"
    results = [tmp_path / f"result{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), hub.address, str(rank), meeting, str(results[rank])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(108, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(2, (8,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for result in results:
        for name, value in torch.load(result).items():
            close(value, model.state_dict()[name], 1e-4)


def test_what_is_public_belongs_to_the_package() -> None:
    adapter = pytest.importorskip("sharednorm.torch")
    assert {getattr(adapter, name).__module__ for name in adapter.__all__} == {"sharednorm.torch"}
