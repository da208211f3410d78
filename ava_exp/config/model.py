"""Configuration of the decoder and of its sparsity."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from ava_exp.config.router import RouterConfig


class Norm(Enum):
    """Normalisation of a block's input."""

    rms = "rms"
    layer = "layer"


class Activation(Enum):
    """Feed-forward network: two projections around GELU or what a layer learns, or the gated three of SwiGLU."""

    gelu = "gelu"
    swiglu = "swiglu"
    mixture = "mixture"
    hard_mixture = "hard_mixture"


class MixedActivation(Enum):
    """What a mixture of activations may hold."""

    gelu = "gelu"
    silu = "silu"
    relu = "relu"
    tanh = "tanh"
    identity = "identity"


class RopeScaling(Enum):
    """How rotary positions are scaled, so that a model reads longer texts than it was trained on."""

    none = "none"
    linear = "linear"
    ntk = "ntk"
    yarn = "yarn"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Dimensions of a pre-norm decoder.

    `num_kv_heads`, `head_dim` and `intermediate_size` left null take the usual value: as many as `num_heads`,
    `hidden_size / num_heads`, and for SwiGLU 8/3 of the hidden size rounded up to 256 (4 × for the others). Of
    `rope_scaling_factor` and `original_max_position_embeddings` one follows from the other.
    """

    preset: str = "custom"
    claimed_parameters: int | None = None
    """What the preset's source says of it, here and below; shown beside the truth, used nowhere else."""
    claimed_active_parameters: int | None = None
    claimed_memory_gb: float | None = None
    claimed_hardware: str | None = None
    vocab_size: int = 65_536
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    num_experts: int = 8
    load_balancing_weight: float = 0.01
    learning_rate: float = 1.5e-4
    """Peak learning rate of AdamW for a model of this size.

    Presets whose source has none take that of the nearest size in [brown2020gpt3] table 2.1, by active parameters.
    """
    max_position_embeddings: int = 2048
    activation: Activation = Activation.swiglu
    mixed_activations: list[MixedActivation] = field(
        default_factory=lambda: [
            MixedActivation.gelu,
            MixedActivation.silu,
            MixedActivation.relu,
            MixedActivation.tanh,
        ]
    )
    """What `mixture` mixes and `hard_mixture` chooses from."""
    norm: Norm = Norm.rms
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling.none
    rope_scaling_factor: float | None = None
    """How many times longer than before a text may be; null is `max_position_embeddings` over the original ones."""
    original_max_position_embeddings: int | None = None
    """Length of the texts before scaling; null is `max_position_embeddings` over the factor."""
    yarn_beta_fast: float = 32.0
    """YaRN keeps the frequency of channels that turn at least so often in a text of the original length."""
    yarn_beta_slow: float = 1.0
    """YaRN interpolates the positions of channels that turn at most so often."""
    yarn_attention_factor: float | None = None
    """What YaRN multiplies queries and keys by; null is 0.1 ln(factor) + 1."""
    tie_embeddings: bool = True
    bias: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_size, int) or not isinstance(self.num_heads, int):
            return  # still being composed: Hydra builds the schema before values are known
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.head_dim is None and self.num_heads > 0:
            self.head_dim = self.hidden_size // self.num_heads
        if self.intermediate_size is None:
            if self.activation is Activation.swiglu:
                self.intermediate_size = -(-8 * self.hidden_size // (3 * 256)) * 256
            else:
                self.intermediate_size = 4 * self.hidden_size
        self._complete_rope_scaling()

    def scaled(self, kind: RopeScaling, original_length: int, length: int) -> ModelConfig:
        """Return the same model for texts of `length` tokens, where those of its training had `original_length`."""
        is_scaled = kind is not RopeScaling.none
        return dataclasses.replace(
            self,
            max_position_embeddings=length,
            rope_scaling=kind,
            rope_scaling_factor=length / original_length if is_scaled else None,
            original_max_position_embeddings=original_length if is_scaled else None,
        )

    def _complete_rope_scaling(self) -> None:
        """Take the factor from the lengths, or the original length from the factor, where one of them is given."""
        length, original, factor = (
            self.max_position_embeddings,
            self.original_max_position_embeddings,
            self.rope_scaling_factor,
        )
        if self.rope_scaling is RopeScaling.none or length < 1:
            return
        if factor is None and original is not None and original > 0:
            self.rope_scaling_factor = length / original
        elif original is None and factor is not None and factor >= 1:
            self.original_max_position_embeddings = math.ceil(length / factor)

    @property
    def num_mixed_activations(self) -> int:
        """Activations that every feed-forward network weighs: 0 where it has a given one."""
        is_mixture = self.activation in (Activation.mixture, Activation.hard_mixture)
        return len(self.mixed_activations) if is_mixture else 0


class SharedProjection(Enum):
    """Which projection all experts of a layer have in common."""

    none = "none"
    up = "up"
    down = "down"


class DispatchBackend(Enum):
    """How tokens reach their experts: chosen by device and dtype, one grouped product, or a loop over experts."""

    auto = "auto"
    grouped = "grouped"
    loop = "loop"


@dataclass(kw_only=True, slots=True)
class SparsityConfig:
    """Base of every sparsity."""


@dataclass(kw_only=True, slots=True)
class DenseConfig(SparsityConfig):
    """Every token passes through the one feed-forward network of every layer."""


class Overflow(Enum):
    """What becomes of a visit that an expert has no room for: dropped, sent to the next best expert, or to one
    feed-forward network that takes them all."""

    drop = "drop"
    next_best = "next_best"
    residual = "residual"


@dataclass(kw_only=True, slots=True)
class MoEConfig(SparsityConfig):
    """The feed-forward network of a layer is a mixture of experts."""

    router: RouterConfig = MISSING
    num_experts: int = 8
    intermediate_size: int | None = None
    """Width of one expert; null takes the model's."""
    num_shared_experts: int = 0
    """Experts that every token visits, outside the router's choice."""
    first_k_dense: int = 0
    """Layers at the bottom that keep the model's dense feed-forward network."""
    capacity_factor: float | None = None
    """An expert takes at most ceil(k * tokens / num_experts * factor) tokens of a micro-batch; null is dropless."""
    overflow: Overflow = Overflow.drop
    capacity_at_evaluation: bool = False
    share_projection: SharedProjection = SharedProjection.none
    expert_norm: bool = False
    expert_dropout: float = 0.0
    """On the hidden activations of an expert."""
    dispatch: DispatchBackend = DispatchBackend.auto
