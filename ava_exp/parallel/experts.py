"""Experts divided among ranks, with everything else on all of them [lepikhin2020gshard] §3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ava_exp.models.decoder import Decoder
from ava_exp.nn.moe.exchange import Exchange
from ava_exp.nn.moe.experts import Experts
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import ExpertRanks, Ranks
from ava_exp.parallel.strategy import DataParallel


def divide_experts(model: Decoder, ranks: Ranks) -> None:
    """Leave this rank its share of the experts of a model that was just built, and let tokens go to the others'."""
    assert ranks.experts is not None
    for layer in model.moe_layers():
        give_part(layer.experts, ranks.experts.others)


def give_part(experts: Experts, others: Ranks) -> Exchange:
    """Leave this rank its share of a layer's experts; return the way to the rest."""
    assert others.group is not None
    for name in experts.stacks():
        whole = getattr(experts, name)
        setattr(experts, name, nn.Parameter(whole.detach().chunk(others.num_ranks)[others.rank].clone()))
    experts.num_experts //= others.num_ranks
    experts.exchange = Exchange(others.group, others.num_ranks)
    return experts.exchange


def divided_weights(model: Decoder) -> list[str]:
    """Return the names of the weights of which ranks have parts."""
    modules = {module: name for name, module in model.named_modules()}
    return [f"{modules[layer.experts]}.{name}" for layer in model.moe_layers() for name in layer.experts.stacks()]


def leave_alone(objective: nn.Module, divided: list[str]) -> None:
    """Let a wrapper that keeps ranks alike know that these weights of the objective's model differ."""
    names = [f"model.{name}" for name in divided]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, names)  # type: ignore[no-untyped-call]


class ExpertParallelUpdater(Updater):
    """Updates all weights but those of experts that other ranks hold."""

    is_sharded, holds_model = True, False

    def __init__(self, model: Decoder, *arguments: Any, experts: ExpertRanks, **settings: Any) -> None:
        self.experts, self.divided = experts, divided_weights(model)
        super().__init__(model, *arguments, **settings)

    def _norm(self, gradients: list[Tensor]) -> float:
        squares = torch.zeros(2, dtype=torch.float32, device=gradients[0].device)
        for name, weight in self.weights.items():
            if weight.grad is not None:
                squares[int(name in self.divided)] += weight.grad.float().square().sum()
        (of_experts,) = self.experts.others.add_up([squares[1]])
        return (squares[0] + of_experts).sqrt().item()

    def whole(self, name: str, part: Tensor, *, everywhere: bool = False) -> Tensor:
        if name not in self.divided:
            return part
        return self.experts.others.put_together(part.detach())

    def cut(self, name: str, whole: Tensor) -> Tensor:
        if name not in self.divided or whole.ndim == 0:
            return whole
        return whole.chunk(self.experts.others.num_ranks)[self.experts.others.rank]


class ExpertParallel(DataParallel):
    """A copy of everything but experts on every rank. Tokens have brought an expert's gradients together already; those
    of several ranks that hold the same ones are added up."""

    updater: ExpertParallelUpdater

    def __init__(
        self, objective: DistributedDataParallel, updater: ExpertParallelUpdater, ranks: Ranks, model: Decoder
    ) -> None:
        super().__init__(objective, updater, ranks, own=updater.divided)
        assert ranks.experts is not None
        self._same = ranks.experts.same
        self._exchanges = [layer.experts.exchange for layer in model.moe_layers() if layer.experts.exchange is not None]

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        with super().accumulate(is_last):
            yield
        if is_last and self._same.num_ranks > 1:
            experts = [self.updater.weights[name] for name in self.updater.divided]
            gradients = self._same.add_up([weight.grad for weight in experts if weight.grad is not None])
            for weight, gradient in zip(experts, gradients, strict=True):
                weight.grad = gradient

    def record(self) -> dict[str, float]:
        own = sum(exchange.sent_bytes for exchange in self._exchanges)
        for exchange in self._exchanges:
            exchange.sent_bytes = 0
        return {"exchanged_bytes": self.ranks.sums([own])[0]}

    def verify(self) -> None:
        """Raise RuntimeError unless ranks agree on what they should have alike."""
        weights, divided = self.updater.weights, self.updater.divided
        self._verify_alike({n: w for n, w in weights.items() if n not in divided} | self.updater.buffers)
        self._verify_alike({name: weights[name] for name in divided}, self._same)
