"""What ranks do in `test_strategy`, one after another: `python -m tests.distributed.worker`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.model import Activation, DispatchBackend, SharedProjection
from ava_exp.nn.moe.experts import Experts
from ava_exp.optim.update import Updater
from ava_exp.parallel import start
from ava_exp.parallel.experts import give_part
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import DataParallel

CPU = HardwareConfig(name="cpu", device=DeviceType.cpu, num_devices=2)


def joined() -> Ranks:
    return start.join_ranks(DistributedConfig(backend=Backend.ddp, expert_parallel=2, timeout_s=60), CPU)


def wrapped(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    wrapped = start.wrap(start.make_accelerator(DeviceType.cpu), model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    return wrapped


def values(ranks: Ranks) -> None:
    """Plain values and tensors of several formats."""
    number = ranks.rank + 1
    assert ranks.sums([number, 10 * number]) == [3, 30] and ranks.largest([-number, number]) == [-1, 2]
    assert ranks.from_first({"rank": ranks.rank}) == {"rank": 0} and ranks.gather(ranks.rank) == [0, 1]
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


def experts(ranks: Ranks) -> None:
    """Half of the experts on each of two ranks do for the tokens of both what all of them do on one."""
    assert ranks.experts is not None and ranks.experts.others.num_ranks == 2 and ranks.experts.same.num_ranks == 1
    group = ranks.experts.others.group
    assert group is not None
    choices = {  # by rank: the experts of every token
        "both": ([[0, 1], [2, 3], [1, 2]], [[3, 0], [0, 1], [1, 0], [2, 3]]),
        "expert 2 alone": ([[2], [2]], [[2], [2], [2]]),
        "nobody on one rank": ([[0, 3], [1, 2]], []),
        "own experts": ([[0, 1], [1, 0]], [[2, 3]]),
        "everybody to all": ([[0, 1, 2, 3]], [[3, 2, 1, 0]] * 2),
        "ragged": ([[-1, -1], [3, -1]], [[0, 1], [-1, 2]]),
    }
    settings: list[dict[str, Any]] = [
        {},
        {"share": SharedProjection.up, "norm": True},
        {"share": SharedProjection.down},
        {"dispatch": DispatchBackend.loop, "norm": True},
    ]
    for (name, ids), extra in itertools.product(choices.items(), settings):
        _compare_experts(ranks, [torch.tensor(i, dtype=torch.int64) for i in ids], name == "ragged", extra)


def _compare_experts(ranks: Ranks, ids: list[Tensor], ragged: bool, extra: dict[str, Any]) -> None:
    assert ranks.experts is not None and ranks.experts.others.group is not None
    torch.manual_seed(0)
    whole = Experts(4, 16, 32, Activation.swiglu, **extra)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    part = copy.deepcopy(whole)
    exchange = give_part(part, ranks.experts.others)
    num_choices = max(i.shape[-1] for i in ids)
    ids = [i.view(len(i), num_choices) for i in ids]
    inputs = [torch.randn(len(i), 16) for i in ids]
    weights = [torch.rand(i.shape) for i in ids]
    outputs, gradients = {}, {}
    for one, rank in ((whole, 0), (whole, 1), (part, ranks.rank)):
        x, w = inputs[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
        outputs[one, rank] = y = one(x, ids[rank], w, ragged)
        (y * torch.arange(16)).sum().backward()
        gradients[one, rank] = (x.grad, w.grad)
    own = ranks.rank
    torch.testing.assert_close(outputs[part, own], outputs[whole, own])
    torch.testing.assert_close(gradients[part, own], gradients[whole, own])
    others = sum(int(((own_ids >= 0) & (own_ids // 2 != rank)).sum()) for rank, own_ids in enumerate(ids))
    assert ranks.sums([exchange.sent_bytes]) == [4 * others * 16 * 4], "there and back, twice"
    for name, parameter in part.named_parameters():
        expected = whole.get_parameter(name).grad
        assert parameter.grad is not None and expected is not None
        if name in part.stacks():
            torch.testing.assert_close(parameter.grad, expected.chunk(2)[own])
        else:
            torch.testing.assert_close(ranks.add_up([parameter.grad])[0], expected)


def no_synchronisation() -> None:
    """A library that leaves gradients alone is found out before the first step."""
    start.wrap = lambda accelerator, module: module  # type: ignore[assignment]
    try:
        joined()
    except RuntimeError as error:
        assert "gradients are not averaged over the ranks" in str(error)  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


if __name__ == "__main__":
    everybody = joined()
    for do in (values, masters, drift, experts):
        do(everybody)
    no_synchronisation()
    start.leave_ranks(everybody)
    print("done")
