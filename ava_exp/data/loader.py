"""Batches for training and evaluation, read from memory-mapped shards.

There are no worker processes: slicing a mapped file takes microseconds a sample, and without them nothing can die,
repeat a sample or lose one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ava_exp.data.order import permute
from ava_exp.data.shards import TokenDataset
from ava_exp.errors import DataError

IGNORED = -100
"""The label of a position that no loss counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B sequences of T tokens."""

    input_ids: Tensor
    """Shape (B, T), int64."""
    labels: Tensor
    """Shape (B, T), int64: the token that follows each input, or `IGNORED`."""
    sample_ids: npt.NDArray[np.int64]
    """Shape (B,): which sample, or evaluation window, each row is; -1 for a row without any."""
    source_ids: Tensor | None = None
    """Shape (B, T), int64: for evaluation, which of the data set's `sources` each input is from."""
    documents: Tensor | None = None
    """Shape (B, T), int64: documents of a sequence, numbered from 0; None where tokens see all that comes before."""

    def masks_on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the keywords by which a decoder is told what tokens do not see: `documents_BT`, or none."""
        return {} if self.documents is None else {"documents_BT": self.documents.to(device, non_blocking=True)}


def number_documents(input_ids_BT: Tensor, end_of_document_id: int) -> Tensor:
    """Return which document of its sequence each token belongs to, (B, T) int64; the token that ends one does, too."""
    ends = (input_ids_BT == end_of_document_id).long()
    return ends.cumsum(dim=1) - ends


class BatchLoader:
    """Training batches; what a step reads is a function of (seed, step) alone.

    Sample i is the tokens i * T to i * T + T, both included: T inputs, T labels. Every epoch reads every sample once
    in an order of its own, and a batch may straddle two epochs. The samples of a step depend on the global batch,
    not on how ranks, accumulation and micro-batches share it.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        batch_size: int,
        gradient_accumulation_steps: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        mask_documents: bool = False,
    ) -> None:
        """`batch_size` counts the sequences of a micro-batch on one rank. Raises `DataError` for too few tokens."""
        self.dataset = dataset
        self.mask_documents = mask_documents
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.num_samples = (dataset.num_tokens - 1) // sequence_length
        if self.num_samples < 1:
            raise DataError(
                f"The training split has {dataset.num_tokens} tokens, too few for one sequence: "
                f"`data.sequence_length` must be below that, but is {sequence_length} instead."
            )

    @property
    def global_batch_size(self) -> int:
        """Sequences that all ranks read in one step."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_ranks

    @property
    def steps_per_epoch(self) -> float:
        return self.num_samples / self.global_batch_size

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's `gradient_accumulation_steps` batches of a step, counted from 0."""
        return [self._batch(samples) for samples in self.sample_ids(step)]

    def sample_ids(self, step: int) -> npt.NDArray[np.int64]:
        """Return the samples of this rank's batches, shape (gradient_accumulation_steps, batch_size)."""
        shape = (self.gradient_accumulation_steps, self.num_ranks, self.batch_size)
        return self._samples_at(self._positions(step).reshape(shape)[:, self.rank])

    def samples_of_all_ranks(self, step: int) -> npt.NDArray[np.int64]:
        """Return all samples of a step, shape (global_batch_size,): the same however ranks and micro-batches share."""
        return self._samples_at(self._positions(step))

    def _positions(self, step: int) -> npt.NDArray[np.int64]:
        return step * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)

    def _samples_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, indices = np.divmod(positions, self.num_samples)
        samples = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = permute(indices[chosen], self.num_samples, key=(self.seed, int(epoch)))
        return samples

    def _batch(self, samples: npt.NDArray[np.int64]) -> Batch:
        length = self.sequence_length
        rows = [self.dataset.tokens(start, start + length + 1) for start in (samples * length).tolist()]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        input_ids = tokens[:, :-1].contiguous()
        return Batch(
            input_ids=input_ids,
            labels=tokens[:, 1:].contiguous(),
            sample_ids=samples.copy(),
            documents=_documents(input_ids, self.dataset) if self.mask_documents else None,
        )


class EvaluationLoader:
    """Evaluation batches in the order of the text: every token after the first is a label exactly once.

    With `max_tokens`, as many whole windows as fit, spread evenly. Of several ranks each gets every `num_ranks`-th
    window, and the last ones may get one less, or none.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        batch_size: int,
        max_tokens: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        mask_documents: bool = False,
    ) -> None:
        """Raises `DataError` for a split without a token to predict."""
        if dataset.num_tokens < 2:
            raise DataError("The validation split has a single token, and none to predict: give more text.")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.mask_documents = mask_documents
        windows = self.windows(max_tokens)
        self._own_windows = windows[rank::num_ranks]
        self.most_batches = math.ceil(math.ceil(len(windows) / num_ranks) / batch_size)
        """That any rank has."""

    def __len__(self) -> int:
        """Number of this rank's batches."""
        return math.ceil(len(self._own_windows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._own_windows), self.batch_size):
            yield self._batch(self._own_windows[start : start + self.batch_size])

    def windows(self, max_tokens: int | None) -> npt.NDArray[np.int64]:
        """Return the numbers of the windows that all ranks together read of at most `max_tokens`."""
        available = -(-(self.dataset.num_tokens - 1) // self.sequence_length)
        wanted = available if max_tokens is None else min(available, max(1, max_tokens // self.sequence_length))
        return np.arange(wanted, dtype=np.int64) * available // wanted

    def _batch(self, windows: npt.NDArray[np.int64]) -> Batch:
        shape = (len(windows), self.sequence_length)
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
        source_ids = torch.zeros(shape, dtype=torch.int64)
        for row, window in enumerate(windows.tolist()):
            start = window * self.sequence_length
            stop = min(start + self.sequence_length + 1, self.dataset.num_tokens)
            tokens = torch.from_numpy(self.dataset.tokens(start, stop).astype(np.int64))
            input_ids[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
            source_ids[row, : len(tokens) - 1] = torch.from_numpy(self.dataset.source_ids(start, stop - 1))
        return Batch(
            input_ids=input_ids,
            labels=labels,
            sample_ids=windows.copy(),
            source_ids=source_ids,
            documents=_documents(input_ids, self.dataset) if self.mask_documents else None,
        )


def _documents(input_ids_BT: Tensor, dataset: TokenDataset) -> Tensor:
    return number_documents(input_ids_BT, dataset.manifest.end_of_document_id)
