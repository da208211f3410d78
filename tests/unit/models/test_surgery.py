"""Surgery against what must not change, against models built in the new shape, and through checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import ModelConfig, MoEConfig, Overflow, SharedProjection
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    SoftRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)
from ava_exp.config.surgery import Gate, NewState, SurgeryKind, SurgeryOperation
from ava_exp.config.training import AdamWConfig, ConstantConfig
from ava_exp.data.loader import Batch
from ava_exp.errors import CheckpointError, ConfigError
from ava_exp.losses.terms import build_losses
from ava_exp.models.arithmetic import count_parameters
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.surgery import Surgeon, SurgeryReport, count_parameters_of, measure
from ava_exp.optim.update import Updater
from ava_exp.training.checkpoint import read_checkpoint, write_checkpoint
from ava_exp.training.loop import Trainer
from ava_exp.training.saver import restore_snapshot, take_snapshot
from ava_exp.training.state import TrainState
from ava_exp.training.step import train_step

CPU = torch.device("cpu")
NUM_EXPERTS = 4
ROUTERS: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(),
    "top1": TopKRouterConfig(moe_top_k=1),
    "switch": SwitchRouterConfig(jitter=0.0),
    "soft": SoftRouterConfig(),
    "sinkhorn": SinkhornRouterConfig(),
    "deepseek": DeepSeekRouterConfig(),
    "two_stage": TwoStageRouterConfig(num_groups=1),
    "dynamic": DynamicRouterConfig(),
    "hierarchical": HierarchicalRouterConfig(branching=[NUM_EXPERTS], choices=[2]),
    "expert_choice": ExpertChoiceRouterConfig(),
}
STOCHASTIC = "stochastic_bf16"
FORMATS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "mixed_bf16": (torch.bfloat16, True),
    STOCHASTIC: (torch.bfloat16, False),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"expert_norm": True},
    "share_up": {"share_projection": SharedProjection.up, "expert_norm": True},
    "share_down": {"share_projection": SharedProjection.down},
    "capacity": {"capacity_factor": 1.25, "overflow": Overflow.residual},
}
EVERY_ROUTER = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
EVERY_FORMAT = pytest.mark.parametrize("precision", FORMATS)
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


class Patient:
    """A small model with its optimizer, and text to train it on."""

    def __init__(
        self, router: RouterConfig, precision: str = "fp32", num_experts: int = NUM_EXPERTS, **moe: Any
    ) -> None:
        self.dimensions = ModelConfig(
            vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, initializer_range=0.3
        )
        self.sparsity = MoEConfig(num_experts=num_experts, router=router, **moe)
        dtype, masters = FORMATS[precision]
        self.model = build_model(Architecture(self.dimensions, GroupedAttentionConfig(), self.sparsity), dtype=dtype)
        optimizer = AdamWConfig(learning_rate=1e-2)
        self.updater = Updater(
            self.model,
            lambda groups: optimizer.build(groups=groups),
            weight_decay=0.1,
            master_weights=masters,
            stochastic_rounding=precision == STOCHASTIC,
        )
        self.surgeon = Surgeon(self.model, self.updater)
        self.terms = build_losses(self.sparsity)

    def train(self, *steps: int) -> float:
        loss = 0.0
        self.model.train()
        for step in steps:
            torch.manual_seed(step)
            metrics = train_step(
                self.model,
                self.updater,
                batches(step),
                self.terms,
                learning_rate=1e-2,
                max_norm=1.0,
                device=CPU,
                backward=torch.Tensor.backward,
            )
            loss = metrics.losses["loss"]
        return loss

    def operate(self, kind: SurgeryKind, step: int = 0, **details: Any) -> SurgeryReport:
        operation = SurgeryOperation(operation=kind, **{"noise": 0.0, **details})
        return self.surgeon.operate(operation, batches(99), step=step)

    def everything(self) -> dict[str, Tensor]:
        """Weights in both formats, what routers learn, and the optimizer's states."""
        states, _ = self.updater.optimizer_state()
        parameters = {f"model/{name}": p for name, p in self.model.named_parameters()}
        everything = {**self.updater.weights, **self.updater.buffers, **states, **parameters}
        return {name: tensor.detach().clone() for name, tensor in everything.items()}

    @torch.no_grad()
    def logits(self, *, training: bool = False) -> Tensor:
        self.model.train(training)
        return self.model(batches(7)[0].input_ids).logits


def batches(step: int, size: int = 4) -> list[Batch]:
    ids = torch.from_numpy(np.random.default_rng(step).integers(0, 64, (size, 13)))
    return [Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], sample_ids=np.arange(size))]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@EVERY_ROUTER
@EVERY_FORMAT
def test_an_added_closed_expert_changes_no_output_bit_for_bit(router: RouterConfig, precision: str) -> None:
    with_it, without_it = Patient(router, precision), Patient(router, precision)
    for patient in (with_it, without_it):
        patient.train(0, 1)
    report = with_it.operate(SurgeryKind.add_expert, gate=Gate.closed, noise=0.5)
    assert report.loss_before == report.loss_after
    assert report.after.total > report.before.total and report.after.active == report.before.active
    for training in (False, True):
        assert torch.equal(with_it.logits(training=training), without_it.logits(training=training))
    if precision == STOCHASTIC:
        return  # a larger stack draws more of the numbers that rounding takes
    for step in (2, 3):  # nor does it disturb the training of what was there
        assert with_it.train(step) == without_it.train(step)
    here, there = with_it.everything(), without_it.everything()
    for name, tensor in there.items():
        assert torch.equal(here[name][: tensor.shape[0]] if tensor.ndim else here[name], tensor), name


@pytest.mark.parametrize("num_experts", [3, 7, 8, 15, 16])
@EVERY_VARIANT
def test_closed_experts_change_no_output_whatever_their_number(num_experts: int, variant: dict[str, Any]) -> None:
    patient = Patient(TopKRouterConfig(), num_experts=num_experts, **variant)
    before = patient.logits(), patient.logits(training=True)
    for _ in range(2):
        patient.operate(SurgeryKind.add_expert, gate=Gate.closed, noise=0.5)
    assert torch.equal(patient.logits(), before[0]) and torch.equal(patient.logits(training=True), before[1])


def test_a_closed_expert_only_decays_until_it_is_opened_and_learns_afterwards() -> None:
    patient = Patient(TopKRouterConfig())
    patient.train(0)
    patient.operate(SurgeryKind.add_expert, layer=0, gate=Gate.closed, noise=0.1)
    experts = patient.model.moe_layers()[0].experts
    before = experts.up[NUM_EXPERTS].detach().clone()
    patient.train(1)
    assert torch.allclose(experts.up[NUM_EXPERTS], before * (1 - 1e-2 * 0.1), rtol=1e-6)
    patient.operate(SurgeryKind.open_expert, layer=0)
    _, visits = measure(patient.model, batches(1), CPU)
    assert len(visits[0]) == NUM_EXPERTS + 1 and visits[0][NUM_EXPERTS] > 0
    opened = experts.up[NUM_EXPERTS].detach().clone()
    patient.train(2)
    assert not torch.allclose(experts.up[NUM_EXPERTS], opened * (1 - 1e-2 * 0.1), rtol=1e-6)


def test_closed_experts_are_opened_in_any_order() -> None:
    patient = Patient(TopKRouterConfig())
    for source in (0, 1):
        patient.operate(SurgeryKind.add_expert, layer=0, expert=source, gate=Gate.closed)
    up = patient.model.moe_layers()[0].experts.up
    patient.operate(SurgeryKind.open_expert, layer=0, expert=NUM_EXPERTS + 1)
    experts = patient.model.moe_layers()[0].experts
    assert (experts.num_experts, experts.num_closed) == (NUM_EXPERTS + 1, 1)
    assert torch.equal(experts.up, up[[0, 1, 2, 3, 5, 4]])


@EVERY_FORMAT
def test_a_split_expert_of_a_dense_mixture_changes_nothing_up_to_rounding_and_merging_undoes_it(precision: str) -> None:
    patient = Patient(SoftRouterConfig(), precision)
    patient.train(0)
    before, logits = patient.everything(), patient.logits()
    patient.operate(SurgeryKind.add_expert, expert=1, gate=Gate.split)
    tolerance = {"rtol": 0.05, "atol": 0.05} if "bf16" in precision else {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(patient.logits(), logits, **tolerance)
    patient.operate(SurgeryKind.merge_experts, expert=1, other=NUM_EXPERTS)
    assert torch.allclose(patient.logits(), logits, **tolerance)
    after = patient.everything()
    gates = [name for name in after if name.endswith("log_gate")]
    assert gates and all(after.pop(name).abs().max() < 1e-6 and before.pop(name) is not None for name in gates)
    assert_same(after, before)


def test_a_copied_expert_of_a_renormalised_top_1_changes_nothing_nor_does_merging_it() -> None:
    patient = Patient(ROUTERS["top1"])
    before, logits = patient.everything(), patient.logits()
    patient.operate(SurgeryKind.add_expert, expert=2)
    assert torch.equal(patient.logits(), logits)
    patient.operate(SurgeryKind.merge_experts, expert=2, other=NUM_EXPERTS)
    assert torch.equal(patient.logits(), logits)
    assert_same(patient.everything(), before)


@pytest.mark.parametrize("router", [TopKRouterConfig(moe_top_k=1), DeepSeekRouterConfig(moe_top_k=1)])
def test_pruning_experts_without_visits_changes_nothing_up_to_rounding(router: RouterConfig) -> None:
    patient = Patient(router, num_experts=16)
    short = batches(7, size=1)
    _, visits = measure(patient.model, short, CPU)
    patient.model.eval()
    with torch.no_grad():
        before = patient.model(short[0].input_ids).logits
    for layer in (0, 1):
        idle = visits[layer].index(0)
        patient.operate(SurgeryKind.prune_expert, layer=layer, expert=idle)
    with torch.no_grad():
        assert torch.allclose(patient.model(short[0].input_ids).logits, before, rtol=1e-5, atol=1e-5)


@EVERY_ROUTER
@EVERY_FORMAT
def test_adding_and_pruning_restores_everything_bit_for_bit(router: RouterConfig, precision: str) -> None:
    patient = Patient(router, precision)
    patient.train(0, 1)
    before = patient.everything()
    patient.operate(SurgeryKind.add_expert, noise=0.3)
    assert patient.everything().keys() == before.keys()
    patient.operate(SurgeryKind.prune_expert, expert=NUM_EXPERTS)
    assert_same(patient.everything(), before)


@EVERY_VARIANT
@EVERY_FORMAT
@pytest.mark.parametrize("expert", [0, 2, NUM_EXPERTS - 1])
def test_a_pruned_expert_is_restored_bit_for_bit(variant: dict[str, Any], precision: str, expert: int) -> None:
    patient = Patient(DeepSeekRouterConfig(), precision, **variant)
    patient.train(0, 1)
    before, logits = patient.everything(), patient.logits()
    patient.operate(SurgeryKind.prune_expert, expert=expert)
    patient.operate(SurgeryKind.restore_expert)
    assert_same(patient.everything(), before)
    assert torch.equal(patient.logits(), logits)
    assert patient.surgeon.pruned == []


@EVERY_FORMAT
@EVERY_ROUTER
def test_a_step_after_surgery_equals_that_of_a_model_built_in_the_new_shape(
    router: RouterConfig, precision: str
) -> None:
    operated = Patient(router, precision)
    operated.train(0, 1)
    operated.operate(SurgeryKind.add_expert, noise=0.2)
    larger = copy.deepcopy(router)
    if isinstance(larger, HierarchicalRouterConfig):
        larger.branching = [NUM_EXPERTS + 1]
    built = Patient(larger, precision, num_experts=NUM_EXPERTS + 1)
    with torch.no_grad():
        for name, weight in {**built.updater.weights, **built.updater.buffers}.items():
            weight.copy_({**operated.updater.weights, **operated.updater.buffers}[name])
    built.updater.round_masters()
    tensors, numbers = operated.updater.optimizer_state()
    built.updater.load_optimizer_state({name: t.clone() for name, t in tensors.items()}, numbers)
    for step in (2, 3):
        assert operated.train(step) == built.train(step)
    assert_same(operated.everything(), built.everything())
    sizes = count_parameters(Architecture(built.dimensions, GroupedAttentionConfig(), built.sparsity))
    parameters = count_parameters_of(operated.model)
    assert (parameters.total, parameters.active) == (sizes.total, sizes.active)


@pytest.mark.parametrize("new_state", NewState)
def test_the_state_of_a_new_expert_is_its_sources_or_zero(new_state: NewState) -> None:
    patient = Patient(TopKRouterConfig())
    patient.train(0)
    patient.operate(SurgeryKind.add_expert, layer=1, expert=0, new_state=new_state)
    states, _ = patient.updater.optimizer_state()
    moments = states["blocks.1.feed_forward.experts.down/exp_avg_sq"]
    assert moments[0].abs().sum() > 0
    expected = moments[0] if new_state is NewState.copy else torch.zeros_like(moments[0])
    assert torch.equal(moments[NUM_EXPERTS], expected)


def test_noise_is_in_units_of_each_tensors_own_spread() -> None:
    patient = Patient(TopKRouterConfig())
    patient.operate(SurgeryKind.add_expert, layer=0, expert=1, noise=0.1)
    up = patient.model.moe_layers()[0].experts.up.detach()
    noise = (up[NUM_EXPERTS] - up[1]).std() / up[1].std()
    assert 0.08 < noise < 0.12
    assert not torch.equal(patient.model.moe_layers()[0].router.weight[NUM_EXPERTS], up[1])


def test_merging_averages_weights_and_states_by_visits() -> None:
    patient = Patient(TopKRouterConfig())
    patient.train(0)
    _, visits = measure(patient.model, batches(99), CPU)
    share = visits[0][3] / (visits[0][3] + visits[0][1])
    before = patient.everything()
    patient.operate(SurgeryKind.merge_experts, layer=0, expert=3, other=1)
    after = patient.everything()
    for name in ("experts.up", "experts.up/exp_avg", "experts.down/exp_avg_sq", "router.weight"):
        stack = before[f"blocks.0.feed_forward.{name}"]
        merged = share * stack[3] + (1 - share) * stack[1]
        expected = torch.stack([stack[0], stack[2], merged])
        assert torch.allclose(after[f"blocks.0.feed_forward.{name}"], expected, rtol=1e-5, atol=1e-7)
    assert share != 0.5, "or the shares could be the wrong way round"


REFUSALS: dict[str, tuple[RouterConfig, Callable[[Patient], object], str]] = {
    "layer": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.add_expert, layer=2), "`layer` must be one with"),
    "source": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.add_expert, expert=4), "`expert` must be 0 to 3"),
    "noise": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.add_expert, noise=-1.0), "`noise` must be 0 or more"),
    "split": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.add_expert, gate=Gate.split), "router `soft`"),
    "tree": (
        HierarchicalRouterConfig(),
        lambda p: p.operate(SurgeryKind.add_expert),
        "as its tree [2, 2] has leaves",
    ),
    "groups": (TwoStageRouterConfig(groups_per_token=2), lambda p: p.operate(SurgeryKind.prune_expert), "2 groups"),
    "closed, too": (
        DeepSeekRouterConfig(num_groups=2, groups_per_token=2),
        lambda p: p.operate(SurgeryKind.add_expert, gate=Gate.closed),
        "2 groups",
    ),
    "top_k": (TopKRouterConfig(moe_top_k=4), lambda p: p.operate(SurgeryKind.prune_expert), "at least 4 experts"),
    "average": (
        ExpertChoiceRouterConfig(average_experts=3.5),
        lambda p: p.operate(SurgeryKind.merge_experts, expert=0, other=1),
        "at least 4 experts",
    ),
    "merged with itself": (
        TopKRouterConfig(),
        lambda p: p.operate(SurgeryKind.merge_experts, expert=1, other=1),
        "`other` must be another expert than 1",
    ),
    "nothing to merge": (
        TopKRouterConfig(),
        lambda p: p.operate(SurgeryKind.merge_experts, expert=1),
        "`other` must be",
    ),
    "nothing closed": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.open_expert), "no closed expert"),
    "nothing pruned": (TopKRouterConfig(), lambda p: p.operate(SurgeryKind.restore_expert), "pruned: none"),
    "dropless": (
        TopKRouterConfig(),
        lambda p: p.operate(SurgeryKind.adjust_capacity_factor, value=2.0),
        "no capacity to adjust",
    ),
    "no temperature": (
        ExpertChoiceRouterConfig(),
        lambda p: p.operate(SurgeryKind.adjust_routing_temperature, value=2.0),
        "has no temperature",
    ),
    "probability": (
        TopKRouterConfig(),
        lambda p: p.operate(SurgeryKind.enable_expert_dropout, value=1.0),
        "`value` must be at least 0 and below 1",
    ),
    "no value": (
        TopKRouterConfig(),
        lambda p: p.operate(SurgeryKind.adjust_routing_temperature),
        "`value` must be given",
    ),
}


@pytest.mark.parametrize(("router", "operate", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(
    router: RouterConfig, operate: Callable[[Patient], object], sentence: str
) -> None:
    patient = Patient(router)
    before = patient.everything()
    with pytest.raises(ConfigError) as error:
        operate(patient)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert_same(patient.everything(), before)
    assert patient.surgeon.state() == (None, {})


def test_the_last_expert_stays() -> None:
    patient = Patient(SoftRouterConfig(), num_experts=2)
    patient.operate(SurgeryKind.prune_expert)
    with pytest.raises(ConfigError, match="at least 1 experts"):
        patient.operate(SurgeryKind.prune_expert)


def test_a_layer_that_refuses_spares_the_others() -> None:
    patient = Patient(TopKRouterConfig(), num_experts=3)
    patient.operate(SurgeryKind.prune_expert, layer=1)
    before = patient.everything()
    with pytest.raises(ConfigError, match="layer 1 must keep"):
        patient.operate(SurgeryKind.prune_expert)
    assert_same(patient.everything(), before)


def test_a_dense_model_has_nothing_to_operate_on() -> None:
    patient = Patient(TopKRouterConfig(), first_k_dense=1)
    assert patient.operate(SurgeryKind.add_expert).done[0].startswith("layer 1: ")
    with pytest.raises(ConfigError, match=r"one with experts \(1\)"):
        patient.operate(SurgeryKind.add_expert, layer=0)


def test_settings_are_changed_in_one_layer_or_in_all() -> None:
    patient = Patient(TopKRouterConfig(), capacity_factor=1.25)
    first, second = patient.model.moe_layers()
    patient.operate(SurgeryKind.adjust_capacity_factor, value=2.0)
    patient.operate(SurgeryKind.adjust_routing_temperature, value=0.5, layer=1)
    patient.operate(SurgeryKind.enable_expert_dropout, value=0.2)
    patient.operate(SurgeryKind.scale_load_balancing, value=3.0, layer=0)
    assert first.capacity is not None and second.capacity is not None
    assert (first.capacity.factor, second.capacity.factor) == (2.0, 2.0)
    assert (first.router.routing_temperature, second.router.routing_temperature) == (1.0, 0.5)
    assert (first.router.whole_expert_dropout, second.router.whole_expert_dropout) == (0.2, 0.2)
    assert (first.load_balancing_factor, second.load_balancing_factor) == (3.0, 1.0)


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
def test_a_factor_on_the_balance_loss_scales_its_gradient_and_not_its_figure(scope: str) -> None:
    from ava_exp.config.router import BalanceScope
    from ava_exp.losses.terms import StepContext

    router = TopKRouterConfig(load_balancing_weight=1.0, balance_over=BalanceScope[scope])
    patient = Patient(router)

    def gradients() -> tuple[float, list[Tensor]]:
        output = patient.model(batches(1)[0].input_ids)
        context = StepContext(num_tokens=48, chosen_counts=[r.chosen_counts for r in output.routings])
        value = patient.terms[1](output, batches(1)[0].labels, context)
        weights = [layer.router.weight for layer in patient.model.moe_layers()]
        return value.item(), list(torch.autograd.grad(value, weights, retain_graph=True))

    value, (first, second) = gradients()
    patient.operate(SurgeryKind.scale_load_balancing, value=3.0, layer=1)
    scaled, (same, tripled) = gradients()
    assert scaled == value
    assert torch.allclose(tripled, 3 * second, rtol=1e-4)
    assert not torch.allclose(same, 3 * first, rtol=1e-4)


def operate_on_everything(patient: Patient) -> None:
    """Leave hardly anything as it was built, differently in each layer."""
    patient.operate(SurgeryKind.add_expert, layer=0, noise=0.1)
    patient.operate(SurgeryKind.add_expert, gate=Gate.closed, noise=0.1)
    patient.operate(SurgeryKind.prune_expert, layer=1, expert=2)
    patient.operate(SurgeryKind.adjust_capacity_factor, value=1.5)
    patient.operate(SurgeryKind.adjust_routing_temperature, value=0.7, layer=0)
    patient.operate(SurgeryKind.enable_expert_dropout, value=0.2)
    patient.operate(SurgeryKind.scale_load_balancing, value=2.0)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("router", [ROUTERS[name] for name in ("topk", "deepseek")], ids=["topk", "deepseek"])
def test_a_checkpoint_has_the_new_shape_and_goes_on_bit_for_bit(
    router: RouterConfig, precision: str, tmp_path: Path
) -> None:
    def patient() -> Patient:
        return Patient(router, precision, capacity_factor=2.0, expert_norm=True)

    whole = patient()
    whole.train(0, 1)
    operate_on_everything(whole)
    whole.train(2)
    path = write_checkpoint(tmp_path, take_snapshot(whole.updater, TrainState(step=3), {}, whole.surgeon))
    changes = copy.deepcopy(whole.surgeon.changes)
    expected = [whole.train(3), whole.train(4)]
    report = whole.operate(SurgeryKind.restore_expert, layer=1)

    resumed = patient()
    restore_snapshot(read_checkpoint(path), resumed.updater, reset_optimizer=False, surgeon=resumed.surgeon)
    assert resumed.surgeon.changes == changes
    assert [resumed.train(3), resumed.train(4)] == expected
    assert resumed.operate(SurgeryKind.restore_expert, layer=1) == report, "recoverable from the checkpoint"
    assert_same(resumed.everything(), whole.everything())
    assert resumed.surgeon.history == whole.surgeon.history


def test_a_checkpoint_without_surgery_says_nothing_of_it(tmp_path: Path) -> None:
    patient = Patient(TopKRouterConfig())
    snapshot = take_snapshot(patient.updater, TrainState(), {}, patient.surgeon)
    assert "surgery" not in snapshot.state and "pruned" not in snapshot.tensors


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"num_experts": 8},
            r"blocks.0.feed_forward.router.weight` must be of shape \(8, 16\) for this model, but is \(5",
        ),
        ({"expert_norm": True}, "another model: 2 weights differ"),
        ({"first_k_dense": 1}, "another model: 5 weights differ"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_as_clearly_as_ever(other: dict[str, Any], sentence: str) -> None:
    patient = Patient(TopKRouterConfig())
    patient.operate(SurgeryKind.add_expert)
    snapshot = take_snapshot(patient.updater, TrainState(), {}, patient.surgeon)
    another = Patient(TopKRouterConfig(), **other)
    with pytest.raises(CheckpointError, match=sentence):
        restore_snapshot(snapshot, another.updater, reset_optimizer=False, surgeon=another.surgeon)


class Texts:
    def micro_batches(self, step: int) -> list[Batch]:
        return batches(step)

    def samples_of_all_ranks(self, step: int) -> np.ndarray:
        return np.concatenate([batch.sample_ids for batch in self.micro_batches(step)])


def trainer_of(patient: Patient, state: TrainState | None = None, **more: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    trainer = Trainer(
        patient.model,
        Texts(),  # type: ignore[arg-type]
        patient.updater,
        ConstantConfig(warmup_steps=0).build(total_steps=6, tokens_per_step=48),
        patient.terms,
        6,
        state=state,
        sinks=[records.append],
        surgeon=patient.surgeon,
        **more,
    )
    return trainer, records


def test_a_trainer_operates_between_steps_records_it_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = Patient(TopKRouterConfig(), "mixed_bf16")

    def save(state: TrainState) -> None:
        write_checkpoint(tmp_path, take_snapshot(whole.updater, state, {}, whole.surgeon))

    trainer, records = trainer_of(whole, save=save, save_interval=3)

    def operate(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 3:
            trainer.add_expert(0, noise=0.05)
            trainer.prune_expert(1, 2)

    trainer.sinks = [records.append, operate]
    trainer.fit()
    done = [record for record in records if record["kind"] == "surgery"]
    assert [(record["step"], record["operation"]) for record in done] == [(3, "add_expert"), (3, "prune_expert")]
    assert done[1]["loss_before"] == done[0]["loss"] and done[1]["parameters_before"] == done[0]["parameters"]
    assert [len(load) for load in records[-1]["expert_load"]] == [NUM_EXPERTS + 1, NUM_EXPERTS - 1]

    again = Patient(TopKRouterConfig(), "mixed_bf16")
    snapshot = read_checkpoint(tmp_path / "step_00000003")
    state = restore_snapshot(snapshot, again.updater, reset_optimizer=False, surgeon=again.surgeon)
    resumed, rest = trainer_of(again, state)
    resumed.fit()
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert [record["loss"] for record in rest] == losses[3:]
    assert_same(again.everything(), whole.everything())


def test_every_operation_is_a_method_of_the_trainer() -> None:
    trainer, records = trainer_of(Patient(TopKRouterConfig(), capacity_factor=1.5))
    trainer.add_expert(0, gate=Gate.closed)
    trainer.open_expert(0)
    trainer.merge_experts(0, 0, 1)
    trainer.prune_expert(0)
    trainer.restore_expert(0)
    trainer.adjust_capacity_factor(1.25)
    trainer.adjust_routing_temperature(2.0)
    trainer.enable_expert_dropout(0.1)
    trainer.scale_load_balancing(2.0, layer_idx=1)
    of_experts = set(SurgeryKind) - {SurgeryKind.adjust_mod_capacity}
    assert {record["operation"] for record in records} == {kind.name for kind in of_experts}
    watched, _ = trainer_of(Patient(TopKRouterConfig(load_balancing_weight=0.0)))
    with pytest.raises(ConfigError, match="weight of 0"):
        watched.scale_load_balancing(2.0)


def test_a_model_alone_can_be_operated_on() -> None:
    model: Decoder = Patient(TopKRouterConfig()).model
    operation = SurgeryOperation(operation=SurgeryKind.add_expert, gate=Gate.closed)
    report = Surgeon(model).operate(operation, batches(0), step=0)
    assert report.loss_before == report.loss_after
