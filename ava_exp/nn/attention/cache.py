"""Keys and values of what a decoder has read, so that going on costs the new tokens only.

A layer keeps an entry for every token that it processed, in the order of the text. Sequences, and layers that tokens
may skip, hold different numbers of them; what lies behind a sequence's entries is never looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_CAPACITY = 64
"""Entries that a layer makes room for at first; room doubles when it runs out."""


@dataclass(slots=True, frozen=True)
class Held:
    """What R sequences hold after T entries were added: keys and values (R, K, S, C).

    `starts` says at which entry the new ones of a sequence begin: one number, or (R,) where sequences differ. The i-th
    new entry of a sequence sees the entries up to `starts + i`.
    """

    keys: Tensor
    values: Tensor
    starts: int | Tensor
    others: tuple[Tensor, ...] = ()
    """What else was added with them, (R, H, S, C) each."""

    def last(self, window: int) -> Held:
        """Return what is left when every new entry sees the last `window` ones only."""
        earliest = self.starts if isinstance(self.starts, int) else int(self.starts.min())
        unseen = max(0, earliest - window + 1)
        return Held(self.keys[:, :, unseen:], self.values[:, :, unseen:], self.starts - unseen)


READ_AT_ONCE = 64
"""Of a cache in 16 bits a CPU reads multiples of so many entries for one new one, and masks the rest: it compiles a
kernel for every number of keys that it has not met, which costs more than to read a few more."""


class LayerCache:
    """Keys and values that one layer computed for B sequences, and what else a kind of attention keeps of its entries:
    `num_other_heads` says how many heads each of the others has.

    `lengths` is the number of entries: one number as long as it is the same for all sequences, else (B,) int64.
    """

    reads_exactly = False
    """Whether what is held must end with the last entry of the longest sequence."""

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_other_heads: Sequence[int] = (),
    ) -> None:
        self.capacity = capacity
        self.lengths: int | Tensor = 0
        heads = (num_kv_heads, num_kv_heads, *num_other_heads)
        self.buffers = [torch.zeros((batch_size, num, 0, head_dim), dtype=dtype, device=device) for num in heads]
        """Keys, values and others, (B, heads, room, C) each."""
        self.positions: Tensor | None = None
        """Shape (B, room), int64: where in its text each entry stands; None as long as that is its own number."""

    @property
    def keys(self) -> Tensor:
        return self.buffers[0]

    @property
    def values(self) -> Tensor:
        return self.buffers[1]

    @property
    def num_bytes(self) -> int:
        """Bytes that all that is kept occupies, room for growth included."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def extend(
        self,
        k_RKTC: Tensor,
        v_RKTC: Tensor,
        *others_RHTC: Tensor,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Held:
        """Add T entries to the sequences `rows` (R,), all of them by default, and return what these then hold.

        Of sequence r only the first `counts[r]` count: what follows is padding, and overwritten by what is added next.
        `positions` (R, T) are needed where tokens skip the layer. Raises ValueError when the capacity is exceeded.
        """
        added = (k_RKTC, v_RKTC, *others_RHTC)
        if isinstance(self.lengths, int):
            return self._extend_even(self.lengths, added, rows, counts, positions)
        return self._extend_ragged(added, rows, counts, positions)

    def _extend_even(
        self,
        start: int,
        added: Sequence[Tensor],
        rows: Tensor | None,
        counts: Tensor | None,
        positions: Tensor | None,
    ) -> Held:
        """Add entries behind as many in every sequence: in one piece, and the same mask serves all."""
        length, everyone = added[0].shape[2], slice(None) if rows is None else rows
        stop = start + length
        self._reserve(start + (length if counts is None or not len(counts) else int(counts.max())), stop)
        for buffer, new in zip(self.buffers, added, strict=True):
            buffer[everyone, :, start:stop] = new
        self._keep_positions(everyone, slice(start, stop), positions)
        if rows is None and counts is None:
            self.lengths = stop
        else:
            lengths = self.ragged_lengths()
            lengths[everyone] = start + (length if counts is None else counts)
            self.lengths = int(lengths) if len(lengths) == 1 else lengths
        read = self._read(stop, length)
        held = (buffer[:, :, :read] for buffer in self.buffers)  # padding is in them, behind what anybody sees
        keys, values, *others = held if rows is None else (buffer.index_select(0, rows) for buffer in held)
        return Held(keys, values, start, tuple(others))

    def _extend_ragged(
        self, added: Sequence[Tensor], rows: Tensor | None, counts: Tensor | None, positions: Tensor | None
    ) -> Held:
        device, length = self.keys.device, added[0].shape[2]
        lengths, everyone = self.ragged_lengths(), rows is None
        rows = torch.arange(len(lengths), device=device) if rows is None else rows
        starts = lengths[rows]
        stops = starts + (length if counts is None else counts)
        self._reserve(int(stops.max()) if len(rows) else 0, int(starts.max()) + length if len(rows) else 0)
        entries_RT = starts[:, None] + torch.arange(length, device=device)
        for buffer, new in zip(self.buffers, added, strict=True):
            buffer[rows[:, None], :, entries_RT] = new.transpose(1, 2)
        self._keep_positions(rows[:, None], entries_RT, positions)
        self.lengths = lengths.index_copy(0, rows, stops)
        read = self._read(int(stops.max()), length) if len(rows) else 0
        held = (buffer[:, :, :read] for buffer in self.buffers)
        # Views for everyone; to select rows is six times as fast on a CPU as indexing with them.
        keys, values, *others = held if everyone else (buffer.index_select(0, rows) for buffer in held)
        return Held(keys, values, starts, tuple(others))

    def _read(self, longest: int, length: int) -> int:
        """Return how many entries attention is given, of which `longest` are held, for `length` new ones."""
        keys = self.keys
        if length > 1 or self.reads_exactly or keys.device.type != "cpu" or keys.element_size() != 2:
            return longest
        return min(keys.shape[2], -(-longest // READ_AT_ONCE) * READ_AT_ONCE)

    def ragged_lengths(self) -> Tensor:
        """Return the number of entries of every sequence, (B,) int64."""
        if isinstance(self.lengths, Tensor):
            return self.lengths
        return torch.full((self.keys.shape[0],), self.lengths, dtype=torch.int64, device=self.keys.device)

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget what stands at position `lengths` or later in the text; (B,) where sequences differ."""
        if self.positions is None:
            if isinstance(lengths, int) and isinstance(self.lengths, int):
                self.lengths = min(self.lengths, lengths)
            else:
                limits = torch.as_tensor(lengths, device=self.keys.device)
                self.lengths = torch.minimum(self.ragged_lengths(), limits)
            return
        limits = torch.as_tensor(lengths, device=self.keys.device).expand(self.keys.shape[0])
        entries = torch.arange(self.positions.shape[1], device=self.keys.device)
        kept = (entries < self.ragged_lengths()[:, None]) & (self.positions < limits[:, None])
        numbers = kept.sum(dim=1)
        self.lengths = int(numbers) if len(numbers) == 1 else numbers

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` (R,) int64, in that order; one may occur several times."""
        self.buffers = [buffer[rows] for buffer in self.buffers]
        if isinstance(self.lengths, Tensor):
            self.lengths = self.lengths[rows]
        if self.positions is not None:
            self.positions = self.positions[rows]

    def _reserve(self, needed: int, room: int = 0) -> None:
        """Make room for `room` entries, of which `needed` are no padding."""
        if needed > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, but {needed} are needed")
        old, room = self.keys.shape[2], max(needed, room)
        if room <= old:
            return
        wanted = max(room, min(self.capacity, max(SMALLEST_CAPACITY, 2 * old)))
        self.buffers = [enlarged(buffer, 2, wanted) for buffer in self.buffers]
        if self.positions is not None:
            self.positions = enlarged(self.positions, 1, wanted)

    def _keep_positions(self, rows: Tensor | slice, entries: Tensor | slice, positions: Tensor | None) -> None:
        if positions is None and self.positions is None:
            return
        assert positions is not None, "a layer that tokens skip needs the position of every token"
        if self.positions is None:
            size, room = self.keys.shape[0], self.keys.shape[2]
            self.positions = torch.arange(room, device=self.keys.device).repeat(size, 1)
        self.positions[rows, entries] = positions


def enlarged(buffer: Tensor, dim: int, size: int) -> Tensor:
    """Return a copy with room for `size` entries. New ones are 0: what is masked must still be a number."""
    shape = list(buffer.shape)
    shape[dim] = size
    wider = buffer.new_zeros(shape)
    wider.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return wider


@dataclass(slots=True)
class KeyValueCache:
    """The caches of all layers. `lengths` counts the tokens read so far: one number, or (B,) where sequences differ."""

    layers: Sequence[LayerCache]
    lengths: int | Tensor = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that all layers occupy."""
        return sum(layer.num_bytes for layer in self.layers)

    def advance(self, num_tokens: int | Tensor) -> None:
        """Count tokens as read, once every layer has processed them."""
        self.lengths = self.lengths + num_tokens

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget everything from position `lengths` on; (B,) where sequences differ."""
        if isinstance(lengths, int) and isinstance(self.lengths, int):
            self.lengths = min(self.lengths, lengths)
        else:
            device = (lengths if isinstance(lengths, Tensor) else self.lengths).device  # type: ignore[union-attr]
            read, kept = (torch.as_tensor(value, device=device) for value in (self.lengths, lengths))
            self.lengths = torch.minimum(read, kept)
        for layer in self.layers:
            layer.truncate(lengths)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` (R,) int64, in that order; one may occur several times."""
        if isinstance(self.lengths, Tensor):
            self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.select(rows)


@dataclass(slots=True, kw_only=True)
class AttentionContext:
    """What an attention layer needs besides its input (R, T, D); shared by the layers, unless tokens skip some.

    `cos` and `sin` are (T, C/2), or (R, 1, T, C/2) where sequences stand at different positions.
    """

    cos: Tensor
    sin: Tensor
    cache: KeyValueCache | None = None
    rows: Tensor | None = None
    """Shape (R,), int64: which of the cache's sequences the input is of; None is all."""
    counts: Tensor | None = None
    """Shape (R,), int64: how many of its T tokens a sequence really has, padding follows; None is all."""
    positions: Tensor | None = None
    """Shape (R, T), int64: where in its text each token stands; None is one after the other."""
    documents: Tensor | None = None
    """Shape (R, T), int64: tokens see their own document only; None is all that comes before."""

    def extend_cache(self, layer: int, k_RKTC: Tensor, v_RKTC: Tensor, *others_RHTC: Tensor) -> Held:
        """Add keys, values and what else the layer keeps to its cache, and return all that it then holds."""
        assert self.cache is not None
        return self.cache.layers[layer].extend(
            k_RKTC, v_RKTC, *others_RHTC, rows=self.rows, counts=self.counts, positions=self.positions
        )

    def of(self, tokens_RM: Tensor, *, rows: Tensor | None = None, counts: Tensor | None = None) -> AttentionContext:
        """Return the context of `tokens_RM`, indices int64 into the T tokens of the sequences `rows`.

        Of sequence r the first `counts[r]` tokens are real, in the order of the text; padding follows.
        """
        per_sequence = self.cos.ndim == 4
        batch = torch.arange(tokens_RM.shape[0], device=tokens_RM.device) if rows is None else rows
        if per_sequence:
            cos, sin = (table[batch[:, None], 0, tokens_RM][:, None] for table in (self.cos, self.sin))
        else:
            cos, sin = (table[tokens_RM][:, None] for table in (self.cos, self.sin))
        start = self.cache.lengths if self.cache is not None else 0
        if self.positions is not None:
            positions = self.positions[batch[:, None], tokens_RM]
        else:
            positions = tokens_RM + (start[batch][:, None] if isinstance(start, Tensor) else start)
        own_rows = rows if self.rows is None or rows is None else self.rows[rows]
        return dataclasses.replace(
            self,
            cos=cos,
            sin=sin,
            rows=self.rows if rows is None else own_rows,
            counts=counts,
            positions=positions,
            documents=None if self.documents is None else self.documents[batch[:, None], tokens_RM],
        )


def visible(held: Held, length: int, window: int | None = None) -> Tensor | None:
    """Return which of the S entries each of T new ones sees: (T, S) or (R, 1, T, S) booleans.

    None stands for what needs no mask: one new entry that sees all. `window` limits the view to as many entries.
    """
    num_keys, device = held.keys.shape[2], held.keys.device
    if length == 1 and isinstance(held.starts, int):
        if num_keys == held.starts + 1 and (window is None or num_keys <= window):
            return None
        first = num_keys - 1 - held.starts
        return _seen_by_one(num_keys, window, device)[:, first : first + num_keys]
    return _seen(held.starts, length, num_keys, window, device)


@functools.lru_cache(maxsize=8)
def _seen_by_one(num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return what one new entry sees, whatever it is: the S entries from `S - 1 - start` on, (1, 2 S - 1)."""
    with torch.inference_mode(False):
        return _seen(num_keys - 1, 1, 2 * num_keys - 1, window, device)


def _seen(starts_R: int | Tensor, length: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    starts = torch.as_tensor(starts_R, device=device)
    last = starts.reshape(-1, 1, 1) + torch.arange(length, device=device)[:, None]  # (R or 1, T, 1)
    entries = torch.arange(num_keys, device=device)
    seen = entries <= last
    if window is not None:
        seen &= entries > last - window
    return seen[0] if isinstance(starts_R, int) else seen[:, None]
