"""What a multi-level layer keeps of a text: beside keys and values their means over complete blocks, and queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_exp.nn.attention.cache import Held, LayerCache, enlarged


def blocks_of(x_BHTC: Tensor, size: int) -> Tensor:
    """Return the means of the complete blocks of T entries, (B, H, T // size, C)."""
    num_blocks = x_BHTC.shape[2] // size
    return torch.unflatten(x_BHTC[:, :, : num_blocks * size], 2, (num_blocks, size)).mean(dim=3)


class LevelCache(LayerCache):
    """Keys, values and rotated queries of one layer, and the means of keys and values over blocks of 2, 4, … entries.

    All queries are kept: after `truncate`, any block may be the last one again, and its query is a mean of them.
    """

    reads_exactly = True

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_heads: int,
        num_levels: int,
    ) -> None:
        super().__init__(batch_size, num_kv_heads, capacity, head_dim, dtype, device, (num_heads,))
        shape = (batch_size, num_kv_heads, 0, head_dim)
        self.coarse = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(1, num_levels)]
        """By level from 1 on, means of keys and values, (B, K, room // 2^level, C) each."""
        self.num_settled = 0
        """Entries of every sequence whose complete blocks are in `coarse`; blocks behind them are made anew."""

    @property
    def num_bytes(self) -> int:
        coarse = sum(buffer.numel() * buffer.element_size() for level in self.coarse for buffer in level)
        return super().num_bytes + coarse

    def extend(
        self,
        k_RKTC: Tensor,
        v_RKTC: Tensor,
        *others_RHTC: Tensor,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Held:
        held = super().extend(k_RKTC, v_RKTC, *others_RHTC, rows=rows, counts=counts, positions=positions)
        lengths = self.lengths
        if isinstance(lengths, int):
            shortest = longest = lengths
        else:
            shortest, longest = (int(bound) for bound in lengths.aminmax())
        for level, buffers in enumerate(self.coarse, start=1):
            size = 2**level
            done, complete = self.num_settled // size, longest // size
            for index in range(2):
                if buffers[index].shape[2] < self.keys.shape[2] // size:
                    buffers[index] = enlarged(buffers[index], 2, self.keys.shape[2] // size)
                if complete > done:
                    entries = self.buffers[index][:, :, done * size : longest]
                    buffers[index][:, :, done:complete] = blocks_of(entries, size)
        self.num_settled = shortest
        return held

    def blocks(self, level: int, rows: Tensor | None, num_entries: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (R, K, n, C) of the blocks that the sequences `rows` have among `num_entries`."""
        size = 2**level
        keys, values = (
            (buffer if rows is None else buffer[rows])[:, :, : num_entries // size] for buffer in self.coarse[level - 1]
        )
        return keys, values

    def truncate(self, lengths: int | Tensor) -> None:
        super().truncate(lengths)
        shortest = self.lengths if isinstance(self.lengths, int) else int(self.lengths.min())
        self.num_settled = min(self.num_settled, shortest)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.coarse = [[buffer[rows] for buffer in level] for level in self.coarse]
