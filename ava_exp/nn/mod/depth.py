"""What the ways to choose a layer's tokens have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ava_exp.nn.attention.cache import AttentionContext
from ava_exp.nn.mod.selection import Selection


@dataclass(slots=True, kw_only=True)
class Depth:
    """What one layer that tokens may skip did with B · T tokens."""

    token_ids: Tensor
    """Shape (N,), int64: the tokens that were processed, as places among the B · T."""
    num_sequences: int
    num_tokens: int
    """B · T, without the padding of prompts."""
    num_pairs: int
    """Pairs of a query and a key that attention saw for processed tokens, without a cache; 0 where tokens skip the
    feed-forward network only."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted scalars, each a mean over tokens."""
    num_predicted: Tensor | None = None
    """Of how many tokens the predictor says what was decided, int64; None without a predictor, or where it decides."""

    @property
    def num_processed(self) -> int:
        return self.token_ids.numel()

    @property
    def usage(self) -> float:
        """The share of tokens that were processed."""
        return self.num_processed / max(1, self.num_tokens)


@dataclass(slots=True, kw_only=True)
class Decision:
    """A selection, and what there is to say of how it was made."""

    selection: Selection
    losses: dict[str, Tensor] = field(default_factory=dict)
    num_predicted: Tensor | None = None

    def depth(self, *, attends: bool) -> Depth:
        """Return what is told of it; `attends` says whether attention is among what the others skip."""
        selection = self.selection
        return Depth(
            token_ids=selection.token_ids,
            num_sequences=selection.shape[0],
            num_tokens=selection.num_tokens,
            num_pairs=selection.num_pairs if attends else 0,
            losses=self.losses,
            num_predicted=self.num_predicted,
        )


class DepthRouter(nn.Module, ABC):
    """Decides which tokens a layer processes. `place` counts the layers before it that tokens may skip.

    `capacity` is the share of tokens in force: annealing and surgery change it.
    """

    def __init__(self, capacity_factor: float, place: int) -> None:
        super().__init__()
        self.capacity, self.place = capacity_factor, place

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Decision:
        """Choose among the tokens of (B, T, D), which is what the layer would change."""

    def blend(self, x: Tensor, processed: Tensor) -> Tensor:
        """Return what becomes of the chosen tokens (…, D), given what they were and what the layer made of them."""
        return processed


def positions_of(context: AttentionContext, batch: int, length: int, device: torch.device) -> Tensor:
    """Return where in their texts the tokens of a batch stand, (B, T) int64."""
    offsets = torch.arange(length, device=device)
    start = context.cache.lengths if context.cache is not None else 0
    positions = offsets + (start[:, None] if isinstance(start, Tensor) else start)
    return positions.expand(batch, length)


def real_tokens(context: AttentionContext, length: int) -> Tensor | None:
    """Return which tokens are no padding of a prompt, (B, T) bool; None is all."""
    if context.counts is None:
        return None
    return torch.arange(length, device=context.counts.device) < context.counts[:, None]
