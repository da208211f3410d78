"""Configuration of the objective, beside what the architecture itself adds to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The terms of the objective beside cross entropy, each with its weight; a weight of 0 leaves a term out."""

    label_smoothing: float = 0.0
    """Share of the target distribution that is spread evenly over the vocabulary."""
    z_loss_weight: float = 0.0
    immediate_repetition_weight: float = 0.0
    repetition_penalty_weight: float = 0.0
    repetition_ngram_size: int = 3
    """Tokens of an n-gram whose repetition is penalised; 1 is any token of the context."""
    entropy_regularization: float = 0.0
    output_diversity_weight: float = 0.0
