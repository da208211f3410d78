"""How well a model predicts text: nats and bits, per token and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.routing import RoutingMetrics, RoutingObserver
from ava_exp.losses.cross_entropy import score_labels
from ava_exp.models.decoder import Decoder


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
    for batch in batches:
        labels = batch.labels.to(device).flatten()
        output = model(batch.input_ids.to(device), **batch.masks_on(device))
        if observer is not None:
            observer.add(batch, output.routings)
        batch_nats, batch_correct = score_labels(output.hidden.flatten(0, 1), output.head, labels)
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
    )
