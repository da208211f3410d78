"""Cross entropy over a large vocabulary, in slices that stay in the processor's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED

SLICE_VALUES = 2**19
"""Logits treated at once: 2 MiB in fp32."""


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, divisor: float = 1.0) -> Tensor:
    """Return Σ -log p(label) / divisor in nats over the labels that are not `IGNORED`, an fp32 scalar (fp64 for fp64).

    The softmax is computed in fp32 slice by slice, and its gradient with it, in the format of the logits: neither an
    fp32 copy of all logits nor their log-probabilities ever exist.
    """
    total: Tensor = _CrossEntropy.apply(logits_NV, labels_N, divisor)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, divisor: float) -> Tensor:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits_NV.device)
        gradient = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        num_rows = max(1, SLICE_VALUES // logits_NV.shape[1])
        for start in range(0, logits_NV.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            valid = labels_N[rows] != IGNORED
            labels = labels_N[rows].where(valid, 0)[:, None]
            logits = logits_NV[rows].to(wide, copy=True)
            log_partition = logits.logsumexp(dim=1, keepdim=True)
            nats = log_partition - logits.gather(1, labels)
            total += nats[:, 0].masked_fill(~valid, 0).sum()
            if gradient is not None:
                softmax = logits.sub_(log_partition).exp_()
                softmax.scatter_add_(1, labels, torch.full_like(nats, -1.0))
                gradient[rows] = softmax.mul_(valid[:, None] / divisor)
        ctx.save_for_backward(gradient)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # A weight of 1 is the rule, and multiplying all logits' gradients by it costs a pass over memory.
        if grad.device.type == "cpu" and grad.item() == 1:
            return gradient, None, None
        return gradient * grad, None, None
