"""Depth that no token's content decides: a pattern of positions, or chance."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ava_exp.config.mod import STEPS_PER_TOKEN, num_chosen, pattern_steps
from ava_exp.nn.attention.cache import AttentionContext
from ava_exp.nn.mod.depth import Decision, DepthRouter, positions_of, real_tokens
from ava_exp.nn.mod.selection import (
    Selection,
    multiple_of,
    select_alike,
    select_as_many,
    select_everything,
    select_where,
)

WORD = 2**32 - 1


class FixedDepth(DepthRouter):
    """Processes the tokens at certain positions of a text. Causal, since nothing but the position matters."""

    def __init__(self, capacity_factor: float, dim: int, place: int) -> None:
        super().__init__(capacity_factor, place)

    @abstractmethod
    def chosen(self, positions: Tensor) -> Tensor:
        """Return which positions, int64 of any shape, are processed."""

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Decision:
        return Decision(selection=self._select(x_BTD, context))

    def _select(self, x_BTD: Tensor, context: AttentionContext) -> Selection:
        batch, length = x_BTD.shape[:2]
        start = context.cache.lengths if context.cache is not None else 0
        real_BT = real_tokens(context, length)
        if real_BT is None and isinstance(start, int):
            chosen_T = self.chosen(torch.arange(start, start + length))
            return select_alike(chosen_T.nonzero().squeeze(1).to(x_BTD.device), batch, length)
        chosen_BT = self.chosen(positions_of(context, batch, length, x_BTD.device))
        if real_BT is None:
            return select_where(chosen_BT, chosen_BT.numel(), multiple_of(x_BTD))
        return select_where(chosen_BT & real_BT, int(real_BT.sum()), multiple_of(x_BTD))


class StaticDepth(FixedDepth):
    """Position p is processed where floor((p + place + 1) · c) exceeds floor((p + place) · c): a share c of any text,
    as evenly as can be, and other positions in the next layer. Computed in whole numbers, the same on every device.
    """

    def chosen(self, positions: Tensor) -> Tensor:
        steps, shifted = pattern_steps(self.capacity), positions + self.place
        return (shifted + 1) * steps // STEPS_PER_TOKEN > shifted * steps // STEPS_PER_TOKEN


class RandomDepth(FixedDepth):
    """ceil(capacity · T) tokens of every sequence, drawn anew for every micro-batch while training.

    At inference a hash of position and layer decides, so that writing token by token equals one pass over the text.
    """

    def _select(self, x_BTD: Tensor, context: AttentionContext) -> Selection:
        if not self.training:
            return super()._select(x_BTD, context)
        assert context.cache is None and context.counts is None, "numbers are drawn for whole sequences"
        batch, length = x_BTD.shape[:2]
        number = num_chosen(self.capacity, length)
        if number == length:
            return select_everything(batch, length, x_BTD.device)
        draws_BT = torch.rand(batch, length, device=x_BTD.device)
        return select_as_many(draws_BT.topk(number, dim=1).indices.sort(dim=1).values, length)

    def chosen(self, positions: Tensor) -> Tensor:
        word = (positions * 0x27D4EB2F + (self.place + 1) * 0x165667B1) & WORD
        for shift, factor in ((16, 0x7FEB352D), (15, 0x46CA68B5), (16, 1)):
            word = ((word ^ (word >> shift)) * factor) & WORD
        return word % STEPS_PER_TOKEN < pattern_steps(self.capacity)
