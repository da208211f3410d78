"""What ranks do in the tests of DeepSpeed: `python -m tests.distributed.zero_worker`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.errors import ConfigError
from ava_exp.optim.update import LossScale, Updater
from ava_exp.parallel import start, zero
from ava_exp.parallel.ranks import Ranks
from tests.distributed.worker import CPU

OPTIONS: dict[str, Any] = {"weight_decay": 0.0, "master_weights": False}


class Pair(nn.Module):
    """Two layers, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, uses_other: bool) -> torch.Tensor:
        y = self.one(torch.ones(1, 4))
        return (self.other(y) if uses_other else y).sum()


def joined(backend: Backend) -> Ranks:
    return start.join_ranks(DistributedConfig(backend=backend, timeout_s=60), CPU)


def descent(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


def updater_of(model: nn.Module, ranks: Ranks, build: Any = descent, **options: Any) -> zero.ZeroUpdater:
    def engine_of(optimizer: torch.optim.Optimizer) -> Any:
        return zero.start_engine(ranks, model, optimizer)

    options = {**OPTIONS, **options}
    return zero.ZeroUpdater(model, build, engine_of=engine_of, ranks=ranks, device=torch.device("cpu"), **options)


def shapes(ranks: Ranks) -> None:
    """An optimizer that looks at whole weights is refused where ranks have parts of them."""
    for build in (torch.optim.Muon, torch.optim.Adafactor):
        try:
            updater_of(Pair(), ranks, build)
        except ConfigError as error:
            expected = f"{build.__name__} updates whole weights, but with `distributed=zero2`"
            assert str(error).startswith(expected)  # noqa: PT017 - in a child
        else:
            raise AssertionError("nobody noticed")


def idle(ranks: Ranks) -> None:
    """A weight without a gradient is refused before anything is added up."""
    strategy = zero.Zero(updater_of(Pair(), ranks))
    try:
        with strategy.accumulate(is_last=True):
            assert strategy.backward is not None
            strategy.backward(strategy.objective(uses_other=False))
    except ConfigError as error:
        expected = "all weights must take part in a micro-batch, but other.weight did not"
        assert expected in str(error)  # noqa: PT017 - in a child
    else:
        raise AssertionError("nobody noticed")


def ages(ranks: Ranks) -> None:
    """States of weights that had different numbers of updates cannot be put back where they are updated together."""
    updater = updater_of(Pair(), ranks, torch.optim.AdamW)
    one, other = ({f"{name}.weight/step": torch.tensor(step)} for name, step in (("one", 3.0), ("other", 2.0)))
    for tensors, expected in ((one, "must all have states, but 1 do"), (one | other, "differ in `step`")):
        try:
            updater.load_optimizer_state(tensors, {})
        except ValueError as error:
            assert expected in str(error)  # noqa: PT017 - in a child
        else:
            raise AssertionError("nobody noticed")


def scaled(ranks: Ranks) -> None:
    """A loss scale is no part of the norm, nor of what is clipped to it; a step that overflows lowers it."""
    model = Pair()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    alone = copy.deepcopy(model)
    (ranks.num_ranks * alone(True)).backward()
    expected = torch.nn.utils.get_total_norm([weight.grad for weight in alone.parameters() if weight.grad is not None])
    updater = updater_of(model, ranks, loss_scale=LossScale(scale=1024.0, dynamic=True))
    strategy = zero.Zero(updater)
    assert strategy.backward is not None
    for factor in (torch.inf, 1.0):
        with strategy.accumulate(is_last=True):
            strategy.backward(strategy.objective(uses_other=True) * updater.loss_scale.scale * factor)
        norm, applied = updater.apply(1.0, expected.item() / 2)
        assert applied == (factor == 1.0) and updater.loss_scale.scale == 512.0
    assert abs(norm - expected.item()) <= 1e-5 * norm
    for name, weight in updater.whole_weights(everywhere=True).items():
        gradient = alone.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(weight, before[name] - gradient / 2, rtol=1e-4, atol=1e-6)


def copies(ranks: Ranks) -> None:
    """With stage 0 a weight that no rank used is left as it is; one that another rank used has that one's gradient."""
    model = Pair()
    updater = Updater(model, descent, **OPTIONS)
    strategy = zero.ZeroCopies(zero.start_engine(ranks, model, updater.optimizer), updater, ranks)
    for uses_other in (ranks.rank == 1, False):
        updater.weights["other.weight"].grad = None
        with strategy.accumulate(is_last=True):
            strategy.backward(strategy.objective(uses_other=uses_other))
        gradient = updater.weights["other.weight"].grad
        (by_any,) = ranks.largest([uses_other])
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == bool(by_any)


if __name__ == "__main__":
    two = joined(Backend.zero2)
    shapes(two)
    idle(two)
    ages(two)
    for backend in (Backend.zero2, Backend.zero3):
        AcceleratorState._reset_state(True)
        torch.manual_seed(0)
        scaled(joined(backend))
    AcceleratorState._reset_state(True)
    none = joined(Backend.zero0)
    copies(none)
    start.leave_ranks(none)
    print("done")
