"""What ranks do in the tests of this folder, by name: `python -m tests.distributed.worker NAME`."""

from __future__ import annotations

import sys

import torch
from torch import nn

from ava_exp import runtime
from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import DataParallel

CPU = HardwareConfig(name="cpu", device=DeviceType.cpu, num_devices=2)


def joined(backend: Backend = Backend.ddp) -> Ranks:
    return runtime.join_ranks(DistributedConfig(backend=backend, timeout_s=60), CPU)


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
    runtime.leave_ranks(ranks)


def masters() -> None:
    """Gradients of bf16 weights are added up over ranks and micro-batches in fp32, on the masters."""
    ranks = joined()
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False).bfloat16()
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=True)
    wrapped = runtime._wrap(runtime._accelerator(DeviceType.cpu), model)
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
    runtime.leave_ranks(ranks)


def drift() -> None:
    """Weights that part are noticed."""
    ranks = joined()
    model = nn.Linear(8, 4, bias=False)
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=False)
    wrapped = runtime._wrap(runtime._accelerator(DeviceType.cpu), model)
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
    runtime.leave_ranks(ranks)


def no_synchronisation() -> None:
    """A library that leaves gradients alone is found out before the first step."""
    runtime._wrap = lambda accelerator, module: module  # type: ignore[assignment]
    try:
        joined()
    except RuntimeError as error:
        assert "gradients are not averaged over the ranks" in str(error)  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("done")
