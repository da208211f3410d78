"""What ranks do in the tests of this folder, one after another: `python -m tests.distributed.worker`."""

from __future__ import annotations

import torch
from torch import nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.optim.update import Updater
from ava_exp.parallel import start
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import DataParallel

CPU = HardwareConfig(name="cpu", device=DeviceType.cpu, num_devices=2)


def joined() -> Ranks:
    return start.join_ranks(DistributedConfig(backend=Backend.ddp, timeout_s=60), CPU)


def wrapped(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    wrapped = start.wrap(start.make_accelerator(DeviceType.cpu), model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    return wrapped


def values(ranks: Ranks) -> None:
    """Plain values and tensors of several formats."""
    number = ranks.rank + 1
    assert ranks.sums([number, 10 * number]) == [3, 30] and ranks.largest([-number, number]) == [-1, 2]
    assert ranks.from_first({"rank": ranks.rank}) == {"rank": 0} and ranks.gather(ranks.rank) == [0, 1]
    assert ranks.gather_at_first(ranks.rank) == ([0, 1] if ranks.is_first else [])
    given = [torch.full((2, 2), number), torch.tensor(0.5 * number), torch.tensor([number]), torch.zeros(0)]
    whole, half, one, none = ranks.add_up(given)
    assert torch.equal(whole, torch.full((2, 2), 3)) and half.item() == 1.5 and one.tolist() == [3]
    assert half.ndim == 0 and none.shape == (0,) and given[1].item() == 0.5 * number, "what was given stays as it was"


def masters(ranks: Ranks) -> None:
    """Gradients of bf16 weights are added up over ranks and micro-batches in fp32, on the masters."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False).bfloat16()
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=True)
    strategy = DataParallel(wrapped(model), updater, ranks)
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


def drift(ranks: Ranks) -> None:
    """Weights that part are noticed."""
    model = nn.Linear(8, 4, bias=False)
    updater = Updater(model, lambda groups: torch.optim.SGD(groups, lr=1.0), weight_decay=0, master_weights=False)
    strategy = DataParallel(wrapped(model), updater, ranks)
    strategy.verify()
    if ranks.rank == 1:
        model.weight.data[2, 3] += 2**-20
    try:
        strategy.verify()
    except RuntimeError as error:
        assert str(error) == "1 weights are not the same on all ranks, as weight"  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


def no_synchronisation() -> None:
    """A library that leaves gradients alone is found out before the first step."""
    start.wrap = lambda accelerator, module: module
    try:
        joined()
    except RuntimeError as error:
        assert "gradients are not averaged over the ranks" in str(error)  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


if __name__ == "__main__":
    met = joined()
    for check in (values, masters, drift):
        check(met)
    no_synchronisation()
    start.leave_ranks(met)
    print("done")
