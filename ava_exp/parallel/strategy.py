"""How the ranks of a run train one model: what calls it, and how its gradients become those of the whole batch.

Annotations are evaluated here, since torch looks at those of a hook.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ava_exp.errors import ConfigError
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks


class Alone:
    """One process. `objective` is what is called for a micro-batch's terms."""

    ranks = Ranks()

    def __init__(self, objective: nn.Module, updater: Updater) -> None:
        self.objective, self.updater = objective, updater

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Compute one micro-batch's gradients inside; after the last of a step the updater has those of all."""
        yield
        self.updater.collect_gradients()

    def verify(self) -> None:
        """Raise RuntimeError unless the ranks agree on all weights. One is always of one mind."""

    def exchanged_bytes(self) -> int | None:
        """Return what ranks have sent one another of tokens since the last call; None where tokens stay."""
        return None

    def _verify_alike(self, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        if not tensors:
            return
        own = torch.stack([_bits(tensor) for tensor in tensors.values()]).tolist()
        largest = ranks.largest([*own, *(-value for value in own)])
        highest, lowest = largest[: len(own)], (-value for value in largest[len(own) :])
        differing = [name for name, high, low in zip(tensors, highest, lowest, strict=True) if high != low]
        if differing:
            raise RuntimeError(f"{len(differing)} weights are not the same on all ranks, as {differing[0]}")


class DataParallel(Alone):
    """A copy of the model on every rank [li2020ddp]. Gradients are added up in fp32 at least, once a step, while the
    last backward pass goes on; not averaged, since the loss is a mean over the tokens of all ranks already."""

    objective: DistributedDataParallel

    def __init__(
        self, objective: DistributedDataParallel, updater: Updater, ranks: Ranks, own: Collection[str] = ()
    ) -> None:
        """`own` names the weights that this rank has for itself, of which the module knows, too."""
        super().__init__(objective, updater)
        self.ranks = ranks
        self._parameters = {name: weight for name, weight in updater.model_parameters.items() if name not in own}
        self._master_of = {parameter: updater.weights[name] for name, parameter in self._parameters.items()}
        self._num_added = 0
        objective.register_comm_hook(None, self._add_up)
        updater.draw = self._draw_alike

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        self._num_added = 0
        with nullcontext() if is_last else self.objective.no_sync():
            yield
        if not is_last:
            self.updater.collect_gradients()
            return
        if self._num_added < len(self._parameters):
            idle = [name for name, parameter in self._parameters.items() if parameter.grad is None]
            raise ConfigError(
                "with `distributed=ddp` all weights must take part in a micro-batch, but "
                f"{', '.join(idle[:3]) or 'some'} did not: longer or more sequences in a micro-batch help."
            )
        if self.updater.wide:
            for parameter in self._parameters.values():
                parameter.grad = None  # the masters have it
        self.updater.collect_gradients()

    def verify(self) -> None:
        self._verify_alike(self.updater.weights | self.updater.buffers, self.ranks)

    def _add_up(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Add up a bucket of gradients over the ranks: the masters', where there are masters, else the weights' own."""
        buffer, wide = bucket.buffer(), self.updater.wide
        sums = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        self._num_added += len(bucket.parameters())
        masters = [self._master_of[parameter] for parameter in bucket.parameters()] if wide else []
        starts = [gradient.storage_offset() - buffer.storage_offset() for gradient in bucket.gradients()]
        parts = [sums[start : start + m.numel()].view(m.shape) for start, m in zip(starts, masters, strict=False)]
        for master, part in zip(masters, parts, strict=True):
            if master.grad is not None:
                part.add_(master.grad)

        def keep(_: torch.futures.Future[Any]) -> Tensor:
            for master, part in zip(masters, parts, strict=True):
                master.grad = part
            if not wide:
                buffer.copy_(sums)
            done: Tensor = buffer
            return done

        work = dist.all_reduce(sums, async_op=True)
        assert work is not None
        added: torch.futures.Future[Tensor] = work.get_future().then(keep)
        return added

    @contextmanager
    def _draw_alike(self) -> Iterator[None]:
        """Let what is drawn inside be the same on all ranks, and this rank's generators stand where they stood."""
        seed = self.ranks.from_first(int(torch.randint(2**31, ())))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield


def _bits(weight: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as whole numbers, int64, which two tensors that differ hardly share."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(integers).sum(dtype=torch.int64)
