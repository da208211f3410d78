"""Activations that are computed again in the backward pass, or kept in the processor's memory, to save the device's."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ava_exp.config.training import Recompute

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._grouped_mm)
"""What selective recomputation keeps: results of the products with weights. Attention's scores are none of these."""
SMALLEST_OFFLOADED_BYTES = 2**16
"""Smaller tensors stay: moving one costs more than it frees."""


def run_recomputed(block: nn.Module, recompute: Recompute, *inputs: Any) -> Any:
    """Run a block so that its backward pass computes again what the forward pass did not keep [chen2016sublinear] §4.

    `full` keeps the block's input alone. `selective` keeps the results of products with weights, too, so that only
    norms, activations, gathers and attention's scores are computed again [korthikanti2022reducing] §5. Random numbers
    are drawn as before; what the block returns is returned once.
    """
    if recompute is Recompute.full:
        return checkpoint(block, *inputs, use_reentrant=False)
    keep_products = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep_products)


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.overloadpacket in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def offload(kept: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which what the backward pass needs waits in the processor's memory, except `kept`.

    Parameters belong there: autograd saves them, too, and they stay on the device anyway.
    """
    staying = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        small = tensor.numel() * tensor.element_size() < SMALLEST_OFFLOADED_BYTES
        if small or tensor.untyped_storage().data_ptr() in staying:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=device.type == "cuda")

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
