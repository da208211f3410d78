"""Depth while training: annealing, what a step counts, statistics, and capacity changed by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from ava_exp.config.architecture import Architecture
from ava_exp.config.mod import DepthLayers, LearnedModConfig, ModConfig, NoModConfig, StaticModConfig
from ava_exp.config.model import ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.router import ExpertChoiceRouterConfig, TopKRouterConfig
from ava_exp.config.training import AdamWConfig, ConstantConfig
from ava_exp.data.loader import Batch
from ava_exp.errors import ConfigError
from ava_exp.evaluation.depth import KINDS, DepthObserver
from ava_exp.evaluation.language import LanguageMetrics, evaluate_language
from ava_exp.evaluation.routing import RoutingObserver
from ava_exp.losses.terms import build_losses
from ava_exp.models.arithmetic import training_flops, training_flops_per_token
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.surgery import Surgeon
from ava_exp.optim.update import Updater
from ava_exp.training.loop import Record, Trainer
from ava_exp.training.saver import restore_snapshot, take_snapshot
from ava_exp.training.state import TrainState

LENGTH, STEPS = 8, 6
MODEL = ModelConfig(vocab_size=50, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32)
MOE = MoEConfig(num_experts=4, router=TopKRouterConfig(moe_top_k=2))
LEARNED = LearnedModConfig(predictor_hidden_size=4, layers=DepthLayers.alternating)
ANNEALED = LearnedModConfig(predictor_hidden_size=4, capacity_factor=0.25, annealing_ratio=0.5)


def some_batches(count: int, rows: int) -> list[Batch]:
    tokens = torch.randint(50, (count * rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [
        Batch(
            input_ids=part[:, :-1].contiguous(),
            labels=part[:, 1:].contiguous(),
            sample_ids=np.arange(rows),
            source_ids=torch.zeros(rows, LENGTH, dtype=torch.int64),
        )
        for part in tokens.split(rows)
    ]


class Loader:
    def __init__(self, count: int = 2, rows: int = 4) -> None:
        self.batches = some_batches(count, rows)

    def micro_batches(self, step: int) -> list[Batch]:
        return self.batches

    def samples_of_all_ranks(self, step: int) -> np.ndarray:
        return np.concatenate([batch.sample_ids for batch in self.micro_batches(step)])


def trainer_of(
    mod: ModConfig, sparsity: SparsityConfig = MOE, loader: Loader | None = None, **settings: Any
) -> tuple[Trainer, list[Record]]:
    architecture, records, optimizer = Architecture(MODEL, sparsity=sparsity, mod=mod), list[Record](), AdamWConfig()
    model = build_model(architecture, seed=1)
    trainer = Trainer(
        model,
        loader or Loader(),  # type: ignore[arg-type]
        Updater(model, lambda groups: optimizer.build(groups=groups), weight_decay=0.0, master_weights=False),
        ConstantConfig(warmup_steps=0).build(total_steps=STEPS, tokens_per_step=64),
        build_losses(sparsity, mod=mod),
        STEPS,
        sinks=[records.append],
        flops=training_flops(architecture, LENGTH),
        peak_flops=1e9,
        **settings,
    )
    return trainer, records


def test_capacity_falls_linearly_and_then_stays() -> None:
    config = StaticModConfig(capacity_factor=0.2, capacity_start=0.8, annealing_ratio=0.5)
    assert [config.capacity_at(p) for p in (0, 0.25, 0.5, 0.9, 1.0)] == pytest.approx([0.8, 0.5, 0.2, 0.2, 0.2])
    assert StaticModConfig().capacity_at(0.0) == 0.5


def test_annealing_follows_the_budget() -> None:
    trainer, records = trainer_of(ANNEALED)
    trainer.fit()
    wanted = [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert [record["mod_capacity"] for record in records] == pytest.approx(wanted)
    assert [record["layer_usage"] for record in records] == [[capacity] * 4 for capacity in wanted]
    assert trainer.state.mod_capacity == 0.25


def test_statistics_of_a_step_are_exact_and_do_not_depend_on_accumulation() -> None:
    found = []
    for count, rows in ((1, 8), (4, 2)):
        trainer, records = trainer_of(LEARNED, loader=Loader(count, rows))
        trainer.fit()
        found.append(trainer.get_mod_statistics())
        assert records[-1]["average_depth"] == 3.0 and records[-1]["layer_usage"] == [1.0, 0.5, 1.0, 0.5]
    one, other = found
    assert one == other
    tokens = 8 * LENGTH
    whole, less = (
        training_flops_per_token(Architecture(MODEL, sparsity=MOE, mod=mod), LENGTH) for mod in (NoModConfig(), LEARNED)
    )
    assert one == {
        "capacity_factor": 0.5,
        "tokens_processed": tokens,
        "tokens_skipped": tokens,
        "average_depth": 3.0,
        "per_layer_usage": [1.0, 0.5, 1.0, 0.5],
        "compute_savings": pytest.approx(1 - less / whole),
    }


def test_experts_are_counted_over_the_tokens_that_their_layer_processed() -> None:
    trainer, records = trainer_of(LEARNED)
    trainer.fit()
    assert records[-1]["visits_per_token"] == [2.0] * 4
    assert [layer.num_tokens for layer in trainer.visits] == [64, 32, 64, 32]
    assert [layer.total for layer in trainer.visits] == [128, 64, 128, 64]
    assert all("mod_predictor_loss" in record for record in records)


def test_without_depth_a_record_says_nothing_of_it() -> None:
    trainer, records = trainer_of(NoModConfig())
    trainer.fit()
    assert not {"layer_usage", "mod_capacity", "average_depth", "mod_predictor_loss"} & set(records[-1])
    assert trainer.get_mod_statistics() == {} and trainer.state.mod_capacity is None
    with pytest.raises(ConfigError, match="mod=learned"):
        trainer.adjust_mod_capacity(0.5)


def test_capacity_is_adjusted_between_steps_and_annealing_ends() -> None:
    def adjust(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 2:
            trainer.adjust_mod_capacity(0.875)

    trainer, records = trainer_of(ANNEALED)
    trainer.sinks = [records.append, adjust]
    trainer.fit()
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["mod_capacity"] for record in steps] == pytest.approx([1.0, 0.75] + [0.875] * 4)
    (surgery,) = (record for record in records if record["kind"] == "surgery")
    assert surgery["done"] == ["layers process 0.875 of the tokens, and processed 0.75"]
    for value in (0.0, 1.5):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            trainer.adjust_mod_capacity(value)


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("mod", [ANNEALED, StaticModConfig(capacity_factor=0.25, annealing_ratio=0.5)])
def test_a_resumed_training_is_the_same_training(mod: ModConfig, adjusted: bool) -> None:
    """Bit for bit, in the middle of annealing and after an adjustment."""

    def prepared() -> tuple[Trainer, list[Record]]:
        trainer, records = trainer_of(mod)

        def adjust(record: Record) -> None:
            if adjusted and record["kind"] == "train" and record["step"] == 1:
                trainer.adjust_mod_capacity(0.5)

        trainer.sinks = [records.append, adjust]
        return trainer, records

    torch.manual_seed(0)
    whole, wanted = prepared()
    whole.fit()
    torch.manual_seed(0)
    first, _ = prepared()
    snapshots: list[Any] = []
    first.save_interval = 2
    first.save = lambda state: snapshots.append(copy.deepcopy(take_snapshot(first.updater, state, {}, first.surgeon)))
    first.fit()
    second, records = trainer_of(mod)
    torch.manual_seed(99)
    second.state = restore_snapshot(snapshots[0], second.updater, reset_optimizer=False, surgeon=second.surgeon)
    assert second.state.step == 2
    second.fit()
    timed = {"tokens_per_s", "elapsed_s", "mfu"}
    tail = [{k: v for k, v in r.items() if k not in timed} for r in wanted if r["kind"] == "train" and r["step"] > 2]
    assert [{k: v for k, v in record.items() if k not in timed} for record in records] == tail
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, second.model.get_parameter(name)), name


def test_an_evaluation_that_is_made_up_for_goes_by_the_capacity_of_its_step() -> None:
    """A signal had cut it short; the capacity has fallen only part of the way."""
    seen: list[float | None] = []

    def evaluate(trainer: Trainer) -> LanguageMetrics:
        seen.append(trainer.model.mod_capacity)
        return evaluated(trainer.model)

    trainer, _ = trainer_of(StaticModConfig(capacity_factor=0.25, annealing_ratio=0.5), evaluation_interval=2)
    trainer.evaluate = lambda final: evaluate(trainer)
    trainer.state = TrainState(step=2, mod_capacity=0.75)
    trainer.fit()
    assert seen == pytest.approx([0.75, 0.25, 0.25])


def evaluated(model: Decoder, observer: RoutingObserver | None = None) -> LanguageMetrics:
    kinds = np.arange(50) % len(KINDS)
    return evaluate_language(
        model, some_batches(3, 4), np.ones(50, dtype=np.int64), torch.device("cpu"), observer, DepthObserver(kinds)
    )


def test_an_evaluation_tells_both_losses_and_what_tokens_skip() -> None:
    model = build_model(Architecture(MODEL, sparsity=MOE, mod=LEARNED), seed=1).train()
    found = evaluated(model)
    assert model.training and not any(router.looks_ahead for router in model.mod_layers().values())  # type: ignore[attr-defined]
    batches = some_batches(3, 4)
    model.eval()
    losses, processed, seen, hits = [0.0, 0.0], [0, 0], np.zeros((50, 2)), [0, 0]
    with torch.no_grad():
        for batch in batches:
            output = model(batch.input_ids)
            losses[0] += sum_of(output.logits, batch)
            for layer, depth in enumerate(output.depths):
                processed[layer] += depth.num_processed
                for token in depth.token_ids.tolist():
                    seen[batch.input_ids.flatten()[token], 1] += 1
            for token in batch.input_ids.flatten().tolist():
                seen[token, 0] += 2
            with model.looking_ahead():
                output = model(batch.input_ids)
            losses[1] += sum_of(output.logits, batch)
            hits = [n + int(d.num_predicted) for n, d in zip(hits, output.depths, strict=True)]  # type: ignore[arg-type]
    tokens = 12 * LENGTH
    assert found.loss == pytest.approx(losses[0] / tokens, rel=1e-5)
    assert found.noncausal_loss == pytest.approx(losses[1] / tokens, rel=1e-5)
    assert found.loss != found.noncausal_loss
    depth = found.depth
    assert depth is not None and depth.capacity == 0.5 and depth.layers == [1, 3]
    assert depth.usage == [number / tokens for number in processed]
    assert depth.predictor_accuracy == [number / tokens for number in hits]
    for number, name in enumerate(KINDS):
        of_kind = seen[number :: len(KINDS)].sum(axis=0)
        assert depth.skipped_by_kind[name] == pytest.approx(1 - of_kind[1] / of_kind[0])
    assert len(depth.skipped_by_frequency) == 5
    assert {"processed_share", "mod_capacity", "skipped_by_kind", "predictor_accuracy"} <= set(depth.record())


def sum_of(logits: torch.Tensor, batch: Batch) -> float:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()


def test_frequencies_are_fifths_of_the_text() -> None:
    observer = DepthObserver()
    observer._seen_by_token = np.array([1, 1, 2, 4, 12])
    observer._processed_by_token = np.array([1, 0, 1, 1, 12])
    observer._processed = [15]
    observer._num_tokens = 20
    metrics = observer.metrics([0], 0.5)
    assert metrics is not None
    assert metrics.skipped_by_frequency == [0.5, 0.75, None, 0.0, None]


def test_fixed_depth_has_one_loss() -> None:
    model = build_model(Architecture(MODEL, mod=StaticModConfig()), seed=1)
    found = evaluated(model)
    assert found.noncausal_loss is None and found.depth is not None
    assert found.depth.usage == [0.5] * 4 and found.depth.predictor_accuracy == []


@pytest.mark.parametrize("router", [TopKRouterConfig(), ExpertChoiceRouterConfig()])
def test_the_routing_of_skipped_layers_is_told_of_those_who_did_not_skip(router: Any) -> None:
    sparsity = MoEConfig(num_experts=4, router=router)
    model = build_model(Architecture(MODEL, sparsity=sparsity, mod=LEARNED), seed=1)
    observers = [RoutingObserver(["a"], np.array([1, 3])) for _ in range(2)]
    found = evaluated(model, observers[0]).routing
    assert found is not None and found.choices is not None
    assert [sum(load) for load in found.expert_load] == pytest.approx([1] * 4)
    assert found.churn == [None] * 4
    if isinstance(router, TopKRouterConfig):
        assert found.visits_per_token == [2.0] * 4
    assert all(0 < entropy < 1.4 for entropy in found.token_entropy)
    assert [len(ids) for ids in found.choices.expert_ids] == [2 * LENGTH] * 4, "those who skip have no choice: -1"
    observers[1].before = found.choices
    again = evaluated(model, observers[1]).routing
    assert again is not None and again.churn == [0.0] * 4


def test_a_model_that_skips_can_be_operated_on_without_a_trainer() -> None:
    model = build_model(Architecture(MODEL, mod=LEARNED), seed=1)
    surgeon = Surgeon(model)
    trainer, _ = trainer_of(LEARNED)
    report = trainer.adjust_mod_capacity(1.0)
    assert report.after.active > report.before.active and report.after.total == report.before.total
    surgeon.follow(*trainer.surgeon.state())
    assert model.mod_capacity == 1.0
    assert TrainState(mod_capacity=0.5).to_json()["mod_capacity"] == 0.5
