"""Language metrics against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation.language import evaluate_language
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
