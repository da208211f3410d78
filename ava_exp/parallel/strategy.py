"""How the ranks of a run train one model: what calls it, and how its gradients become those of the whole batch.

Annotations are evaluated here, since torch looks at those of a hook.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ava_exp.errors import ConfigError
from ava_exp.optim.update import Updater
from ava_exp.parallel.compression import Distance, LowRankSums
from ava_exp.parallel.ranks import Ranks


class Alone:
    """One process. `objective` is what is called for a micro-batch's terms."""

    ranks = Ranks()
    backward: Callable[[Tensor], None] | None = None
    """Computes gradients, where that is not what the device does on its own."""
    distance: Distance | None = None
    """Takes how far the next step's sums of gradients are from exact ones, where they are compressed."""

    def __init__(self, objective: nn.Module, updater: Updater) -> None:
        self.objective, self.updater = objective, updater

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        """Compute one micro-batch's gradients inside; after the last of a step the updater has those of all."""
        yield
        self.updater.collect_gradients()

    def record(self) -> dict[str, float]:
        """Return what is to be known of how the last step's gradients travelled; nothing, where they did as usual."""
        return {}

    def kept(self) -> dict[str, Tensor]:
        """Return what this rank remembers from step to step, besides what the updater does."""
        return {}

    def keep(self, kept: dict[str, Tensor]) -> None:
        """Put back what `kept` returned."""

    def verify(self) -> None:
        """Raise RuntimeError unless the ranks agree on all weights. One is always of one mind."""

    def _verify_alike(self, tensors: dict[str, Tensor], among: Ranks | None = None) -> None:
        ranks = among or self.ranks
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
    last backward pass goes on; not averaged, since the loss is a mean over the tokens of all ranks already.

    With a `compression` they travel in that format, or are added up by it when the pass is over.
    """

    objective: DistributedDataParallel

    def __init__(
        self,
        objective: DistributedDataParallel,
        updater: Updater,
        ranks: Ranks,
        compression: torch.dtype | LowRankSums | None = None,
        own: Collection[str] = (),
    ) -> None:
        """`own` names the weights that this rank has for itself, of which the module knows, too."""
        super().__init__(objective, updater)
        self.ranks, self.compression = ranks, compression
        self._num_bytes = 0
        self._exact: list[tuple[Tensor, Tensor, Any]] = []
        self._parameters = {name: weight for name, weight in updater.model_parameters.items() if name not in own}
        self._master_of = {parameter: updater.weights[name] for name, parameter in self._parameters.items()}
        self._num_added = 0
        objective.register_comm_hook(None, self._add_up)
        updater.draw = self.ranks.draw_alike

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        self._num_added = self._num_bytes = 0
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
        if isinstance(self.compression, LowRankSums):
            gradients = {name: weight.grad for name, weight in self.updater.weights.items() if weight.grad is not None}
            self._num_bytes = self.compression.add_up(gradients, self.updater.loss_scale.scale, self.distance)
        while self._exact and self.distance is not None:
            sums, exact, work = self._exact.pop()
            work.wait()
            self.distance.add(sums, exact)

    def record(self) -> dict[str, float]:
        return {} if self.compression is None else {"gradient_bytes": self._num_bytes}

    def kept(self) -> dict[str, Tensor]:
        return self.compression.state() if isinstance(self.compression, LowRankSums) else {}

    def keep(self, kept: dict[str, Tensor]) -> None:
        if isinstance(self.compression, LowRankSums):
            self.compression.load_state(kept)

    def verify(self) -> None:
        self._verify_alike(self.updater.weights | self.updater.buffers)

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
            if sent is not sums:
                sums.copy_(sent)
            for master, part in zip(masters, parts, strict=True):
                master.grad = part
            if not wide:
                buffer.copy_(sums)
            done: Tensor = buffer
            return done

        sent = sums.to(self.compression) if isinstance(self.compression, torch.dtype) else sums
        if isinstance(self.compression, LowRankSums):
            later: torch.futures.Future[Any] = torch.futures.Future()
            later.set_result(None)
            return later.then(keep)  # gradients are added up when the pass is over
        self._num_bytes += sent.nbytes
        if self.compression is not None and self.distance is not None:
            self._exact.append((sums, exact := sums.clone(), dist.all_reduce(exact, async_op=True)))
        work = dist.all_reduce(sent, async_op=True)
        assert work is not None
        added: torch.futures.Future[Tensor] = work.get_future().then(keep)
        return added


def _bits(weight: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as whole numbers, int64, which two tensors that differ hardly share."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().view(integers).sum(dtype=torch.int64)
