"""Language metrics against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ava_exp.config.architecture import Architecture
from ava_exp.config.model import ModelConfig
from ava_exp.config.prediction import MultiTokenConfig
from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.language import evaluate_language
from ava_exp.models.decoder import build_model
from ava_exp.nn.output import ModelOutput


class Fixed(nn.Module):
    """Says of every token what `table` says, whatever came before."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor) -> ModelOutput:
        return ModelOutput(self.table[ids], torch.eye(self.table.shape[1]))


def batch(inputs: list[int], labels: list[int]) -> Batch:
    return Batch(
        input_ids=torch.tensor([inputs]), labels=torch.tensor([labels]), sample_ids=np.zeros(1, dtype=np.int64)
    )


def test_against_a_direct_computation() -> None:
    table = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0], [3.0, 0.0, 0.0]])
    model = Fixed(table)
    batches = [batch([0, 1], [1, 2]), batch([2, 0], [2, IGNORED])]
    metrics = evaluate_language(model, batches, np.array([0, 2, 3]), torch.device("cpu"))  # type: ignore[arg-type]
    log_p = table.log_softmax(dim=-1)
    nats = -(log_p[0, 1] + log_p[1, 2] + log_p[2, 2]).item()
    assert metrics.tokens == 3
    assert metrics.bytes == 2 + 3 + 3
    assert metrics.loss == pytest.approx(nats / 3)
    assert metrics.perplexity == pytest.approx(math.exp(nats / 3))
    assert metrics.bits_per_byte == pytest.approx(nats / math.log(2) / 8)
    assert metrics.token_accuracy == pytest.approx(2 / 3)


def test_the_mode_of_the_model_is_put_back() -> None:
    model = Fixed(torch.eye(3)).train()
    evaluate_language(model, [batch([0], [1])], np.ones(3), torch.device("cpu"))  # type: ignore[arg-type]
    assert model.training


def test_prediction_heads_against_a_direct_computation() -> None:
    """Heads that are often right: the text has three tokens only, and some labels are left out."""
    sizes = ModelConfig(vocab_size=3, hidden_size=8, num_layers=1, num_heads=2, initializer_range=0.5)
    model = build_model(Architecture(sizes, prediction=MultiTokenConfig(num_prediction_heads=2)), seed=2).eval()
    ids = torch.randint(0, 3, (4, 31), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, 5:9] = labels[3, 20:] = IGNORED
    batches = [
        Batch(input_ids=ids[rows, :-1], labels=labels[rows], sample_ids=np.zeros(2, dtype=np.int64))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    found = evaluate_language(model, batches, np.ones(3), torch.device("cpu")).future
    output = model(ids[:, :-1])
    best = [(state @ output.head.T).argmax(dim=-1) for state in (output.hidden, *output.future)]
    for j in (1, 2):
        valid = hits = consulted = right = 0
        for row in range(4):
            for t in range(30 - j):
                is_hit = [int(best[i][row, t]) == int(labels[row, t + i]) for i in range(j + 1)]
                if labels[row, t + j] != IGNORED:
                    valid, hits = valid + 1, hits + is_hit[j]
                    consulted, right = consulted + all(is_hit[:j]), right + all(is_hit)
        assert 0 < right < consulted < valid
        assert found[j - 1].accuracy == pytest.approx(hits / valid)
        assert found[j - 1].acceptance == pytest.approx(right / consulted)
