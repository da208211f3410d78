"""A training with the losses against repetition, beside one without."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.loss import LossConfig
from ava_exp.config.model import DenseConfig, ModelConfig
from ava_exp.config.options import read_option
from ava_exp.data.loader import Batch
from ava_exp.losses.head import Measure
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.optim.update import Updater
from ava_exp.training.step import train_step

VOCABULARY, NUM_STEPS = 24, 60
REPEATED = 0.4
"""How often the text says a token twice; the other tokens are drawn anew."""


def stuttering_text(seed: int, num_sequences: int = 16, length: int = 33) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (num_sequences, length), generator=generator)
    again = torch.rand(num_sequences, length, generator=generator) < REPEATED
    for t in range(1, length):
        ids[:, t] = ids[:, t - 1].where(again[:, t], ids[:, t])
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], sample_ids=np.arange(num_sequences))


@functools.cache
def trained(option: str) -> tuple[Decoder, dict[str, float]]:
    """Return a model trained with an option of `loss`, and the terms of its last step."""
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    model = build_model(Architecture(config)).train()
    optimizer: Any = lambda groups: torch.optim.AdamW(groups, lr=1e-2)  # noqa: E731
    updater = Updater(model, optimizer, weight_decay=0.0, master_weights=False)
    terms = build_losses(DenseConfig(), read_option("loss", option, LossConfig))
    for step in range(NUM_STEPS):
        halves = [stuttering_text(2 * step, 8), stuttering_text(2 * step + 1, 8)]
        metrics = train_step(
            model,
            updater,
            halves,
            terms,
            learning_rate=1e-2,
            max_norm=1.0,
            device=torch.device("cpu"),
            backward=torch.Tensor.backward,
        )
        assert metrics.applied
    return model.eval(), metrics.losses


@torch.no_grad()
def held_out(model: Decoder) -> tuple[float, dict[str, float]]:
    """Return the probability of repeating the token just read, and the terms, of text that was not trained on."""
    batch = stuttering_text(10**6)
    output = model(batch.input_ids)
    probabilities: Tensor = output.logits.softmax(dim=-1).gather(2, batch.input_ids[:, :, None])
    terms = build_losses(DenseConfig(), read_option("loss", "anti_repetition", LossConfig))
    weighted = [(term, 1.0) for term in terms]
    context = StepContext(num_tokens=batch.labels.numel(), input_ids=batch.input_ids, terms=weighted)
    return float(probabilities.mean()), {term.name: float(term(output, batch.labels, context)) for term in terms}


def test_repetition_falls_and_the_rewards_rise() -> None:
    (plain, _), (against, _) = (trained(option) for option in ("cross_entropy", "anti_repetition"))
    probability, values = held_out(plain)
    less, better = held_out(against)
    assert probability == pytest.approx(REPEATED, abs=0.06)
    assert less < 0.6 * probability
    assert better[Measure.immediate_repetition.value] < 0.5 * values[Measure.immediate_repetition.value]
    assert better[Measure.entropy.value] > values[Measure.entropy.value]
    assert better["loss"] > values["loss"]  # it is not what was minimised


def test_terms_are_reported_by_name_and_unweighted() -> None:
    _, plain = trained("cross_entropy")
    model, losses = trained("anti_repetition")
    assert [*plain] == ["loss"]
    names = ("immediate_repetition_loss", "repetition_loss", "output_entropy", "output_diversity")
    assert [*losses] == ["loss", *names]
    _, measured = held_out(model)
    for name in losses:
        assert losses[name] == pytest.approx(measured[name], rel=0.15, abs=0.02), name
