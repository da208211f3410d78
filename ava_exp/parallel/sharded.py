"""Weights, gradients and optimizer states cut over the ranks [zhao2023fsdp].

A layer's weights are put together when it is computed, and forgotten again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ava_exp.models.decoder import Decoder
from ava_exp.optim.elementwise import require_elementwise
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import Alone


def shard(model: Decoder, device: torch.device, ranks: Ranks, compute: torch.dtype | None) -> None:
    """Cut the parameters of a model over the ranks; they are computed with in the format `compute`, if it is given.

    Gradients are added up, not averaged, in fp32. Raises RuntimeError unless all of it is cut as it should be.
    """
    mesh: DeviceMesh = init_device_mesh(device.type, (ranks.num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    cut = partial(_placement, num_ranks=ranks.num_ranks)
    for unit in (*model.blocks, *model.prediction_heads):
        fully_shard(unit, mesh=mesh, mp_policy=policy, shard_placement_fn=cut)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=cut, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or not isinstance(parameter.placements[0], Shard):
            raise RuntimeError(f"`distributed=fsdp2` was asked for, but {name} is not cut over the ranks")


class ShardedUpdater(Updater):
    """Updates this rank's parts. They are plain tensors, which share their memory with what the model holds."""

    is_sharded = True
    holds_model = False

    def __init__(self, model: Decoder, *arguments: Any, ranks: Ranks, **settings: Any) -> None:
        self.ranks = ranks
        super().__init__(model, *arguments, **settings)
        require_elementwise(self.optimizer, ranks.backend.value)
        assert not self.wide, "what is cut is held in fp32, and computed with in 16 bits"

    def _held(self) -> dict[str, Tensor]:
        return {name: nn.Parameter(_part(parameter.detach())) for name, parameter in self.model_parameters.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the last backward pass of a step: take this rank's parts of the gradients."""
        for name, parameter in self.model_parameters.items():
            if parameter.grad is not None:
                self.weights[name].grad = _part(parameter.grad)
                parameter.grad = None

    def _norm(self, gradients: list[Tensor]) -> float:
        squares = sum((gradient.float().square().sum() for gradient in gradients), torch.zeros(()))
        (total,) = self.ranks.add_up([torch.as_tensor(squares)])
        return total.sqrt().item()

    def whole(self, name: str, part: Tensor, *, everywhere: bool = False) -> Tensor:
        parameter = self.model_parameters[name]
        assert isinstance(parameter, DTensor)
        shape, stride = parameter.shape, parameter.stride()
        mesh, placements = parameter.device_mesh, parameter.placements
        cut = DTensor.from_local(part.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)
        whole: Tensor = cut.full_tensor()
        return whole if everywhere or self.ranks.is_first else whole.new_empty(0)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        if name not in self.model_parameters or whole.ndim == 0:
            return whole
        parameter = self.model_parameters[name]
        assert isinstance(parameter, DTensor) and isinstance(parameter.placements[0], Shard)
        dim = parameter.placements[0].dim
        parts = whole.chunk(self.ranks.num_ranks, dim)
        return parts[self.ranks.rank] if self.ranks.rank < len(parts) else whole.narrow(dim, 0, 0)


class FullySharded(Alone):
    """Parameters, gradients and optimizer states cut over the ranks."""

    updater: ShardedUpdater

    def __init__(self, objective: nn.Module, updater: ShardedUpdater, model: Decoder) -> None:
        super().__init__(objective, updater)
        self.ranks = updater.ranks
        assert isinstance(model, FSDPModule)
        self._model = model

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(is_last)
        yield
        if is_last:
            self.updater.collect_gradients()

    def verify(self) -> None:
        """Raise RuntimeError unless the ranks agree on what is not cut."""
        self._verify_alike(self.updater.buffers)


def _placement(parameter: nn.Parameter, num_ranks: int) -> Shard:
    """Cut along the first dimension that gives all ranks as much: of stacked experts there may be fewer than ranks.

    Where there is none, along the first one; some ranks then have more than others.
    """
    even = (dim for dim, size in enumerate(parameter.shape) if size % num_ranks == 0)
    return Shard(next(even, 0))


def _part(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    part: Tensor = tensor.to_local()
    return part
