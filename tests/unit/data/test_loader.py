"""What a step reads depends on seed and step alone; evaluation reads everything once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ava_exp.data.loader import IGNORED, BatchLoader, EvaluationLoader
from ava_exp.data.shards import ShardWriter, TokenDataset
from ava_exp.errors import DataError

MakeDataset = Callable[[int], TokenDataset]


@pytest.fixture
def counting(tmp_path: Path) -> MakeDataset:
    """Make a data set whose token at position p is p, in shards of 50 tokens, and whose last token ends it."""

    def make(num_tokens: int) -> TokenDataset:
        writer = ShardWriter(tmp_path, vocab_size=10_000, end_of_document_id=num_tokens - 1, shard_tokens=50)
        writer.add(np.arange(num_tokens - 1, dtype=np.uint32))
        writer.finish(split="train", source_fingerprint="", tokenizer_fingerprint="")
        return TokenDataset.open(tmp_path)

    return make


def global_samples(dataset: TokenDataset, step: int, ranks: int, accumulation: int, batch: int) -> list[int]:
    loaders = [BatchLoader(dataset, 8, batch, accumulation, 3, rank, ranks) for rank in range(ranks)]
    return sorted(itertools.chain.from_iterable(loader.sample_ids(step).ravel().tolist() for loader in loaders))


def test_a_sample_is_its_tokens_and_labels_are_the_next_ones(counting: MakeDataset) -> None:
    loader = BatchLoader(counting(1001), 8, 4, 2, seed=0)
    assert loader.num_samples == 125
    batches = loader.micro_batches(0)
    assert len(batches) == 2
    for batch in batches:
        assert batch.input_ids.shape == batch.labels.shape == (4, 8)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        starts = torch.from_numpy(batch.sample_ids * 8)
        assert torch.equal(batch.input_ids, starts[:, None] + torch.arange(8))
        assert torch.equal(batch.labels, batch.input_ids + 1)


@pytest.mark.parametrize(("accumulation", "num_ranks", "batch_size"), [(1, 1, 12), (3, 2, 2), (1, 4, 3), (6, 1, 2)])
def test_a_step_has_the_same_samples_however_they_are_shared(
    counting: MakeDataset, accumulation: int, num_ranks: int, batch_size: int
) -> None:
    data, expected = counting(801), BatchLoader(counting(801), 8, 12, 1, seed=3).samples_of_all_ranks(7)
    loaders = [BatchLoader(data, 8, batch_size, accumulation, 3, rank, num_ranks) for rank in range(num_ranks)]
    assert all(np.array_equal(loader.samples_of_all_ranks(7), expected) for loader in loaders)
    own = np.stack([loader.sample_ids(7) for loader in loaders], axis=1)
    assert np.array_equal(own.ravel(), expected)


def test_an_epoch_reads_every_sample_once_and_the_next_in_another_order(counting: MakeDataset) -> None:
    loader = BatchLoader(counting(801), 8, 5, 2, seed=0)
    assert (loader.num_samples, loader.global_batch_size, loader.steps_per_epoch) == (100, 10, 10.0)
    epochs = [
        [int(sample) for step in range(first, first + 10) for sample in loader.sample_ids(step).ravel()]
        for first in (0, 10)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("num_samples", [1, 2, 7, 30])
def test_a_batch_may_straddle_epochs(counting: MakeDataset, num_samples: int) -> None:
    loader = BatchLoader(counting(8 * num_samples + 1), 8, 12, 1, seed=1)
    samples = np.concatenate([loader.sample_ids(step).ravel() for step in range(num_samples)])
    assert loader.steps_per_epoch == num_samples / 12
    assert np.bincount(samples).tolist() == [12] * num_samples  # 12 epochs


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (3, 4), (4, 3), (12, 1), (1, 12), (6, 1)])
def test_the_samples_of_a_step_do_not_depend_on_how_they_are_shared(
    counting: MakeDataset, ranks: int, accumulation: int
) -> None:
    dataset = counting(8 * 50 + 5)
    for step in range(6):  # 12 of 50 samples a step: the fifth straddles two epochs
        alone = global_samples(dataset, step, 1, 1, 12)
        assert global_samples(dataset, step, ranks, accumulation, 12 // (ranks * accumulation)) == alone


def test_a_step_is_the_same_whatever_was_read_before(counting: MakeDataset) -> None:
    dataset = counting(1000)
    warm = BatchLoader(dataset, 8, 2, 1, seed=5)
    for step in range(9):
        warm.micro_batches(step)
    cold = BatchLoader(dataset, 8, 2, 1, seed=5).micro_batches(9)[0]
    again = warm.micro_batches(9)[0]
    assert torch.equal(cold.input_ids, again.input_ids)
    assert cold.sample_ids.tolist() == again.sample_ids.tolist()


def test_seeds_give_different_orders(counting: MakeDataset) -> None:
    dataset = counting(1000)
    orders = {tuple(BatchLoader(dataset, 8, 20, 1, seed).sample_ids(0).ravel().tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_too_few_tokens_for_a_sequence_are_refused(counting: MakeDataset) -> None:
    assert BatchLoader(counting(9), 8, 1, 1, seed=0).num_samples == 1
    with pytest.raises(DataError, match=r"9 tokens, too few.*`data.sequence_length` must be below that, but is 9"):
        BatchLoader(counting(9), 9, 1, 1, seed=0)


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 100, 101])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_evaluation_predicts_every_token_after_the_first_once(
    counting: MakeDataset, num_tokens: int, num_ranks: int
) -> None:
    dataset = counting(num_tokens)
    loaders = [EvaluationLoader(dataset, 8, 2, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    batches = [list(loader) for loader in loaders]
    assert all(len(loader) == len(own) for loader, own in zip(loaders, batches, strict=True))
    assert {loader.most_batches for loader in loaders} == {max(map(len, batches))}
    predicted: list[int] = []
    for batch in itertools.chain.from_iterable(batches):
        valid = batch.labels != IGNORED
        predicted += batch.labels[valid].tolist()
        assert torch.equal(batch.labels[valid], batch.input_ids[valid] + 1)
        assert bool(valid.any(dim=1).all())
    assert sorted(predicted) == list(range(1, num_tokens))


def test_a_bounded_evaluation_takes_windows_from_all_over(counting: MakeDataset) -> None:
    dataset = counting(801)
    windows = np.concatenate([batch.sample_ids for batch in EvaluationLoader(dataset, 8, 3, max_tokens=80)])
    assert windows.tolist() == list(range(0, 100, 10))
    assert sum(len(batch.sample_ids) for batch in EvaluationLoader(dataset, 8, 3, max_tokens=1)) == 1
    assert sum(len(batch.sample_ids) for batch in EvaluationLoader(dataset, 8, 3, max_tokens=10**9)) == 100


def test_every_evaluated_token_knows_its_source(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=100, end_of_document_id=0)
    for length, source in ((9, "a"), (4, "b"), (12, "a")):
        writer.add(np.ones(length, dtype=np.uint32), source)
    writer.finish(split="validation", source_fingerprint="", tokenizer_fingerprint="")
    dataset = TokenDataset.open(tmp_path)
    found = torch.cat([batch.source_ids[batch.labels != IGNORED] for batch in EvaluationLoader(dataset, 8, 2)])  # type: ignore[index]
    assert found.tolist() == [0] * 10 + [1] * 5 + [0] * 12, "of inputs: all tokens but the last"


def test_nothing_to_predict_is_refused(counting: MakeDataset) -> None:
    with pytest.raises(DataError, match="none to predict"):
        EvaluationLoader(counting(1), 8, 1)


def test_documents_are_numbered_in_every_batch_that_masks_them(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=100, end_of_document_id=99, shard_tokens=50)
    for length in (5, 2, 9, 1, 4, 12):
        writer.add(np.arange(length, dtype=np.uint32))
    writer.finish(split="train", source_fingerprint="", tokenizer_fingerprint="")
    dataset = TokenDataset.open(tmp_path)
    training = BatchLoader(dataset, 8, 2, 1, 0, mask_documents=True)
    batches = [*training.micro_batches(0), *training.micro_batches(1)]
    batches += EvaluationLoader(dataset, 8, 2, mask_documents=True)
    for batch in batches:
        assert batch.documents is not None
        for sample, documents, ids in zip(batch.sample_ids, batch.documents, batch.input_ids, strict=True):
            real = range(min(8, dataset.num_tokens - 1 - int(sample) * 8))
            of_text = [dataset.document_of(int(sample) * 8 + t) for t in real]
            assert documents[: len(real)].tolist() == [number - of_text[0] for number in of_text]
            assert int(documents.max()) <= int((ids == 99).sum())
    assert all(batch.documents is None for batch in BatchLoader(dataset, 8, 2, 1, 0).micro_batches(0))
    assert all(batch.documents is None for batch in EvaluationLoader(dataset, 8, 2))
