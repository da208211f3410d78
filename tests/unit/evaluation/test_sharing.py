"""Ranks that share the text of an evaluation find what one process finds, also where some have nothing to read."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ava_exp.config.compose import compose
from ava_exp.data.loader import EvaluationLoader
from ava_exp.data.shards import ShardWriter, TokenDataset
from ava_exp.evaluation.depth import DepthObserver
from ava_exp.evaluation.language import LanguageMetrics, evaluate_language
from ava_exp.evaluation.routing import RoutingObserver, choose_probe
from ava_exp.models.decoder import Decoder, build_model

LENGTH, VOCABULARY = 8, 40
TINY = (
    "~local",
    f"model.vocab_size={VOCABULARY}",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.num_experts=4",
)
KINDS = {
    "experts": ("sparsity=moe", "prediction=multi_token"),
    "depth": ("sparsity=moe", "mod=learned", "mod.layers=alternating"),
}


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    writer = ShardWriter(tmp_path, vocab_size=VOCABULARY, end_of_document_id=0)
    generator = np.random.default_rng(0)
    for number in range(4):
        writer.add(generator.integers(1, VOCABULARY, 10, dtype=np.uint32), "ab"[number % 2])
    writer.finish(split="validation", source_fingerprint="", tokenizer_fingerprint="")
    return TokenDataset.open(tmp_path)


def evaluated(model: Decoder, dataset: TokenDataset, rank: int, num_ranks: int, gather: Any) -> LanguageMetrics:
    batches = EvaluationLoader(dataset, LENGTH, 2, rank=rank, num_ranks=num_ranks)
    observer = RoutingObserver(["a", "b"], choose_probe(batches.windows(None), LENGTH))
    depth = DepthObserver(np.arange(VOCABULARY) % 3)
    device, token_bytes = torch.device("cpu"), np.arange(VOCABULARY) % 5
    return evaluate_language(model, batches, token_bytes, device, observer, depth, gather)


def by_ranks(model: Decoder, dataset: TokenDataset, num_ranks: int) -> list[LanguageMetrics]:
    """Return what each of the ranks finds: once to learn what the others give, and then with that."""
    given: list[bytes] = []

    def noted(value: Any) -> list[Any]:
        given.append(pickle.dumps(value))
        return [value]

    for rank in range(num_ranks):
        evaluated(model, dataset, rank, num_ranks, noted)
    together: Callable[[Any], list[Any]] = lambda value: [pickle.loads(each) for each in given]  # noqa: E731, S301
    return [evaluated(model, dataset, rank, num_ranks, together) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_find_together_what_one_process_finds(dataset: TokenDataset, kind: str, num_ranks: int) -> None:
    """There are six windows: of eight ranks two have none."""
    model = build_model(compose([*TINY, *KINDS[kind]]).architecture)
    alone = plain(evaluated(model, dataset, 0, 1, lambda value: [value]))
    assert alone["tokens"] == dataset.num_tokens - 1
    found = [plain(each) for each in by_ranks(model, dataset, num_ranks)]
    assert all(each == found[0] for each in found), "all ranks know the same"
    for (key, value), (expected_key, expected) in zip(flat(found[0]), flat(alone), strict=True):
        assert key == expected_key
        assert value == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected), key


def plain(metrics: LanguageMetrics) -> dict[str, Any]:
    values = dataclasses.asdict(metrics)
    del values["seconds"]
    if values["routing"] is not None and values["routing"]["choices"] is not None:
        choices = values["routing"]["choices"]
        values["routing"]["choices"] = [choices["windows"].tolist(), *(ids.tolist() for ids in choices["expert_ids"])]
    return values


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(each, f"{key}.{name}")
    else:
        yield key, value
