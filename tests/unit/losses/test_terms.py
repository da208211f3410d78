"""Loss terms against direct computations, and their independence of how a step is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ava_exp.config.model import DenseConfig, MoEConfig, TopKRouterConfig
from ava_exp.data.loader import IGNORED
from ava_exp.losses.terms import CrossEntropy, RouterLoss, build_losses
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.output import ModelOutput


def output_of(batch: int, length: int) -> ModelOutput:
    generator = torch.Generator().manual_seed(0)
    return ModelOutput(
        torch.randn(batch, length, 5, generator=generator), torch.randn(17, 5, generator=generator), routings=[]
    )


def test_shares_of_micro_batches_add_up_to_the_mean() -> None:
    output = output_of(4, 6)
    labels = torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(1))
    labels[:, ::5] = IGNORED
    whole = CrossEntropy()(output, labels, 20)
    parts = [
        CrossEntropy()(ModelOutput(output.hidden[i : i + 1], output.head), labels[i : i + 1], 20) for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    logits = output.logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / 20
    torch.testing.assert_close(whole, expected)


def test_router_loss_is_the_mean_over_layers_times_the_share_of_tokens() -> None:
    empty = torch.zeros(0)
    routings = [Routing(empty, empty, empty, {"router_z_loss": torch.tensor(value)}) for value in (1.0, 3.0)]
    labels = torch.zeros(2, 5, dtype=torch.long)
    value = RouterLoss("router_z_loss", 0.5)(ModelOutput(torch.zeros(2, 5, 3), torch.zeros(7, 3), routings), labels, 40)
    assert value.item() == pytest.approx(2.0 * 10 / 40)


def test_terms_and_weights_follow_the_sparsity() -> None:
    sparse = MoEConfig(router=TopKRouterConfig(), load_balancing_weight=0.12, router_z_loss_weight=0.5)
    terms = {term.name: term.weight for term in build_losses(sparse)}
    assert terms == {"loss": 1.0, "load_balancing_loss": 0.12, "router_z_loss": 0.5}
    assert [term.name for term in build_losses(DenseConfig())] == ["loss"]
