"""How deep the tokens of one step went, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ava_exp.nn.mod.depth import Depth
from ava_exp.parallel.ranks import Ranks


@dataclass(kw_only=True, slots=True)
class LayerDepth:
    """One layer's sums over a step."""

    num_sequences: int = 0
    num_tokens: int = 0
    num_processed: int = 0

    @property
    def usage(self) -> float:
        """The share of tokens that were processed."""
        return self.num_processed / max(1, self.num_tokens)


class DepthTally:
    """Adds up what the layers that tokens may skip did: the model returns it, so nothing is counted twice when
    activations are recomputed."""

    def __init__(self) -> None:
        self.layers: list[LayerDepth] = []

    def add(self, depths: Sequence[Depth]) -> None:
        """Add one micro-batch, one entry for every such layer. While training nothing waits for the device."""
        self.layers = self.layers or [LayerDepth() for _ in depths]
        for layer, depth in zip(self.layers, depths, strict=True):
            layer.num_sequences += depth.num_sequences
            layer.num_tokens += depth.num_tokens
            layer.num_processed += depth.num_processed

    def add_up(self, ranks: Ranks) -> None:
        """Make the sums those of all ranks."""
        names = ("num_sequences", "num_tokens", "num_processed")
        sums = ranks.sums([getattr(layer, name) for layer in self.layers for name in names])
        for index, layer in enumerate(self.layers):
            for place, name in enumerate(names):
                setattr(layer, name, sums[3 * index + place])

    @property
    def num_processed(self) -> int:
        """Tokens that were processed, each once for every layer that did."""
        return sum(layer.num_processed for layer in self.layers)

    @property
    def num_skipped(self) -> int:
        """Tokens that skipped a layer, each once for every layer."""
        return sum(layer.num_tokens - layer.num_processed for layer in self.layers)

    def usage(self, skippable: Sequence[int], num_layers: int) -> list[float]:
        """Return by layer the share of tokens that went through it: 1 where none may skip."""
        shares = [1.0] * num_layers
        for index, layer in zip(skippable, self.layers, strict=True):
            shares[index] = layer.usage
        return shares
