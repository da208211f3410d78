"""Configuration of what a decoder predicts beside the next token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class PredictionConfig:
    """Base of every prediction."""


@dataclass(kw_only=True, slots=True)
class NextTokenConfig(PredictionConfig):
    """The next token, and nothing else."""
