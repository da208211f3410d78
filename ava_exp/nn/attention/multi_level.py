"""Attention at several resolutions, as the Vishwamai text sketches it: the last entries in detail and all of them in
outline, fused by learned weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.attention import level_window
from ava_exp.nn.attention.cache import AttentionContext, Held, LayerCache
from ava_exp.nn.attention.grouped import GroupedAttention
from ava_exp.nn.attention.level_cache import LevelCache, blocks_of


class MultiLevelAttention(GroupedAttention):
    """Softmax attention at full resolution, and over blocks of 2, 4, …, 2^(L-1) entries.

    All levels share one projection. A block's query, key and value are the means of its entries', after the rotation,
    so that the score of two blocks is the mean score of their entries. Level l computes causal attention among its
    blocks, and what block j read serves an entry t if j is the last block that ends at or before t: nothing comes from
    behind, and an incomplete block is left out. The levels are added up with weights that are a softmax, over the
    levels that serve t, of a linear map of x_t: the first 2^l - 1 entries, which have no block yet, do without level l.

    With documents a block must lie within one of them: another neither is read nor serves. With `sliding_window` an
    entry of level l sees the last `sliding_window · progressive_sparsity^l` blocks. Blocks are of the entries that the
    layer processes. The text means all levels to cost 5/8 of plain attention; at three they cost 21/16 of its scores.
    """

    def __init__(self, dim: int, num_levels: int = 3, progressive_sparsity: float = 1.0, **grouped: Any) -> None:
        """`grouped` are the keywords of `GroupedAttention`."""
        super().__init__(dim=dim, **grouped)
        self.num_levels = num_levels
        self.windows = [level_window(self.sliding_window, progressive_sparsity, level) for level in range(num_levels)]
        self.fusion = nn.Linear(dim, num_levels, bias=False) if num_levels > 1 else None

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Mix positions causally; (B, T, D) to (B, T, D). With a cache, T new positions see all that it holds."""
        q, k, v = self.project(x_BTD, context)
        held = Held(k, v, 0) if context.cache is None else context.extend_cache(self.layer, k, v, q)
        y = self.attend(q, held, window=self.windows[0], documents_RT=context.documents, dropout=self.dropout_now)
        if self.fusion is not None:
            whole = isinstance(held.starts, int) and held.starts == 0
            y = self._fuse_whole(x_BTD, q, held, y, context) if whole else self._fuse_new(x_BTD, held, y, context)
        return self.merge(y)

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return an empty cache for at most `capacity` positions of `batch_size` sequences."""
        return LevelCache(
            batch_size, self.num_kv_heads, capacity, self.head_dim, dtype, device, self.num_heads, self.num_levels
        )

    def _weights(self, x_BTD: Tensor, served_BTl: Tensor) -> list[Tensor]:
        """Return for every level its weights (B, 1, T, 1), in the format of x; 0 where it does not serve."""
        assert self.fusion is not None
        logits = self.fusion(x_BTD).to(torch.promote_types(x_BTD.dtype, torch.float32))
        weights = logits.masked_fill(~served_BTl, float("-inf")).softmax(dim=-1).to(x_BTD.dtype)
        return [weight[:, None, :, None] for weight in weights.unbind(dim=-1)]

    def _fuse_whole(self, x_BTD: Tensor, q: Tensor, held: Held, y: Tensor, context: AttentionContext) -> Tensor:
        """Add the coarse levels of whole sequences: blocks 0, 1, … read each other in one product a level."""
        length = q.shape[2]
        documents = [_block_documents(context.documents, 2**level) for level in range(self.num_levels)]
        served = [_serves(context.documents, documents[level], 2**level, x_BTD) for level in range(self.num_levels)]
        weights = self._weights(x_BTD, torch.stack(served, dim=-1))
        y = y * weights[0]
        for level in range(1, self.num_levels):
            size = 2**level
            if length < size:
                break
            blocks = [blocks_of(x, size) for x in (q, held.keys, held.values)]
            read = self.attend(
                blocks[0],
                Held(blocks[1], blocks[2], 0),
                window=self.windows[level],
                documents_RT=documents[level],
                dropout=self.dropout_now,
            )
            y = y + _spread(read, weights[level], size)
        return y

    def _fuse_new(self, x_BTD: Tensor, held: Held, y: Tensor, context: AttentionContext) -> Tensor:
        """Add the coarse levels of T entries that continue what a cache holds: only the blocks that serve them read."""
        cache = context.cache.layers[self.layer] if context.cache is not None else None
        assert isinstance(cache, LevelCache)
        batch, length, device = *x_BTD.shape[:2], x_BTD.device
        starts_R = torch.as_tensor(held.starts, device=device).expand(batch)
        entries_RT = starts_R[:, None] + torch.arange(length, device=device)
        real = context.counts if context.counts is not None else torch.full((batch,), length, device=device)
        is_real = entries_RT < (starts_R + real)[:, None]
        served = [(entries_RT >= 2**level - 1) & is_real | (level == 0) for level in range(self.num_levels)]
        weights = self._weights(x_BTD, torch.stack(served, dim=-1))
        y = y * weights[0]
        for level in range(1, self.num_levels):
            read = self._read_blocks(held, cache, level, starts_R, entries_RT, context.rows)
            if read is not None:
                y = y + torch.where(served[level][:, None, :, None], read, 0) * weights[level]
        return y

    def _read_blocks(
        self, held: Held, cache: LevelCache, level: int, starts_R: Tensor, entries_RT: Tensor, rows: Tensor | None
    ) -> Tensor | None:
        """Return what the block that serves each entry read, (R, H, T, C); None while there is no block."""
        keys, values = cache.blocks(level, rows, held.keys.shape[2])
        num_blocks, size = keys.shape[2], 2**level
        if num_blocks == 0:
            return None
        first_R = ((starts_R + 1) // size - 1).clamp(min=0)
        num_needed = min(num_blocks, (entries_RT.shape[1] + size - 2) // size + 1)
        needed_Rn = first_R[:, None] + torch.arange(num_needed, device=first_R.device)
        members = (needed_Rn[:, :, None] * size + torch.arange(size, device=first_R.device)).flatten(1)
        members = members.clamp(max=held.keys.shape[2] - 1)  # of blocks that nothing is served by
        (queries,) = held.others
        index = members[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        q = blocks_of(queries.gather(2, index), size)
        starts = int(first_R[0]) if isinstance(held.starts, int) else first_R
        read = self.attend(q, Held(keys, values, starts), window=self.windows[level], dropout=self.dropout_now)
        serving_RT = ((entries_RT + 1) // size - 1 - first_R[:, None]).clamp(0, num_needed - 1)
        return read.gather(2, serving_RT[:, None, :, None].expand(-1, read.shape[1], -1, read.shape[3]))


def _serves(documents_RT: Tensor | None, block_documents_Rn: Tensor | None, size: int, x_BTD: Tensor) -> Tensor:
    """Return where blocks of this size serve the entries of whole sequences, (R, T) bool."""
    batch, length = x_BTD.shape[:2]
    serving = (torch.arange(length, device=x_BTD.device) + 1) // size - 1
    served = (serving >= 0).expand(batch, length)
    if documents_RT is None or block_documents_Rn is None or block_documents_Rn.shape[1] == 0:
        return served
    return served & (block_documents_Rn[:, serving.clamp(min=0)] == documents_RT)


def _block_documents(documents_RT: Tensor | None, size: int) -> Tensor | None:
    """Return which document every complete block lies in, (R, n); one that has several is alone with a number of its
    own below 0."""
    if documents_RT is None:
        return None
    num_blocks = documents_RT.shape[1] // size
    of_entries = torch.unflatten(documents_RT[:, : num_blocks * size], 1, (num_blocks, size))
    first = of_entries[:, :, 0]
    mixed = -1 - torch.arange(num_blocks, device=first.device)
    return torch.where((of_entries == first[:, :, None]).all(dim=2), first, mixed)


def _spread(read_RHnC: Tensor, weights_R1T1: Tensor, size: int) -> Tensor:
    """Hand what block j read to the entries that it serves, size · (j + 1) - 1 and those after it, weighted:
    (R, H, T, C)."""
    length, num_blocks, before = weights_R1T1.shape[2], read_RHnC.shape[2], size - 1
    weights = weights_R1T1[:, :, before : before + num_blocks * size]
    weights = F.pad(weights, (0, 0, 0, num_blocks * size - weights.shape[2]))
    weights = torch.unflatten(weights, 2, (num_blocks, size))
    return F.pad((read_RHnC[:, :, :, None] * weights).flatten(2, 3), (0, 0, before, 0))[:, :, :length]
