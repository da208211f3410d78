"""One step over micro-batches: routers' gradients add up, and what they learn beside gradients waits for the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import MoEConfig
from ava_exp.config.router import (
    BalanceScope,
    DeepSeekRouterConfig,
    ExpertChoiceRouterConfig,
    RouterConfig,
    TopKRouterConfig,
)
from ava_exp.data.loader import Batch
from ava_exp.losses.balance import load_balancing_loss
from ava_exp.losses.terms import build_losses
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.optim.update import Updater
from ava_exp.training.step import StepMetrics, train_step
from tests.unit.nn.routing_cases import model_config, moe_config, some_ids


def batch_of(rows: slice) -> Batch:
    ids = some_ids(4, 13)[rows]
    return Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], sample_ids=np.arange(len(ids)))


WHOLE, HALVES = [batch_of(slice(0, 4))], [batch_of(slice(0, 2)), batch_of(slice(2, 4))]


class KeepsGradients(Updater):
    """Does not update; a step then counts as applied or not, as it is told."""

    applied = True

    def apply(self, learning_rate: float, max_norm: float) -> tuple[float, bool]:
        return 1.0, self.applied


def step(router: RouterConfig, batches: list[Batch], applied: bool = True) -> tuple[Decoder, StepMetrics]:
    sparsity: MoEConfig = moe_config(router)
    model = build_model(Architecture(model_config(initializer_range=0.3), GroupedAttentionConfig(), sparsity))
    optimizer: Any = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    updater = KeepsGradients(model, optimizer, weight_decay=0.0, master_weights=False)
    updater.applied = applied
    metrics = train_step(
        model,
        updater,
        batches,
        build_losses(sparsity),
        learning_rate=1.0,
        max_norm=1.0,
        device=torch.device("cpu"),
        backward=torch.Tensor.backward,
    )
    return model, metrics


def gradients(model: Decoder) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_do_not_depend_on_how_the_step_is_cut() -> None:
    router = TopKRouterConfig(load_balancing_weight=0.0, router_z_loss_weight=0.5)
    whole, halves = (step(router, batches) for batches in (WHOLE, HALVES))
    for one, two in zip(gradients(whole[0]), gradients(halves[0]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert len(gradients(whole[0])) == len(list(whole[0].parameters()))
    for name in ("loss", "router_z_loss"):
        assert whole[1].losses[name] == pytest.approx(halves[1].losses[name], rel=1e-5)
    assert whole[1].tally.visits() == halves[1].tally.visits()


@pytest.mark.parametrize("scope", list(BalanceScope))
def test_the_balance_loss_takes_loads_over_its_scope(scope: BalanceScope) -> None:
    router = TopKRouterConfig(balance_over=scope, load_balancing_weight=1.0)
    model, metrics = step(router, HALVES)
    expected, seen = 0.0, [torch.zeros(8, dtype=torch.int64) for _ in model.moe_layers()]
    for batch in HALVES:
        for layer, routing in enumerate(model(batch.input_ids).routings):
            seen[layer] = seen[layer] + routing.chosen_counts
            counts = seen[layer] if scope is BalanceScope.step else routing.chosen_counts
            expected += load_balancing_loss(routing.probabilities, counts).item() / 4
    assert metrics.losses["load_balancing_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_scopes_differ_in_the_router_only() -> None:
    micro_batch, whole = (
        step(TopKRouterConfig(balance_over=scope, load_balancing_weight=1.0), HALVES)[0] for scope in BalanceScope
    )
    (name,) = {n.rpartition("router.")[2] for n, _ in micro_batch.named_parameters() if "router" in n}
    assert name == "weight"
    router = micro_batch.moe_layers()[-1].router.weight.grad
    other = whole.moe_layers()[-1].router.weight.grad
    assert router is not None and other is not None and not torch.allclose(router, other)


@pytest.mark.parametrize("router", [DeepSeekRouterConfig(), ExpertChoiceRouterConfig()])
def test_routers_learn_when_a_step_was_applied_and_from_the_whole_of_it(router: RouterConfig) -> None:
    refused, _ = step(router, HALVES, applied=False)
    assert not any(buffer.any() for layer in refused.moe_layers() for buffer in layer.router.buffers())
    model, metrics = step(router, HALVES)
    for layer, tally in zip(model.moe_layers(), metrics.tally.layers, strict=True):
        buffers = dict(layer.router.named_buffers())
        if isinstance(router, DeepSeekRouterConfig):
            load = tally.chosen_counts.float()
            assert load.sum() == 2 * 4 * 12
            torch.testing.assert_close(buffers["bias"], 1e-3 * (load.mean() - load).sign())
        else:
            assert tally.observed is not None and buffers["num_updates"] == 1
            torch.testing.assert_close(buffers["threshold"], tally.observed / 2)
