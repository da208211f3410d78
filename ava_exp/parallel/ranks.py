"""The processes of a run: who this one is among them, and what they tell each other besides gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ava_exp.config.distributed import Backend


@dataclass(frozen=True, slots=True)
class Ranks:
    """`num_ranks` processes, of which this is number `rank`. Alone it has nobody to talk to, and nothing costs time.

    Every method but `is_first` is called by all ranks, in the same order. `control` is the group for plain values,
    which no device waits for, `group` that for tensors, None if these are all processes.
    """

    rank: int = 0
    num_ranks: int = 1
    backend: Backend = Backend.single
    control: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    experts: ExpertRanks | None = None
    """Where each rank holds some of the experts: who has the others, and who has the same."""

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
            dist.all_reduce(flat, group=self.group)
            sums[dtype] = iter(torch.split(flat, [tensor.numel() for tensor in alike]))
        return [next(sums[tensor.dtype]).view(tensor.shape) for tensor in tensors]

    def put_together(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks, which are of one shape, along the first dimension."""
        parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

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
        dist.broadcast_object_list(values, group_src=0, group=self.control)
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
        dist.gather_object(value, values, group_dst=0, group=self.control)
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

    def sharing_experts(self, num_parts: int, timeout: timedelta) -> Ranks:
        """Return these ranks as they are when each `num_parts` that follow one another share the experts."""

        def found(members: Iterable[list[int]]) -> Ranks:
            """Return which of these this rank is among; all ranks make all groups, as torch wants it."""
            made = [(each, dist.new_group(each, timeout), dist.new_group(each, timeout, "gloo")) for each in members]
            ((ranks, group, control),) = (each for each in made if self.rank in each[0])
            return Ranks(ranks.index(self.rank), len(ranks), self.backend, control, group)

        everybody = list(range(self.num_ranks))
        others = found(everybody[start : start + num_parts] for start in everybody[::num_parts])
        same = found(everybody[start::num_parts] for start in range(num_parts))
        return dataclasses.replace(self, experts=ExpertRanks(others=others, same=same))


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """`others` are the ranks that hold all experts together, in the order of the experts; `same` those that hold what
    this one does."""

    others: Ranks
    same: Ranks
