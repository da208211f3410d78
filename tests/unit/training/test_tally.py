"""What is counted of a step's routers: each visit once, however the step is cut and whatever is computed twice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.base import ComponentConfig
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    SinkhornRouterConfig,
    SoftRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)
from ava_exp.config.training import AdamWConfig, ConstantConfig
from ava_exp.data.loader import Batch
from ava_exp.losses.terms import build_losses
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.nn.moe.routing import Routing, count_visits
from ava_exp.optim.update import Updater
from ava_exp.training.loop import Record, Trainer
from ava_exp.training.step import train_step
from ava_exp.training.tally import ExpertTally, LayerVisits

DIMENSIONS = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=32)
ROUTERS = (
    TopKRouterConfig,
    SwitchRouterConfig,
    ExpertChoiceRouterConfig,
    SoftRouterConfig,
    SinkhornRouterConfig,
    DeepSeekRouterConfig,
    TwoStageRouterConfig,
    DynamicRouterConfig,
    HierarchicalRouterConfig,
)


def routing_of(expert_ids: list[list[int]], chosen: list[list[int]], num_experts: int) -> Routing:
    ids, probabilities = torch.tensor(expert_ids), torch.full((len(expert_ids), num_experts), 1 / num_experts)
    return Routing(
        expert_ids=ids,
        weights=(ids >= 0).float(),
        counts=count_visits(ids, num_experts),
        chosen_counts=count_visits(torch.tensor(chosen), num_experts),
        affinities=probabilities,
        probabilities=probabilities,
        preferences=probabilities,
    )


def test_statistics_by_hand_over_layers_of_different_sizes() -> None:
    tally = ExpertTally()
    tally.add([routing_of([[0, 1], [0, -1]], [[0, 1], [0, 2]], 4), routing_of([[1], [1]], [[1], [1]], 2)])
    tally.add([routing_of([[0, 3], [0, 1]], [[0, 3], [0, 1]], 4), routing_of([[1], [0]], [[1], [0]], 2)])
    first, second = tally.visits()
    assert first == LayerVisits(num_tokens=4, by_expert=[4, 2, 0, 1], chosen=8)
    assert second == LayerVisits(num_tokens=4, by_expert=[1, 3], chosen=4)
    assert (first.shares, first.dropped, first.dropped_share, first.per_token) == (
        [4 / 7, 2 / 7, 0, 1 / 7],
        1,
        1 / 8,
        7 / 4,
    )
    statistics = tally.statistics()
    entropy = math.log(4) - 3 / 4 * math.log(3)
    assert statistics["layers"][1] == {
        "per_expert_utilization": [0.25, 0.75],
        "routing_entropy": pytest.approx(entropy),
        "load_balance_loss": pytest.approx(1.0),
        "tokens_dropped": 0,
    }
    assert statistics["aggregate"]["per_expert_utilization"] == [count / 11 for count in (4, 2, 0, 1, 1, 3)]
    assert statistics["aggregate"]["tokens_dropped"] == 1


def test_the_balance_loss_is_that_of_the_whole_step() -> None:
    """E · Σ f · P, with f of what was chosen: 2 · (3/4 · 0.8 + 1/4 · 0.2)."""
    tally = ExpertTally()
    for ids, first in ((0, 0.9), (0, 0.9), (0, 0.9), (1, 0.5)):
        routing = routing_of([[ids]], [[ids]], 2)
        routing.probabilities = torch.tensor([[first, 1 - first]])
        tally.add([routing])
    assert tally.statistics()["layers"][0]["load_balance_loss"] == pytest.approx(2 * (0.75 * 0.8 + 0.25 * 0.2))


def test_a_dense_model_has_none_of_it() -> None:
    tally = ExpertTally()
    tally.add([])
    aggregate = {"per_expert_utilization": [], "routing_entropy": 0, "load_balance_loss": 0, "tokens_dropped": 0}
    assert tally.visits() == [] and tally.statistics() == {"layers": [], "aggregate": aggregate}


def batches(count: int, rows: int) -> list[Batch]:
    tokens = torch.randint(50, (count * rows, 9), generator=torch.Generator().manual_seed(0))
    return [
        Batch(input_ids=part[:, :-1], labels=part[:, 1:].contiguous(), sample_ids=np.zeros(rows, dtype=np.int64))
        for part in tokens.split(rows)
    ]


def tally_of(model: Decoder, sparsity: MoEConfig, micro_batches: list[Batch]) -> ExpertTally:
    optimizer = AdamWConfig()
    updater = Updater(model, lambda groups: optimizer.build(groups=groups), weight_decay=0.0, master_weights=False)
    return train_step(
        model,
        updater,
        micro_batches,
        build_losses(sparsity),
        learning_rate=0.1,
        max_norm=1.0,
        device=torch.device("cpu"),
        backward=torch.Tensor.backward,
    ).tally


def moe(router: Any = None, **settings: Any) -> MoEConfig:
    return MoEConfig(num_experts=4, router=router or TopKRouterConfig(moe_top_k=2), **settings)


def test_accumulation_counts_what_one_big_batch_counts() -> None:
    sparsity = moe()
    model = build_model(Architecture(DIMENSIONS, GroupedAttentionConfig(), sparsity), seed=1)
    whole = tally_of(copy.deepcopy(model), sparsity, batches(1, 8))
    parts = tally_of(copy.deepcopy(model), sparsity, batches(4, 2))
    assert parts.visits() == whole.visits()
    assert parts.visits()[0].total == 8 * 8 * 2
    for one, other in zip(parts.statistics()["layers"], whole.statistics()["layers"], strict=True):
        assert one["load_balance_loss"] == pytest.approx(other["load_balance_loss"], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_recomputed_activations_are_counted_once(reentrant: bool, capacity_factor: float | None) -> None:
    sparsity = moe(capacity_factor=capacity_factor)
    model = build_model(Architecture(DIMENSIONS, GroupedAttentionConfig(), sparsity), seed=1)
    plain = tally_of(copy.deepcopy(model), sparsity, batches(2, 4))
    num_forwards = 0

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal num_forwards
            num_forwards += 1
            return forward(*arguments)

        return lambda *arguments: checkpoint(counted, *arguments, use_reentrant=reentrant)

    for block in model.blocks:
        block.forward = recomputed(block.forward)  # type: ignore[method-assign]
    again = tally_of(model, sparsity, batches(2, 4))
    assert num_forwards == 2 * 2 * 3, "every block ran twice for both micro-batches"
    assert again.visits() == plain.visits()
    assert (plain.visits()[0].dropped > 0) == (capacity_factor is not None)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_routing_and_counting_never_wait_for_the_device(router: type[ComponentConfig]) -> None:
    """On the meta device there are no values: whatever would fetch one raises."""
    built = router().build(dim=16, num_experts=8).to("meta").train()
    tally = ExpertTally()
    for _ in range(2):
        tally.add([built(torch.empty(2, 6, 16, device="meta"))])
    assert tally.layers[0].counts.device.type == "meta"
    for fetch in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            fetch(tally.layers[0].counts.sum())


class Loader:
    def micro_batches(self, step: int) -> list[Batch]:
        return batches(2, 4)

    def samples_of_all_ranks(self, step: int) -> np.ndarray:
        return np.concatenate([batch.sample_ids for batch in self.micro_batches(step)])


def trained(sparsity: MoEConfig | DenseConfig) -> tuple[Trainer, list[Record]]:
    model = build_model(Architecture(DIMENSIONS, GroupedAttentionConfig(), sparsity), seed=1)
    optimizer, records = AdamWConfig(learning_rate=1e-3), list[Record]()
    trainer = Trainer(
        model,
        Loader(),  # type: ignore[arg-type]
        Updater(model, lambda groups: optimizer.build(groups=groups), weight_decay=0.0, master_weights=False),
        ConstantConfig(warmup_steps=0).build(total_steps=2, tokens_per_step=64),
        build_losses(sparsity),
        2,
        sinks=[records.append],
    )
    trainer.fit()
    return trainer, records


def test_a_record_has_every_layer() -> None:
    trainer, records = trained(moe(capacity_factor=0.8, first_k_dense=1))
    for record in records:
        assert [sum(load) for load in record["expert_load"]] == pytest.approx([1, 1])
        assert all(0 < share < 0.5 for share in record["dropped_share"])
        kept = [2 * (1 - share) for share in record["dropped_share"]]
        assert record["visits_per_token"] == pytest.approx(kept)
        assert record["dead_experts"] == [0, 0]
    statistics = trainer.get_expert_statistics()
    assert [layer["per_expert_utilization"] for layer in statistics["layers"]] == records[-1]["expert_load"]
    assert set(statistics["aggregate"]) == {
        "per_expert_utilization",
        "routing_entropy",
        "load_balance_loss",
        "tokens_dropped",
    }


def test_a_dense_record_has_none() -> None:
    trainer, records = trained(DenseConfig())
    fields = {"expert_load", "visits_per_token", "dropped_share", "dead_experts"}
    assert not fields & {name for record in records for name in record}
    assert trainer.get_expert_statistics()["layers"] == []
    assert trainer.state.routing.to_tensors() == {}
