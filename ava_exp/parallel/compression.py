"""Gradients that travel in fewer bytes: rounded, or as products of narrow matrices, PowerSGD [vogels2019powersgd]."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ava_exp.config.distributed import DistributedConfig, GradientCompression
from ava_exp.parallel.ranks import Ranks

WORTHWHILE = 2
"""A gradient is compressed where that makes it at least this many times smaller."""
ERROR, FACTOR = "error", "factor"


@dataclass(slots=True)
class Distance:
    """How far sums are from exact ones, by their squares."""

    missed: float = 0.0
    whole: float = 0.0

    def add(self, sums: Tensor, exact: Tensor) -> None:
        """Take some more of them."""
        self.missed += (sums.double() - exact.double()).square().sum().item()
        self.whole += exact.double().square().sum().item()

    @property
    def relative(self) -> float:
        """Of the norm of the exact sums; zero where they are."""
        return math.sqrt(self.missed / self.whole) if self.whole else 0.0


class LowRankSums:
    """Adds up gradients over the ranks as P Qᵀ of `rank` columns, P the best for the Q of the step before; what is lost
    of a rank's gradient by that is added to its next one [vogels2019powersgd] alg. 1 and 2.

    It is done weight by weight, so that what is remembered does not depend on how gradients are packed to travel. A
    stack of matrices is compressed matrix by matrix; what is small or no matrix is added up as it is.
    """

    def __init__(self, weights: Mapping[str, Tensor], rank: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.factors: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if _is_worthwhile(weight.shape, rank):
                drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # the same on all ranks
                shape = (*weight.shape[:-2], weight.shape[-1], rank)
                self.factors[name] = torch.randn(shape, generator=drawn).to(weight.device)
                self.errors[name] = torch.zeros(weight.shape, device=weight.device)

    @torch.no_grad()
    def add_up(self, gradients: Mapping[str, Tensor], scale: float, distance: Distance | None = None) -> int:
        """Replace each gradient, which is `scale` times too large, by the sum over the ranks; return how many bytes
        this rank gave for that. `distance` takes how far the sums are from exact ones, which then are made, too.

        Of a sum that is not finite nothing is remembered: no step is made of it.
        """
        exact: list[Tensor] = []
        if distance is not None:
            exact = self.ranks.add_up([gradient.to(torch.float32, copy=True) for gradient in gradients.values()])
        matrices = {name: gradients[name].float() + scale * self.errors[name] for name in self.factors}
        rest = {name: gradient for name, gradient in gradients.items() if name not in self.factors}
        wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in rest.values()]
        products = [matrix @ self.factors[name] for name, matrix in matrices.items()]
        sums = self.ranks.add_up([*products, *wide])
        for gradient, total in zip(rest.values(), sums[len(products) :], strict=True):
            gradient.copy_(total)
        bases = [torch.linalg.qr(product).Q for product in sums[: len(products)]]
        own = [matrix.mT @ basis for matrix, basis in zip(matrices.values(), bases, strict=True)]
        factors = self.ranks.add_up(own)
        is_finite = all(bool(each.isfinite().all()) for each in (*factors, *sums))
        for (name, matrix), basis, factor in zip(matrices.items(), bases, factors, strict=True):
            total = basis @ factor.mT
            gradients[name].copy_(total)
            if is_finite:
                self.factors[name] = factor / scale
                self.errors[name] = (matrix - total / self.ranks.num_ranks) / scale
        if distance is not None:
            for gradient, total in zip(gradients.values(), exact, strict=True):
                distance.add(gradient, total)
        return sum(tensor.nbytes for tensor in (*wide, *products, *own))

    def state(self) -> dict[str, Tensor]:
        """Return what the next step needs of this rank."""
        errors = {f"{ERROR}/{name}": error for name, error in self.errors.items()}
        return errors | {f"{FACTOR}/{name}": factor for name, factor in self.factors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. What is not of this model or rank starts anew: it is no more than a start."""
        for kind, own in ((ERROR, self.errors), (FACTOR, self.factors)):
            for name, tensor in own.items():
                saved = state.get(f"{kind}/{name}")
                if saved is not None and saved.shape == tensor.shape:
                    own[name] = saved.to(tensor.device)


def build_compression(
    distributed: DistributedConfig, weights: Mapping[str, Tensor], ranks: Ranks
) -> torch.dtype | LowRankSums | None:
    """Return the format in which gradients travel, or what adds them up in its own way; None is as they are."""
    compression = distributed.gradient_compression
    if compression is GradientCompression.powersgd:
        return LowRankSums(weights, distributed.powersgd_rank, ranks)
    return {GradientCompression.fp16: torch.float16, GradientCompression.bf16: torch.bfloat16}.get(compression)


def _is_worthwhile(shape: torch.Size, rank: int) -> bool:
    if len(shape) < 2:
        return False
    height, width = shape[-2:]
    return WORTHWHILE * rank * (height + width) <= height * width
