"""Configuration of the Mixture of Depths: which tokens pass through which layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig

STEPS_PER_TOKEN = 2**20
"""Resolution of a fixed pattern: its capacity is a whole number of these parts, so that it is the same everywhere."""


class DepthLayers(Enum):
    """Which layers of the range tokens may skip: all, those of its upper half, or every second one from its second."""

    all = "all"
    later = "later"
    alternating = "alternating"


class DepthPart(Enum):
    """What a token skips: the whole block, or its feed-forward network only."""

    block = "block"
    feed_forward = "feed_forward"


@dataclass(kw_only=True, slots=True)
class ModConfig:
    """Base of every Mixture of Depths."""

    def skippable_layers(self, num_layers: int) -> list[int]:
        """Return the layers that tokens may skip, in order."""
        return []


@dataclass(kw_only=True, slots=True)
class NoModConfig(ModConfig):
    """Every token passes through every layer. The others extend it, so that they can take the place of this default."""


SETTINGS = frozenset(
    {"capacity_start", "annealing_ratio", "layers", "start_layer", "end_layer", "part", "predictor_weight"}
)


@dataclass(kw_only=True, slots=True)
class DepthConfig(NoModConfig, ComponentConfig):
    """Base of what lets a layer process a share of a sequence's tokens, `capacity_factor`.

    The share falls linearly from `capacity_start` while `annealing_ratio` of the budget is spent; a ratio of 0 is no
    annealing.
    """

    runtime_fields: ClassVar[frozenset[str]] = SETTINGS

    capacity_factor: float = 0.5
    capacity_start: float = 1.0
    annealing_ratio: float = 0.0
    layers: DepthLayers = DepthLayers.all
    start_layer: int = 0
    end_layer: int | None = None
    """The last layer of the range; null is the model's last."""
    part: DepthPart = DepthPart.block

    def skippable_layers(self, num_layers: int) -> list[int]:
        last = num_layers - 1 if self.end_layer is None else min(self.end_layer, num_layers - 1)
        layers = list(range(self.start_layer, last + 1))
        if self.layers is DepthLayers.later:
            return layers[len(layers) // 2 :]
        return layers[1::2] if self.layers is DepthLayers.alternating else layers

    def capacity_at(self, progress: float) -> float:
        """Return the capacity when `progress` of the budget, 0 to 1, is spent."""
        if progress >= self.annealing_ratio:
            return self.capacity_factor
        return self.capacity_start + (self.capacity_factor - self.capacity_start) * progress / self.annealing_ratio

    def num_processed(self, sequence_length: int, place: int, capacity: float | None = None) -> int:
        """Return how many tokens of a sequence a layer processes while training.

        `place` counts the layers before it that may be skipped; `capacity` is the final one by default.
        """
        return num_chosen(self.capacity_factor if capacity is None else capacity, sequence_length)

    def router_weights(self, dim: int) -> int:
        """Return the router's weights in one layer."""
        return 0

    def predictor_weights(self, dim: int) -> int:
        """Return the predictor's weights in one layer, without biases."""
        return 0

    def predictor_biases(self) -> int:
        """Return the predictor's biases in one layer."""
        return 0


def num_chosen(capacity: float, sequence_length: int) -> int:
    """Return ceil(capacity * length), at least 1."""
    return max(1, math.ceil(round(capacity * sequence_length, 6)))  # 100 * 0.07 is 7, and 7.000000000000001 in floats


def pattern_steps(capacity: float) -> int:
    """Return the capacity in parts of `STEPS_PER_TOKEN`, rounded up."""
    return math.ceil(capacity * STEPS_PER_TOKEN)


@dataclass(kw_only=True, slots=True)
class LearnedModConfig(DepthConfig):
    """A router scores tokens, and the best of every sequence are processed; at inference a predictor says which."""

    builds: ClassVar[str] = "ava_exp.nn.mod.learned:LearnedDepth"

    router_hidden_size: int | None = None
    """Width of a small network that scores tokens; null is a linear router."""
    predictor_hidden_size: int = 64
    predictor_weight: float = 0.1
    """Of the predictor's loss, whose gradient stays in the predictor."""

    def router_weights(self, dim: int) -> int:
        return _network_weights(dim, self.router_hidden_size)

    def predictor_weights(self, dim: int) -> int:
        return _network_weights(dim, self.predictor_hidden_size)

    def predictor_biases(self) -> int:
        return self.predictor_hidden_size + 1


def _network_weights(dim: int, hidden_size: int | None) -> int:
    return dim if hidden_size is None else (dim + 1) * hidden_size


@dataclass(kw_only=True, slots=True)
class StaticModConfig(DepthConfig):
    """A fixed pattern of positions, another one in every layer."""

    builds: ClassVar[str] = "ava_exp.nn.mod.fixed:StaticDepth"

    def num_processed(self, sequence_length: int, place: int, capacity: float | None = None) -> int:
        steps = pattern_steps(self.capacity_factor if capacity is None else capacity)
        return (sequence_length + place) * steps // STEPS_PER_TOKEN - place * steps // STEPS_PER_TOKEN


@dataclass(kw_only=True, slots=True)
class RandomModConfig(DepthConfig):
    """Tokens drawn at random: what a learned choice has to beat."""

    builds: ClassVar[str] = "ava_exp.nn.mod.fixed:RandomDepth"
