"""Configuration of the Mixture of Depths: which tokens pass through which layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ModConfig:
    """Base of every Mixture of Depths."""


@dataclass(kw_only=True, slots=True)
class NoModConfig(ModConfig):
    """Every token passes through every layer."""
