"""Configuration of the objective, beside what the architecture itself adds to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The terms of the objective, each with its weight; a weight of 0 leaves a term out."""
