"""Expert choice: experts take tokens, instead of tokens experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing, count_visits, router_z_loss


class ExpertChoiceRouter(Router):
    """Every expert takes the N · `average_experts` / E tokens with the highest probability [zhou2022expertchoice] §3.

    The load is even by construction, and a token is visited by none, one or several experts. Which ones depends on
    all tokens of the micro-batch, later ones too: training is not causal. At inference there is no such batch, so
    a token goes to the experts whose probability reaches a threshold, the running mean over steps of the smallest
    probability that an expert took. It needs neither parameters nor a loss of its own, where the predictor that
    [raposo2024mod] §3.5 trains needs both, and it depends on a token alone. A model that has not been trained has no
    thresholds yet: its tokens take their most probable experts.
    """

    threshold: Tensor
    num_updates: Tensor

    def __init__(
        self,
        average_experts: float,
        threshold_momentum: float,
        dim: int,
        num_experts: int,
        whole_expert_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_experts, whole_expert_dropout)
        self.average_experts, self.threshold_momentum = min(average_experts, num_experts), threshold_momentum
        self.register_buffer("threshold", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BTD: Tensor) -> Routing:
        x = x_BTD.flatten(0, 1).to(torch.promote_types(x_BTD.dtype, torch.float32))
        logits_NE = x @ self.open_weight().to(x.dtype).t()
        probabilities_NE = logits_NE.softmax(dim=-1)
        with torch.no_grad():
            taken_NE, observed_E = self._take(probabilities_NE)
            experts_E = torch.arange(self.num_experts, device=x.device)
            expert_ids_NE = experts_E.where(taken_NE, -1)
            counts_E = count_visits(expert_ids_NE, self.num_experts)
        return Routing(
            expert_ids=expert_ids_NE,
            weights=self.weigh(probabilities_NE, expert_ids_NE),
            counts=counts_E,
            chosen_counts=counts_E,
            affinities=probabilities_NE,
            probabilities=probabilities_NE,
            preferences=probabilities_NE,
            losses={"router_z_loss": router_z_loss(logits_NE)},
            observed=observed_E,
            ragged=True,
        )

    def _take(self, probabilities_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return who takes whom, (N, E) bool, and while training the smallest probability that each expert took."""
        if not self.training:
            if self.num_updates.item() > 0:
                return probabilities_NE >= self.threshold[: self.num_experts], None
            best = probabilities_NE.topk(max(1, round(self.average_experts)), dim=1).indices
            return torch.zeros_like(probabilities_NE, dtype=torch.bool).scatter_(1, best, True), None
        num_tokens = probabilities_NE.shape[0]
        capacity = min(num_tokens, max(1, round(num_tokens * self.average_experts / self.num_experts)))
        values_cE, tokens_cE = probabilities_NE.topk(capacity, dim=0)
        taken = torch.zeros_like(probabilities_NE, dtype=torch.bool).scatter_(0, tokens_cE, True)
        absent_E = self.absent_experts()
        return taken if absent_E is None else taken & ~absent_E, values_cE[-1].float()

    @torch.no_grad()
    def adapt(self, chosen_counts_E: Tensor, observed_E: Tensor | None) -> None:
        assert observed_E is not None, "an expert-choice router observes while it trains"
        self.num_updates += 1
        # The first steps weigh as much as those before them together: the running mean starts without a bias.
        step = (1.0 / self.num_updates).clamp(min=1 - self.threshold_momentum)
        self.threshold[: self.num_experts].lerp_(observed_E, step)
