"""How well a model predicts text: nats and bits, per token and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.routing import RoutingMetrics, RoutingObserver
from ava_exp.losses.cross_entropy import score_labels
from ava_exp.models.decoder import Decoder
from ava_exp.nn.activation import activation_weights
from ava_exp.nn.output import ModelOutput


@dataclass(kw_only=True, slots=True, frozen=True)
class FutureMetrics:
    """How well a prediction head sees its token, the true ones up to it being known.

    `accuracy` is the share of labels that it would have chosen; `acceptance` the same of the positions at which the
    decoder and all heads before it are right: there its draft is the one that counts.
    """

    accuracy: float
    acceptance: float


@dataclass(kw_only=True, slots=True, frozen=True)
class LanguageMetrics:
    """`loss` is nats per token; `bits_per_byte` is independent of the tokenizer; `token_accuracy` is of top tokens."""

    loss: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    tokens: int
    bytes: int
    seconds: float
    routing: RoutingMetrics | None = None
    activation_weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the mixtures of activations, by where they are."""
    future: tuple[FutureMetrics, ...] = ()
    """Of the prediction heads, the first one first."""


@torch.inference_mode()
def evaluate_language(
    model: Decoder,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    device: torch.device,
    observer: RoutingObserver | None = None,
) -> LanguageMetrics:
    """Predict every label of `batches`. `token_bytes` (V,) says how many UTF-8 bytes each token stands for.

    End-of-document tokens stand for no bytes, yet cost nats: the figure includes predicting where documents end.
    `observer` is shown the routing of every batch.
    """
    bytes_of = torch.from_numpy(np.ascontiguousarray(token_bytes, dtype=np.int64)).to(device)
    started, was_training = time.monotonic(), model.training
    model.eval()
    nats, correct, tokens, num_bytes = 0.0, 0, 0, 0
    future = FutureTally()
    for batch in batches:
        labels = batch.labels.to(device).flatten()
        output = model(batch.input_ids.to(device), **batch.masks_on(device))
        if observer is not None:
            observer.add(batch, output.routings)
        hits_N = torch.empty_like(labels, dtype=torch.bool)
        batch_nats, batch_correct = score_labels(output.hidden.flatten(0, 1), output.head, labels, hits_N=hits_N)
        future.add(output, labels.view(batch.labels.shape), hits_N.view(batch.labels.shape))
        nats, correct = nats + batch_nats.item(), correct + int(batch_correct)
        valid = labels != IGNORED
        tokens += int(valid.sum())
        num_bytes += int(bytes_of[labels[valid]].sum())
    model.train(was_training)
    loss = nats / max(1, tokens)
    return LanguageMetrics(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(1, num_bytes),
        token_accuracy=correct / max(1, tokens),
        tokens=tokens,
        bytes=num_bytes,
        seconds=time.monotonic() - started,
        routing=observer.metrics() if observer is not None else None,
        activation_weights=activation_weights(model),
        future=future.metrics(),
    )


class FutureTally:
    """Counts, by prediction head: labels, those it would have chosen, drafts that count, and those that are right."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def add(self, output: ModelOutput, labels_BT: Tensor, is_right_BT: Tensor) -> None:
        """Add a batch. `is_right_BT` says where the decoder would have chosen the label."""
        states = output.future
        self.counts = self.counts or [[0, 0, 0, 0] for _ in states]
        for counts, hidden_BTD in zip(self.counts, states, strict=True):
            labels_BT = labels_BT[:, 1:]
            hits_N = torch.empty(labels_BT.numel(), dtype=torch.bool, device=labels_BT.device)
            score_labels(hidden_BTD.flatten(0, 1), output.head, labels_BT.flatten(), hits_N=hits_N)
            valid_BT, hits_BT = labels_BT != IGNORED, hits_N.view(labels_BT.shape)
            consulted_BT = is_right_BT[:, :-1] & valid_BT
            is_right_BT = consulted_BT & hits_BT
            added = (valid_BT, hits_BT, consulted_BT, is_right_BT)
            counts[:] = [count + int(where.sum()) for count, where in zip(counts, added, strict=True)]

    def metrics(self) -> tuple[FutureMetrics, ...]:
        """Return the shares."""
        return tuple(
            FutureMetrics(accuracy=hits / max(1, labels), acceptance=right / max(1, consulted))
            for labels, hits, consulted, right in self.counts
        )
