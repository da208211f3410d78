"""Sliding windows over whole texts, cut into chunks: scores outside the band are not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_CHUNK = 32
"""Products of smaller chunks cost more in overhead than they save."""
CHUNKS_A_WINDOW = 2
"""A window reaches over so many chunks: a chunk of queries reads 3/2 windows of keys, where 1 chunk would read 2."""


@dataclass(slots=True, frozen=True)
class Band:
    """T entries as `num_chunks` chunks, each of which reads itself and the `num_before` chunks before it."""

    length: int
    window: int
    chunk: int
    num_before: int

    @classmethod
    def of(cls, length: int, window: int) -> Self | None:
        """Return the band of a window over T entries; None where it saves less than half of the scores, for which keys
        and values are copied."""
        chunk = band_chunk(window)
        num_before = -(-(window - 1) // chunk)
        return cls(length, window, chunk, num_before) if 2 * chunk * (num_before + 1) <= length else None

    @property
    def num_chunks(self) -> int:
        return -(-self.length // self.chunk)

    def cut(
        self, q_RHTC: Tensor, k_RKTC: Tensor, v_RKTC: Tensor, documents_RT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (R·n, H, c, C), the keys and values (R·n, K, S, C) that they may see, and which they do see,
        (R·n, 1, c, S) bool: n chunks of c entries."""
        batch = q_RHTC.shape[0]
        padding = self.num_chunks * self.chunk - self.length
        q = torch.unflatten(F.pad(q_RHTC, (0, 0, 0, padding)), 2, (self.num_chunks, self.chunk))
        keys, values = (self._with_chunks_before(x, dim=2) for x in (k_RKTC, v_RKTC))
        mask = self._mask(q.device)[None].expand(batch, -1, -1, -1)
        if documents_RT is not None:
            own = torch.unflatten(F.pad(documents_RT, (0, padding), value=-1), 1, (self.num_chunks, self.chunk))
            seen = self._with_chunks_before(documents_RT, dim=1, padding=-1)
            mask = mask & (own[:, :, :, None] == seen[:, :, None, :])
        q, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, keys, values))
        return q, keys, values, mask.flatten(0, 1)[:, None]

    def join(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Return what the chunks read, (R·n, H, c, C), as (R, H, T, C)."""
        y = torch.unflatten(y, 0, (shape[0], self.num_chunks)).transpose(1, 2)
        return y.flatten(2, 3)[:, :, : self.length]

    def _with_chunks_before(self, x: Tensor, dim: int, padding: int = 0) -> Tensor:
        """Map T entries in `dim` to n chunks of S: what the entries of each may see."""
        behind = self.num_chunks * self.chunk - self.length
        widths = [0, 0] * (x.ndim - 1 - dim) + [self.num_before * self.chunk, behind]
        padded = torch.unflatten(F.pad(x, widths, value=padding), dim, (self.num_chunks + self.num_before, self.chunk))
        shifted = [padded.narrow(dim, shift, self.num_chunks) for shift in range(self.num_before + 1)]
        return torch.cat(shifted, dim=dim + 1)

    def _mask(self, device: torch.device) -> Tensor:
        """Return (n, c, S) bool. An entry sees itself, padding too: no row is without a key."""
        width = self.chunk * (self.num_before + 1)
        first = torch.arange(self.num_chunks, device=device)[:, None, None] * self.chunk
        query = first + torch.arange(self.chunk, device=device)[:, None]
        key = first - self.num_before * self.chunk + torch.arange(width, device=device)
        return (key >= 0) & (key <= query) & (key > query - self.window)


def band_chunk(window: int) -> int:
    """Return how many queries of a band are computed together."""
    return max(SMALLEST_CHUNK, -(-(window - 1) // CHUNKS_A_WINDOW))
