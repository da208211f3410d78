"""The processes of a run: who this one is among them, and what they tell each other besides gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ava_exp.config.distributed import Backend


@dataclass(frozen=True, slots=True)
class Ranks:
    """`num_ranks` processes, of which this is number `rank`. Alone it has nobody to talk to, and nothing costs time.

    Every method but `is_first` is called by all ranks, in the same order. `control` is the group for plain values,
    which no device waits for.
    """

    rank: int = 0
    num_ranks: int = 1
    backend: Backend = Backend.single
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of each tensor over the ranks; those of one format travel together."""
        if self.num_ranks == 1:
            return list(tensors)
        sums: dict[torch.dtype, Iterator[Tensor]] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().flatten() for tensor in alike])
            dist.all_reduce(flat)
            sums[dtype] = iter(torch.split(flat, [tensor.numel() for tensor in alike]))
        return [next(sums[tensor.dtype]).view(tensor.shape) for tensor in tensors]

    def sums(self, values: Sequence[int]) -> list[int]:
        """Return each number's sum over the ranks."""
        return self._together(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return for each number the largest that any rank has."""
        return self._together(values, dist.ReduceOp.MAX)

    def _together(self, values: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if self.num_ranks == 1 or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=operation, group=self.control)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """Return what the first rank gave."""
        if self.num_ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_at_first(self, value: Any) -> list[Any]:
        """Return what each rank gave to the first, and nothing to the others."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] | None = [None] * self.num_ranks if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.num_ranks > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def draw_alike(self) -> Iterator[None]:
        """Let what is drawn inside be the same on all ranks, and this rank's generators stand where they stood."""
        seed = self.from_first(int(torch.randint(2**31, ())))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first rank do what is inside alone, and then the others, who find what it left."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()
