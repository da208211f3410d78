"""Loss terms against direct computations, and their independence of how a step is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ava_exp.losses.cross_entropy as module
from ava_exp.config.model import DenseConfig, MoEConfig, TopKRouterConfig
from ava_exp.data.loader import IGNORED
from ava_exp.losses.cross_entropy import cross_entropy
from ava_exp.losses.terms import CrossEntropy, RouterLoss, build_losses
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.output import ModelOutput


def some_logits(rows: int = 30, vocabulary: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::7] = IGNORED
    return 3 * torch.randn(rows, vocabulary, generator=generator), labels


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("slice_values", [17, 100, 10_000])
def test_cross_entropy_and_its_gradient_equal_torch(
    slice_values: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_VALUES", slice_values)
    logits, labels = some_logits()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = cross_entropy(ours, labels)
    expected = F.cross_entropy(theirs, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(value, expected)
    (value * factor).backward()
    (expected * factor).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_cross_entropy_gradcheck() -> None:
    logits, labels = some_logits(6, 5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, 3.0), logits.double().requires_grad_())


def test_cross_entropy_of_bf16_logits_is_summed_in_fp32() -> None:
    logits, labels = some_logits()
    value = cross_entropy(logits.bfloat16(), labels)
    expected = F.cross_entropy(logits.bfloat16().float(), labels, ignore_index=IGNORED, reduction="sum")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_shares_of_micro_batches_add_up_to_the_mean() -> None:
    logits, labels = some_logits(24)
    whole = CrossEntropy()(ModelOutput(logits.view(4, 6, -1)), labels.view(4, 6), 20)
    parts = [
        CrossEntropy()(ModelOutput(logits.view(4, 6, -1)[i : i + 1]), labels.view(4, 6)[i : i + 1], 20)
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_router_loss_is_the_mean_over_layers_times_the_share_of_tokens() -> None:
    empty = torch.zeros(0)
    routings = [Routing(empty, empty, empty, {"router_z_loss": torch.tensor(value)}) for value in (1.0, 3.0)]
    labels = torch.zeros(2, 5, dtype=torch.long)
    value = RouterLoss("router_z_loss", 0.5)(ModelOutput(torch.zeros(2, 5, 3), routings), labels, 40)
    assert value.item() == pytest.approx(2.0 * 10 / 40)


def test_terms_and_weights_follow_the_sparsity() -> None:
    sparse = MoEConfig(router=TopKRouterConfig(), load_balancing_weight=0.12, router_z_loss_weight=0.5)
    terms = {term.name: term.weight for term in build_losses(sparse)}
    assert terms == {"loss": 1.0, "load_balancing_loss": 0.12, "router_z_loss": 0.5}
    assert [term.name for term in build_losses(DenseConfig())] == ["loss"]
