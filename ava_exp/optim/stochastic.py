"""AdamW or any other optimizer on bf16 weights, computed in fp32 and rounded stochastically, without fp32 copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PORTION_VALUES = 2**22
"""Weights that are wide at once: 64 MiB of them, their gradients and Adam's states; a larger tensor is one portion."""


def round_stochastically(values: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the expectation exact [gupta2015limited] §3.1.

    The random bits come from torch's global generator of the device: four values of each 64-bit number.
    """
    assert values.dtype == torch.float32
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device).random_(-(2**63), None)
    noise = words.view(torch.int16)[: values.numel()].view(values.shape).to(torch.int32).bitwise_and_(0xFFFF)
    bits = noise.add_(values.contiguous().view(torch.int32))  # carries into the half that is kept
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


class StandIns:
    """fp32 parameters that an optimizer holds in place of a model's, and that have values only while it steps."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.parameters = {name: nn.Parameter(torch.empty(0, device=w.device)) for name, w in weights.items()}

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights portion by portion; what the optimizer remembers is rounded as they are."""
        for names in self._portions():
            for name in names:
                self._widen(name, optimizer.state[self.parameters[name]])
            optimizer.step()
            for name in names:
                self._narrow(name, optimizer.state[self.parameters[name]])

    def narrow_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring restored states, which torch makes as wide as the stand-ins, back to the values that were saved."""
        for state in optimizer.state.values():
            state |= {key: value.bfloat16() for key, value in state.items() if _is_rounded(value)}

    def _portions(self) -> Iterator[list[str]]:
        portion: list[str] = []
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            if portion and sum(self.weights[n].numel() for n in portion) + weight.numel() > PORTION_VALUES:
                yield portion
                portion = []
            portion.append(name)
        if portion:
            yield portion

    def _widen(self, name: str, state: dict[str, Any]) -> None:
        weight, wide = self.weights[name], self.parameters[name]
        assert weight.grad is not None
        wide.data, wide.grad = weight.float(), weight.grad.float()
        weight.grad = None
        state |= {key: value.float() for key, value in state.items() if _is_rounded(value)}

    def _narrow(self, name: str, state: dict[str, Any]) -> None:
        wide = self.parameters[name]
        self.weights[name].copy_(round_stochastically(wide.data))
        state |= {key: round_stochastically(value) for key, value in state.items() if _is_rounded(value)}
        wide.data, wide.grad = wide.data.new_empty(0), None


def _is_rounded(value: Any) -> bool:
    """Whether a state is kept in bf16: a tensor of values, and no counter of steps."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
