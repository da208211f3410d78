"""What ranks do in the tests of this folder, by name: `python -m tests.distributed.worker NAME`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.errors import ConfigError
from ava_exp.optim.update import Updater
from ava_exp.parallel import start, zero
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import DataParallel

CPU = HardwareConfig(name="cpu", device=DeviceType.cpu, num_devices=2)


def joined(backend: Backend = Backend.ddp) -> Ranks:
    return start.join_ranks(DistributedConfig(backend=backend, timeout_s=60), CPU)


def values() -> None:
    """Plain values and tensors of several formats."""
    ranks = joined()
    number = ranks.rank + 1
    assert ranks.sums([number, 10 * number]) == [3, 30] and ranks.largest([-number, number]) == [-1, 2]
    assert ranks.from_first({"rank": ranks.rank}) == {"rank": 0} and ranks.gather(ranks.rank) == [0, 1]
    given = [torch.full((2, 2), number), torch.tensor(0.5 * number), torch.tensor([number]), torch.zeros(0)]
    whole, half, one, none = ranks.add_up(given)
    assert torch.equal(whole, torch.full((2, 2), 3)) and half.item() == 1.5 and one.tolist() == [3]
    assert half.ndim == 0 and none.shape == (0,) and given[1].item() == 0.5 * number, "what was given stays as it was"
    start.leave_ranks(ranks)


def masters() -> None:
    """Gradients of bf16 weights are added up over ranks and micro-batches in fp32, on the masters."""
    ranks = joined()
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False).bfloat16()
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=True)
    wrapped = start.wrap(start.make_accelerator(DeviceType.cpu), model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    strategy = DataParallel(wrapped, updater, ranks)
    inputs = torch.randn(3, ranks.num_ranks, 5, 8).bfloat16()
    for number, own in enumerate(inputs[:, ranks.rank], start=1):
        with strategy.accumulate(is_last=number == 3):
            strategy.objective(own).sum().backward()
    expected = torch.zeros(4, 8)
    for each in inputs.flatten(0, 1):
        expected += torch.ones(4, 5).bfloat16().matmul(each).float()
    gradient = updater.weights["weight"].grad
    assert gradient is not None and gradient.dtype == torch.float32 and model.weight.grad is None
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    start.leave_ranks(ranks)


def drift() -> None:
    """Weights that part are noticed."""
    ranks = joined()
    model = nn.Linear(8, 4, bias=False)
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=False)
    wrapped = start.wrap(start.make_accelerator(DeviceType.cpu), model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    strategy = DataParallel(wrapped, updater, ranks)
    strategy.verify()
    if ranks.rank == 1:
        model.weight.data[2, 3] += 2**-20
    try:
        strategy.verify()
    except RuntimeError as error:
        assert str(error) == "1 weights are not the same on all ranks, as weight"  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")
    start.leave_ranks(ranks)


def no_synchronisation() -> None:
    """A library that leaves gradients alone is found out before the first step."""
    start.wrap = lambda accelerator, module: module  # type: ignore[assignment]
    try:
        joined()
    except RuntimeError as error:
        assert "gradients are not averaged over the ranks" in str(error)  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


def idle() -> None:
    """With stages 1 and 2 a weight without a gradient is refused before anything is added up; with stage 0 it is left
    as it is, unless another rank has one."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, uses_other: bool) -> torch.Tensor:
            y = self.one(torch.ones(1, 4))
            return (self.other(y) if uses_other else y).sum()

    for backend in (Backend.zero2, Backend.zero0):
        ranks = joined(backend)
        model, options = Pair(), {"weight_decay": 0.0, "master_weights": False}
        accelerator = start.make_accelerator(DeviceType.cpu, backend=backend)

        def engine_of(optimizer: torch.optim.Optimizer, model: nn.Module = model, of: Ranks = ranks) -> Any:
            return zero.start_engine(accelerator, of, model, optimizer)  # noqa: B023 - used before the next one

        if backend is Backend.zero0:
            updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), **options)
            copies = zero.ZeroCopies(engine_of(updater.optimizer), updater, ranks)
            with copies.accumulate(is_last=True):
                copies.backward(copies.objective(uses_other=ranks.rank == 1))
            other = updater.weights["other.weight"].grad
            assert other is not None and other.abs().sum() > 0, "of the rank that has one"
            with copies.accumulate(is_last=True):
                updater.weights["other.weight"].grad = None
                copies.backward(copies.objective(uses_other=False))
            assert updater.weights["other.weight"].grad is None
            start.leave_ranks(ranks)
            return
        cut = zero.ZeroUpdater(
            model,
            lambda groups: torch.optim.SGD(groups, lr=1.0),
            engine_of=engine_of,
            ranks=ranks,
            device=torch.device("cpu"),
            **options,
        )
        strategy = zero.Zero(cut)
        try:
            with strategy.accumulate(is_last=True):
                strategy.backward(strategy.objective(uses_other=False))
        except ConfigError as error:
            assert "all weights must take part in a micro-batch, but other.weight did not" in str(error)  # noqa: PT017
        else:
            raise AssertionError("nobody noticed")
        AcceleratorState._reset_state(True)


def shapes() -> None:
    """An optimizer that looks at whole weights is refused where ranks have parts of them."""
    ranks = joined(Backend.zero1)
    for build in (torch.optim.Muon, torch.optim.Adafactor):
        try:
            zero.ZeroUpdater(
                nn.Linear(4, 4, bias=False),
                build,
                engine_of=lambda optimizer: None,
                ranks=ranks,
                device=torch.device("cpu"),
                weight_decay=0.0,
                master_weights=False,
            )
        except ConfigError as error:
            assert str(error).startswith(f"{build.__name__} updates whole weights, but with `distributed=zero1`")  # noqa: PT017
        else:
            raise AssertionError("nobody noticed")
    start.leave_ranks(ranks)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("done")
