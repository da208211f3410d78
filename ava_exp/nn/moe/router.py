"""What routers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ava_exp.nn.moe.routing import Routing, count_visits, renormalize, router_z_loss


class Router(nn.Module, ABC):
    """Maps tokens to a `Routing`. Its logits, and what it learns beside gradients, are fp32 or wider."""

    def __init__(self, dim: int, num_experts: int, whole_expert_dropout: float = 0.0) -> None:
        super().__init__()
        self.num_experts, self.whole_expert_dropout = num_experts, whole_expert_dropout
        self.num_closed = 0
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Routing:
        """Route the N = B · T tokens of (B, T, D), in any dtype."""

    def open_weight(self) -> Tensor:
        """Return the weight without the rows of closed experts, which come last: to the router there are none."""
        return self.weight[: self.weight.shape[0] - self.num_closed]

    def weigh(self, affinities_NE: Tensor, expert_ids_Nk: Tensor) -> Tensor:
        """Return the weights (N, k) of visits, 0 where there is no visit."""
        return affinities_NE.gather(1, expert_ids_Nk.clamp(min=0)).masked_fill(expert_ids_Nk < 0, 0)

    @torch.no_grad()
    def adapt(self, chosen_counts_E: Tensor, observed_E: Tensor | None) -> None:
        """Learn from a whole step after its update: from what all its tokens chose and the mean of `observed`."""

    def absent_experts(self) -> Tensor | None:
        """Draw the experts, (E,) bool, that this micro-batch does without: not all of them, and none at inference."""
        if not self.training or self.whole_expert_dropout == 0:
            return None
        draws = torch.rand(self.num_experts, device=self.weight.device)
        return (draws < self.whole_expert_dropout) & (draws < draws.max())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as modules do, but leave the format of buffers alone: they add up small steps."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class TokenChoiceRouter(Router):
    """A router in which every token chooses its experts, `moe_top_k` of them unless `choose` says otherwise.

    `jitter` multiplies the router's input by uniform noise in [1 - jitter, 1 + jitter] while training [fedus2022switch]
    app. C; the Ava text adds it to the logits instead. `routing_temperature` divides the logits: it changes the
    weights, and the selection only of routers that look at more than the order of logits.
    """

    moe_top_k: int
    renormalize: bool = False
    ragged: bool = False
    """Whether `choose` returns -1."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        routing_temperature: float,
        jitter: float,
        whole_expert_dropout: float,
    ) -> None:
        super().__init__(dim, num_experts, whole_expert_dropout)
        self.routing_temperature, self.jitter = routing_temperature, jitter

    def forward(self, x_BTD: Tensor) -> Routing:
        logits = self.logits(x_BTD)
        absent_E = self.absent_experts()
        if absent_E is not None:
            logits = self.mask(logits, absent_E)
        affinities_NE = self.affinities(logits)
        with torch.no_grad():
            preferences_NE = self.preferences(logits, affinities_NE)
            if absent_E is not None:
                preferences_NE = preferences_NE.masked_fill(absent_E, -torch.inf)
            expert_ids_Nk = self.choose(preferences_NE)
            if absent_E is not None:  # chosen where nothing else was left
                expert_ids_Nk = expert_ids_Nk.masked_fill(absent_E[expert_ids_Nk], -1)
            counts_E = count_visits(expert_ids_Nk, self.num_experts)
        routing = Routing(
            expert_ids=expert_ids_Nk,
            weights=self.weigh(affinities_NE, expert_ids_Nk),
            counts=counts_E,
            chosen_counts=counts_E,
            affinities=affinities_NE,
            probabilities=self.probabilities(affinities_NE),
            preferences=preferences_NE,
            ragged=self.ragged or absent_E is not None,
        )
        if self.training or not torch.is_inference_mode_enabled():  # while a text is written nobody asks for them
            routing.losses = self.losses(logits, routing, num_sequences=x_BTD.shape[0])
        return routing

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return the logits (N, rows of the weight), in fp32 or wider [fedus2022switch] §2.4."""
        x = x_BTD.flatten(0, 1).to(torch.promote_types(x_BTD.dtype, torch.float32))
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return (x @ self.open_weight().to(x.dtype).t()) / self.routing_temperature

    def mask(self, logits: Tensor, absent_E: Tensor) -> Tensor:
        """Put absent experts out of reach."""
        return logits.masked_fill(absent_E, -torch.inf)

    def affinities(self, logits: Tensor) -> Tensor:
        """Return the score (N, E) of every expert."""
        return logits.softmax(dim=-1)

    def probabilities(self, affinities_NE: Tensor) -> Tensor:
        """Return the affinities, made to sum to 1 for every token."""
        return affinities_NE

    def preferences(self, logits: Tensor, affinities_NE: Tensor) -> Tensor:
        """Return in what order (N, E) a token wants the experts. Without gradient, as everything about choosing."""
        return affinities_NE

    def choose(self, preferences_NE: Tensor) -> Tensor:
        """Return the experts (N, k) of every token, the most wanted first; -1 is none."""
        return preferences_NE.topk(self.moe_top_k, dim=-1).indices

    def weigh(self, affinities_NE: Tensor, expert_ids_Nk: Tensor) -> Tensor:
        weights_Nk = super().weigh(affinities_NE, expert_ids_Nk)
        return renormalize(weights_Nk) if self.renormalize else weights_Nk

    def losses(self, logits: Tensor, routing: Routing, num_sequences: int) -> dict[str, Tensor]:
        """Return the losses that are means over tokens."""
        return {"router_z_loss": router_z_loss(logits)}
