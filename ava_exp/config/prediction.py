"""Configuration of what a decoder predicts beside the next token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class PredictionConfig:
    """Base of every prediction."""


@dataclass(kw_only=True, slots=True)
class NextTokenConfig(PredictionConfig):
    """The next token, and nothing else. The others extend it, so that they can take the place of this default."""


@dataclass(kw_only=True, slots=True)
class MultiTokenConfig(NextTokenConfig):
    """Heads beside the decoder predict the tokens after the next one, too: a second training signal, and drafts."""

    num_prediction_heads: int = 3
    """Head j predicts the j-th token after the next one; 0 is the decoder alone."""
    head_width: int | None = None
    """Width of a head's feed-forward network; null takes `model.hidden_size`."""
    mtp_weight: float = 0.1
    """Weight of the mean of the heads' losses in the objective."""
    confidence_threshold: float = 0.05
    """Generation drafts on as long as a head gives its best token at least this probability."""
    confidence_threshold_train: float = 0.0
    """A head learns where all before it gave their label at least this probability; 0 is everywhere."""
