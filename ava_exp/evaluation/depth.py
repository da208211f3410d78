"""Which tokens skip layers, on text that is not trained on: how many, how frequent ones, and of what kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.nn.mod.depth import Depth
from ava_exp.tokenizer.tokenizer import Tokenizer

KINDS = ("letters", "digits", "punctuation", "white space", "mixed", "special")
NUM_FREQUENCIES = 5
"""Parts of the text by how frequent its tokens are, each a fifth of it as nearly as whole tokens allow."""

Counts = npt.NDArray[np.int64]


def token_kinds(tokenizer: Tokenizer) -> Counts:
    """Return the kind of every token, (V,): an index into `KINDS`. A space before a word does not count."""
    lengths = tokenizer.token_bytes()
    kinds = [_kind(tokenizer.decode([token])) if lengths[token] else "special" for token in range(len(lengths))]
    return np.array([KINDS.index(kind) for kind in kinds], dtype=np.int64)


def _kind(text: str) -> str:
    word = text.strip()
    if not word:
        return "white space"
    if word.isalpha():
        return "letters"
    if word.isdigit():
        return "digits"
    return "mixed" if any(letter.isalnum() or letter == "\ufffd" for letter in word) else "punctuation"


@dataclass(kw_only=True, slots=True, frozen=True)
class DepthMetrics:
    """What an evaluation saw of the layers that tokens may skip."""

    layers: list[int]
    """The layers that tokens may skip. The lists below have one number for each of them."""
    capacity: float
    """The share of tokens that they are configured to process."""
    usage: list[float]
    """The share of tokens that they processed."""
    predictor_accuracy: list[float]
    """How often the predictor says what the choice of training would be; empty where there is none."""
    skipped_by_kind: dict[str, float]
    """Of the tokens of each kind that the text has, the share of layers that they skipped."""
    skipped_by_frequency: list[float | None]
    """The same of the rarest to the most frequent fifth of the text; None where one token fills several fifths."""

    def record(self) -> dict[str, Any]:
        """Return what the metrics file has of it."""
        record: dict[str, Any] = {
            "mod_capacity": self.capacity,
            "mod_layers": self.layers,
            "processed_share": self.usage,
            "skipped_by_frequency": self.skipped_by_frequency,
        }
        if self.skipped_by_kind:
            record["skipped_by_kind"] = self.skipped_by_kind
        if self.predictor_accuracy:
            record["predictor_accuracy"] = self.predictor_accuracy
        return record


@dataclass(slots=True)
class DepthObserver:
    """Adds up what tokens skip while a model is evaluated. `kinds` (V,) are those of `token_kinds`."""

    kinds: Counts | None = None
    _num_tokens: int = 0
    _processed: list[int] = field(default_factory=list)
    """By layer."""
    _seen_by_token: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """By token, how often it occurs; and how often a layer processed it."""
    _processed_by_token: Counts = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _predicted: list[int] = field(default_factory=list)
    """By layer, tokens of which the predictor was right, of `_num_predicted`."""
    _num_predicted: int = 0

    def add(self, batch: Batch, depths: Sequence[Depth]) -> None:
        """Take one batch as it is read at inference; positions without a label are left out."""
        device = depths[0].token_ids.device
        valid_N = (batch.labels != IGNORED).flatten().to(device)
        ids_N = batch.input_ids.flatten().to(device)
        processed = [depth.token_ids[valid_N[depth.token_ids]] for depth in depths]
        self._num_tokens += int(valid_N.sum())
        self._processed = _added(self._processed, [len(tokens) for tokens in processed])
        self._seen_by_token = _counted(self._seen_by_token, ids_N[valid_N])
        self._processed_by_token = _counted(self._processed_by_token, ids_N[torch.cat(processed)])

    def add_looking_ahead(self, depths: Sequence[Depth]) -> None:
        """Take the same batch with the choice of training, of which the predictor is judged."""
        self._num_predicted += depths[0].num_tokens
        self._predicted = _added(self._predicted, [int(d.num_predicted) for d in depths if d.num_predicted is not None])

    @property
    def has_seen(self) -> bool:
        """Whether there are layers that tokens may skip."""
        return bool(self._processed)

    def take(self, other: DepthObserver) -> None:
        """Add what another one saw of other text."""
        self._num_tokens += other._num_tokens
        self._num_predicted += other._num_predicted
        self._processed = _added(self._processed, other._processed)
        self._predicted = _added(self._predicted, other._predicted)
        self._seen_by_token = _sum(self._seen_by_token, other._seen_by_token)
        self._processed_by_token = _sum(self._processed_by_token, other._processed_by_token)

    def metrics(self, layers: Sequence[int], capacity: float) -> DepthMetrics | None:
        """Return the figures, of the layers that tokens may skip; None where there are none."""
        if not self.has_seen:
            return None
        return DepthMetrics(
            layers=list(layers),
            capacity=capacity,
            usage=[number / max(1, self._num_tokens) for number in self._processed],
            predictor_accuracy=[number / max(1, self._num_predicted) for number in self._predicted],
            skipped_by_kind=self._by_kind(),
            skipped_by_frequency=self._by_frequency(),
        )

    def _by_kind(self) -> dict[str, float]:
        if self.kinds is None:
            return {}
        shares = {
            name: self._skipped(self.kinds[: len(self._seen_by_token)] == number) for number, name in enumerate(KINDS)
        }
        return {name: share for name, share in shares.items() if share is not None}

    def _by_frequency(self) -> list[float | None]:
        order = np.argsort(self._seen_by_token, kind="stable")
        ordered = self._seen_by_token[order]
        middles = (np.cumsum(ordered) - ordered / 2) / max(1, ordered.sum())
        parts = np.empty(len(order), dtype=np.int64)
        parts[order] = np.minimum((middles * NUM_FREQUENCIES).astype(np.int64), NUM_FREQUENCIES - 1)
        return [self._skipped(parts == part) for part in range(NUM_FREQUENCIES)]

    def _skipped(self, tokens_V: npt.NDArray[np.bool_]) -> float | None:
        tokens_V = np.pad(tokens_V, (0, len(self._seen_by_token) - len(tokens_V)))
        visits = int(self._seen_by_token[tokens_V].sum()) * len(self._processed)
        processed = int(self._processed_by_token[: len(tokens_V)][tokens_V[: len(self._processed_by_token)]].sum())
        return 1 - processed / visits if visits else None


def _added(sums: list[int], numbers: list[int]) -> list[int]:
    return [one + other for one, other in zip(sums, numbers, strict=True)] if sums and numbers else sums or numbers


def _counted(counts_V: Counts, ids: Tensor) -> Counts:
    """Add up how often each token occurs; the result is as long as the largest id asks for."""
    return _sum(counts_V, torch.bincount(ids).cpu().numpy())


def _sum(counts_V: Counts, more: Counts) -> Counts:
    size = max(len(counts_V), len(more))
    total: Counts = np.pad(counts_V, (0, size - len(counts_V))) + np.pad(more, (0, size - len(more)))
    return total
