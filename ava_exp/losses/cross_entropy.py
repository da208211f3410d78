"""Cross entropy of a linear head over a large vocabulary: logits, softmax, loss and gradients, slice by slice of rows.

All logits never exist at once: one slice of them does, and turns into its own gradient in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED

SLICE_VALUES = 2**24
"""Logits that exist at once: 32 MiB in 16 bits, 64 MiB in fp32."""
CACHED_VALUES = 2**19
"""Logits whose softmax is computed at once on a CPU, 2 MiB in fp32: they stay in its cache."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    divisor: float = 1.0,
    expected_scale: float = 1.0,
    nats_N: Tensor | None = None,
) -> Tensor:
    """Return Σ -log p(label) / divisor in nats over the labels that are not `IGNORED`, an fp32 scalar (fp64 for fp64).

    p is the softmax of the logits `hidden_ND @ head_VD.T`, which have the format of `hidden_ND`; it is computed in fp32
    or wider. The gradients of both are computed with it, where they are needed. The head's adds up over slices in its
    own format: in bf16 that costs less than the rounding of its result, up to about ten slices. `expected_scale` is
    what the backward pass will begin with, the loss scale: gradients are computed at it, and so do not vanish in fp16.
    `nats_N`, where it is given, is filled with each row's own -log p(label), which carries no gradient; it means
    nothing where the label is `IGNORED`.
    """
    if not (torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)):
        return score_labels(hidden_ND, head_VD, labels_N, nats_N=nats_N)[0] / divisor
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, labels_N, divisor, expected_scale, nats_N
    )
    return total


@torch.no_grad()
def score_labels(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    nats_N: Tensor | None = None,
    hits_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Σ -log p(label), and how many labels have the largest logit, over those that are not `IGNORED`.

    `nats_N` and `hits_N`, where they are given, are filled with the same of every row: -log p(label), which means
    nothing where the label is `IGNORED`, and, as booleans, whether it has one and that has the largest logit.
    """
    valid_N, labels_N1 = valid_labels(labels_N)
    nats = torch.zeros((), dtype=wide_dtype(hidden_ND), device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    for rows in head_slices(hidden_ND, head_VD):
        logits_SV, valid_S, labels_S1 = hidden_ND[rows] @ head_VD.t(), valid_N[rows], labels_N1[rows]
        for part in cached_parts(logits_SV):
            logits = logits_SV[part].to(nats.dtype)
            nats_P = _nats(logits, logits.softmax(dim=1), labels_S1[part])
            hits_P = (logits.argmax(dim=1) == labels_S1[part, 0]) & valid_S[part]
            nats += nats_P.masked_fill(~valid_S[part], 0).sum()
            correct += hits_P.sum()
            for kept, of_part in ((nats_N, nats_P), (hits_N, hits_P)):
                if kept is not None:
                    kept[rows][part] = of_part
    return nats, correct


@torch.no_grad()
def label_nats(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return -log p(label) of every row, (N,) fp32 or wider, and 0 where the label is `IGNORED`."""
    valid_N, labels_N1 = valid_labels(labels_N)
    nats_N = torch.zeros(len(hidden_ND), dtype=wide_dtype(hidden_ND), device=hidden_ND.device)
    for rows in head_slices(hidden_ND, head_VD):
        logits_SV = hidden_ND[rows] @ head_VD.t()
        for part in cached_parts(logits_SV):
            logits = logits_SV[part].to(nats_N.dtype)
            nats_N[rows][part] = _nats(logits, logits.softmax(dim=1), labels_N1[rows][part])
    return nats_N.masked_fill_(~valid_N, 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        divisor: float,
        expected_scale: float,
        nats_N: Tensor | None,
    ) -> Tensor:
        valid_N, labels_N1 = valid_labels(labels_N)
        total = torch.zeros((), dtype=wide_dtype(hidden_ND), device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        for rows in head_slices(hidden_ND, head_VD):
            logits_SV = hidden_ND[rows] @ head_VD.t()
            nats_S = None if nats_N is None else nats_N[rows]
            total += _replace_by_gradient(logits_SV, labels_N1[rows], valid_N[rows], divisor / expected_scale, nats_S)
            if grad_hidden is not None:
                torch.mm(logits_SV, head_VD, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(logits_SV.t(), hidden_ND[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.expected_scale = expected_scale
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = ctx.saved_tensors
        factor = grad / ctx.expected_scale
        # A factor of 1 is the rule, and multiplying the head's gradient by it costs a pass over memory.
        if factor.device.type != "cpu" or factor.item() != 1:
            gradients = [None if gradient is None else gradient * factor for gradient in gradients]
        return *gradients, None, None, None, None


def _replace_by_gradient(
    logits_SV: Tensor, labels_S1: Tensor, valid_S: Tensor, divisor: float, nats_S: Tensor | None
) -> Tensor:
    """Overwrite logits by the gradient of Σ -log p(label) / divisor; return the sum, undivided. Its summands fill
    `nats_S`, where that is given."""
    total = torch.zeros((), dtype=wide_dtype(logits_SV), device=logits_SV.device)
    for part in cached_parts(logits_SV):
        valid, labels = valid_S[part, None], labels_S1[part]
        logits = logits_SV[part].to(total.dtype)
        softmax = logits.softmax(dim=1)
        nats = _nats(logits, softmax, labels)
        total += nats.masked_fill(~valid[:, 0], 0).sum()
        if nats_S is not None:
            nats_S[part] = nats
        softmax.scatter_add_(1, labels, torch.full_like(nats, -1.0)[:, None])
        torch.mul(softmax, valid / divisor, out=logits_SV[part])
    return total


def _nats(logits_SV: Tensor, softmax_SV: Tensor, labels_S1: Tensor) -> Tensor:
    """Return -log p(label) of each row. The log-partition is taken from the largest probability, which cannot vanish as
    the label's can: a third of the time of `logsumexp`."""
    log_partition = logits_SV.amax(dim=1) - softmax_SV.amax(dim=1).log()
    return log_partition - logits_SV.gather(1, labels_S1)[:, 0]


def valid_labels(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels count, and all of them as (N, 1) indices."""
    valid_N = labels_N != IGNORED
    return valid_N, labels_N.where(valid_N, 0)[:, None]


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the format of softmax and sums: fp32, or wider where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def head_slices(hidden_ND: Tensor, head_VD: Tensor) -> Iterator[slice]:
    """Return the rows whose logits exist at once, slice by slice."""
    return _slices(len(hidden_ND), SLICE_VALUES // len(head_VD))


def cached_parts(logits_SV: Tensor) -> Iterator[slice]:
    """Return the rows of a slice whose softmax is computed at once."""
    num_rows, num_values = logits_SV.shape
    return _slices(num_rows, CACHED_VALUES // num_values if logits_SV.device.type == "cpu" else num_rows)


def _slices(num_rows: int, rows_at_once: int) -> Iterator[slice]:
    step = max(1, rows_at_once)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
