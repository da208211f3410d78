"""How well a model predicts by place in the text: what more context is worth, and where it does harm."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ava_exp.config.stage import PositionBins
from ava_exp.data.loader import IGNORED, Batch
from ava_exp.losses.cross_entropy import label_nats
from ava_exp.models.decoder import Decoder

NUM_EQUAL_BINS = 16
FIRST_DOUBLING_BIN = 32
"""Positions of the first of the doubling bins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLoss:
    """Sums over all windows, by position; position 0 predicts a window's second token."""

    nats: npt.NDArray[np.float64]
    """Shape (T,): of all tokens predicted at a position."""
    tokens: npt.NDArray[np.int64]
    """Shape (T,): how many those are."""

    @property
    def loss(self) -> float:
        """Nats per token over all positions."""
        return float(self.nats.sum() / max(1, self.tokens.sum()))

    def tokens_by_bin(self, edges: Sequence[int]) -> list[int]:
        """Return how many tokens the positions from each edge to the next have."""
        return [int(self.tokens[a:b].sum()) for a, b in itertools.pairwise(edges)]

    def binned(self, edges: Sequence[int]) -> list[float]:
        """Return the nats per token of the positions from each edge to the next; NaN where none has a token."""
        sums = [(self.nats[a:b].sum(), self.tokens[a:b].sum()) for a, b in itertools.pairwise(edges)]
        return [float(nats / tokens) if tokens else float("nan") for nats, tokens in sums]


def bin_edges(length: int, bins: PositionBins) -> list[int]:
    """Return where bins of `length` positions begin, and the end of the last; none is empty."""
    if bins is PositionBins.equal:
        count = min(length, NUM_EQUAL_BINS)
        return [length * number // count for number in range(count + 1)]
    edges = [0, min(length, FIRST_DOUBLING_BIN)]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1]))
    return edges


@torch.inference_mode()
def evaluate_by_position(model: Decoder, batches: Iterable[Batch], device: torch.device) -> PositionLoss:
    """Predict every label of `batches`, which are equally long, and sum up by position.

    The positions add up in float64 on the processor, so that their sums are those of any other order.
    """
    was_training = model.training
    model.eval()
    nats, tokens = np.zeros(0), np.zeros(0, dtype=np.int64)
    for batch in batches:
        output = model(batch.input_ids.to(device), **batch.masks_on(device))
        labels = batch.labels.to(device)
        nats_BT = label_nats(output.hidden.flatten(0, 1), output.head, labels.flatten()).view(labels.shape)
        if not len(nats):
            nats, tokens = np.zeros(labels.shape[1]), np.zeros(labels.shape[1], dtype=np.int64)
        nats += nats_BT.cpu().double().sum(dim=0).numpy()
        tokens += (batch.labels != IGNORED).sum(dim=0).numpy()
    model.train(was_training)
    return PositionLoss(nats=nats, tokens=tokens)


def evaluate_in_pieces(model: Decoder, batches: Iterable[Batch], device: torch.device, length: int) -> PositionLoss:
    """Predict the same labels as `evaluate_by_position`, each from the last `length` tokens at most: windows are cut.

    The sums are at the positions of the whole windows.
    """
    parts: list[list[PositionLoss]] = []
    for batch in batches:
        parts.append([evaluate_by_position(model, [piece], device) for piece in _pieces(batch, length)])
    return PositionLoss(
        nats=np.sum([np.concatenate([piece.nats for piece in pieces]) for pieces in parts], axis=0),
        tokens=np.sum([np.concatenate([piece.tokens for piece in pieces]) for pieces in parts], axis=0),
    )


def _pieces(batch: Batch, length: int) -> Iterator[Batch]:
    for start in range(0, batch.labels.shape[1], length):
        part = slice(start, start + length)
        yield Batch(input_ids=batch.input_ids[:, part], labels=batch.labels[:, part], sample_ids=batch.sample_ids)
