"""What an attention layer needs besides its input: rotary tables and, while decoding, the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer for the positions seen so far, in buffers of a fixed capacity."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of one layer and return all keys and values so far, each (B, K, S, C)."""
        stop = self.length + k_BKTC.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, but {stop} are needed")
        self.keys[layer, :, :, self.length : stop] = k_BKTC
        self.values[layer, :, :, self.length : stop] = v_BKTC
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, num_positions: int) -> None:
        """Count T positions as seen, once every layer has stored them."""
        self.length += num_positions


@dataclass(slots=True)
class AttentionContext:
    """Shared by the layers of one forward pass. `cos` and `sin` are (T, C/2) for the positions of the input."""

    cos: Tensor
    sin: Tensor
    cache: KeyValueCache | None = None
