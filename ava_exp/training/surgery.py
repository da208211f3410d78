"""What a trainer lets its experts undergo between two steps, in the names of the LuminaAI text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ava_exp.config.surgery import Gate, NewState, SurgeryKind, SurgeryOperation
from ava_exp.models.surgery import SurgeryReport


class ExpertSurgery(ABC):
    """Operations on the layer `layer_idx`, or on all layers of experts where it may be None.

    Each is a record of kind `surgery` in the metrics, with the loss before and after it on the batches of the step to
    come. It must be called between two steps, as from a sink; the next checkpoint has its result.
    All raise ConfigError for what the model does not allow, and then change nothing.
    """

    def add_expert(
        self,
        layer_idx: int | None,
        expert_idx: int | None = None,
        *,
        noise: float = 0.01,
        gate: Gate = Gate.copy,
        new_state: NewState = NewState.copy,
    ) -> SurgeryReport:
        """Add a copy of an expert, by default the most used one, with Gaussian noise."""
        return self._operate(
            SurgeryKind.add_expert, layer_idx, expert=expert_idx, noise=noise, gate=gate, new_state=new_state
        )

    def open_expert(self, layer_idx: int | None, expert_idx: int | None = None) -> SurgeryReport:
        """Let tokens choose an expert that was added with a closed gate."""
        return self._operate(SurgeryKind.open_expert, layer_idx, expert=expert_idx)

    def prune_expert(self, layer_idx: int | None, expert_idx: int | None = None) -> SurgeryReport:
        """Take an expert away, by default the least used one, and keep it in the checkpoints."""
        return self._operate(SurgeryKind.prune_expert, layer_idx, expert=expert_idx)

    def restore_expert(self, layer_idx: int | None, expert_idx: int | None = None) -> SurgeryReport:
        """Put a pruned expert back, by default the last one, where it was and as it was."""
        return self._operate(SurgeryKind.restore_expert, layer_idx, expert=expert_idx)

    def merge_experts(self, layer_idx: int | None, expert_idx: int, other_idx: int) -> SurgeryReport:
        """Average two experts by their visits, in the place of the first."""
        return self._operate(SurgeryKind.merge_experts, layer_idx, expert=expert_idx, other=other_idx)

    def adjust_capacity_factor(self, factor: float, layer_idx: int | None = None) -> SurgeryReport:
        """Change how many tokens an expert takes, in units of the balanced share."""
        return self._operate(SurgeryKind.adjust_capacity_factor, layer_idx, value=factor)

    def adjust_routing_temperature(self, temperature: float, layer_idx: int | None = None) -> SurgeryReport:
        """Change what the router's logits are divided by."""
        return self._operate(SurgeryKind.adjust_routing_temperature, layer_idx, value=temperature)

    def enable_expert_dropout(self, dropout_prob: float, layer_idx: int | None = None) -> SurgeryReport:
        """Change the probability with which an expert is out of reach of a micro-batch while training."""
        return self._operate(SurgeryKind.enable_expert_dropout, layer_idx, value=dropout_prob)

    def scale_load_balancing(self, factor: float, layer_idx: int | None = None) -> SurgeryReport:
        """Change what the weight of the balance loss is multiplied by; the weight itself may go on moving."""
        return self._operate(SurgeryKind.scale_load_balancing, layer_idx, value=factor)

    def adjust_mod_capacity(self, capacity_factor: float) -> SurgeryReport:
        """Change the share of tokens that layers process, above 0 and at most 1; annealing then changes it no more."""
        return self._operate(SurgeryKind.adjust_mod_capacity, None, value=capacity_factor)

    def _operate(self, kind: SurgeryKind, layer: int | None, **details: Any) -> SurgeryReport:
        return self.operate(SurgeryOperation(operation=kind, layer=layer, **details))

    @abstractmethod
    def operate(self, operation: SurgeryOperation) -> SurgeryReport:
        """Do any of the operations."""
