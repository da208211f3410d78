"""How well a model predicts text: nats and bits, per token and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.depth import DepthMetrics, DepthObserver
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
    """`loss` is nats per token; `bits_per_byte` is independent of the tokenizer; `token_accuracy` is of top tokens.

    Where layers choose tokens otherwise while training, all of this is at inference, which no later token influences;
    `noncausal_loss` and `noncausal_perplexity` are with the choice of training.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    tokens: int
    bytes: int
    seconds: float
    noncausal_loss: float | None = None
    noncausal_perplexity: float | None = None
    routing: RoutingMetrics | None = None
    activation_weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the mixtures of activations, by where they are."""
    future: tuple[FutureMetrics, ...] = ()
    """Of the prediction heads, the first one first."""
    depth: DepthMetrics | None = None


@torch.inference_mode()
def evaluate_language(
    model: Decoder,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    device: torch.device,
    observer: RoutingObserver | None = None,
    depth_observer: DepthObserver | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> LanguageMetrics:
    """Predict every label of `batches`. `token_bytes` (V,) says how many UTF-8 bytes each token stands for.

    End-of-document tokens stand for no bytes, yet cost nats: the figure includes predicting where documents end.
    `observer` is shown the routing of every batch, `depth_observer` what its tokens skip. Where ranks share the
    batches, `gather` returns what each of them gives, and all get the figures of all.
    """
    bytes_of = torch.from_numpy(np.ascontiguousarray(token_bytes, dtype=np.int64)).to(device)
    started, was_training = time.monotonic(), model.training
    model.eval()
    sums = _Sums(routing=observer, depth=depth_observer or DepthObserver())
    for batch in batches:
        labels = batch.labels.to(device).flatten()
        output = model(batch.input_ids.to(device), **batch.masks_on(device))
        if sums.routing is not None:
            sums.routing.add(batch, output.routings)
        hits_N = torch.empty_like(labels, dtype=torch.bool)
        batch_nats, batch_correct = score_labels(output.hidden.flatten(0, 1), output.head, labels, hits_N=hits_N)
        sums.future.add(output, labels.view(batch.labels.shape), hits_N.view(batch.labels.shape))
        sums.nats, sums.correct = sums.nats + batch_nats.item(), sums.correct + int(batch_correct)
        if output.depths:
            sums.depth.add(batch, output.depths)
            if model.chooses_by_content:
                sums.noncausal_nats += _look_ahead(model, batch, labels, sums.depth)
        valid = labels != IGNORED
        sums.tokens += int(valid.sum())
        sums.num_bytes += int(bytes_of[labels[valid]].sum())
    model.train(was_training)
    if sums.routing is not None:
        sums.routing.settle()
    first, *others = gather(sums)
    for other in others:
        first.take(other)
    return _metrics(first, model, time.monotonic() - started)


def _metrics(sums: _Sums, model: Decoder, seconds: float) -> LanguageMetrics:
    tokens = max(1, sums.tokens)
    loss = sums.nats / tokens
    depth = sums.depth.metrics(list(model.mod_layers()), model.mod_capacity or 1.0) if sums.depth.has_seen else None
    noncausal_loss = sums.noncausal_nats / tokens if depth is not None and model.chooses_by_content else None
    return LanguageMetrics(
        loss=loss,
        perplexity=_perplexity(loss),
        bits_per_byte=sums.nats / math.log(2) / max(1, sums.num_bytes),
        token_accuracy=sums.correct / tokens,
        tokens=sums.tokens,
        bytes=sums.num_bytes,
        seconds=seconds,
        noncausal_loss=noncausal_loss,
        noncausal_perplexity=None if noncausal_loss is None else _perplexity(noncausal_loss),
        routing=sums.routing.metrics() if sums.routing is not None else None,
        activation_weights=activation_weights(model),
        future=sums.future.metrics(),
        depth=depth,
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

    def take(self, other: FutureTally) -> None:
        """Add what another one counted."""
        if not self.counts or not other.counts:
            self.counts = self.counts or other.counts
            return
        pairs = zip(self.counts, other.counts, strict=True)
        self.counts = [[one + more for one, more in zip(*pair, strict=True)] for pair in pairs]

    def metrics(self) -> tuple[FutureMetrics, ...]:
        """Return the shares."""
        return tuple(
            FutureMetrics(accuracy=hits / max(1, labels), acceptance=right / max(1, consulted))
            for labels, hits, consulted, right in self.counts
        )


@dataclass(slots=True, kw_only=True)
class _Sums:
    """What some of the batches add up to."""

    routing: RoutingObserver | None
    depth: DepthObserver
    future: FutureTally = field(default_factory=FutureTally)
    nats: float = 0.0
    noncausal_nats: float = 0.0
    correct: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def take(self, other: _Sums) -> None:
        """Add those of other batches."""
        for name in ("nats", "noncausal_nats", "correct", "tokens", "num_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.depth.take(other.depth)
        self.future.take(other.future)
        if self.routing is not None and other.routing is not None:
            self.routing.take(other.routing)


def _look_ahead(model: Decoder, batch: Batch, labels_N: Tensor, observer: DepthObserver) -> float:
    """Return the nats of a batch with the choice of tokens that training makes."""
    with model.looking_ahead():
        output = model(batch.input_ids.to(labels_N.device), **batch.masks_on(labels_N.device))
    observer.add_looking_ahead(output.depths)
    return score_labels(output.hidden.flatten(0, 1), output.head, labels_N)[0].item()


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
