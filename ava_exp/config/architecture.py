"""What a decoder is made of: everything that decides its parameters and its products."""

from __future__ import annotations

from dataclasses import dataclass, field

from ava_exp.config.attention import AttentionConfig, GroupedAttentionConfig
from ava_exp.config.mod import ModConfig, NoModConfig
from ava_exp.config.model import DenseConfig, ModelConfig, SparsityConfig
from ava_exp.config.prediction import NextTokenConfig, PredictionConfig


@dataclass(slots=True)
class Architecture:
    """The configurations that a decoder is built of. A run composes them; a program leaves out what it does not use."""

    model: ModelConfig
    attention: AttentionConfig = field(default_factory=GroupedAttentionConfig)
    sparsity: SparsityConfig = field(default_factory=DenseConfig)
    mod: ModConfig = field(default_factory=NoModConfig)
    prediction: PredictionConfig = field(default_factory=NextTokenConfig)
