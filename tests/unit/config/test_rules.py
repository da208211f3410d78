"""Each rule of `validate` finds the fault it is for; all are told at once; a good run has none."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest

from ava_exp.config.bounds import BOUNDS, Bound, value_at
from ava_exp.config.compose import compose
from ava_exp.config.machine import DeviceType, Precision
from ava_exp.config.rules import MIN_VOCABULARY
from ava_exp.config.run import RunConfig
from ava_exp.config.schema import all_keys, annotations_at, options_with
from ava_exp.config.validate import Severity, is_blocked, precision_faults, raise_if_fatal, report, validate
from ava_exp.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)


@functools.cache
def composed_once(*overrides: str) -> RunConfig:
    return compose(["~local", *overrides])


def composed(*overrides: str) -> RunConfig:
    return copy.deepcopy(composed_once(*overrides))


YARN = ["model.rope_scaling=yarn", "model.rope_scaling_factor=8"]


def error_keys(run: RunConfig) -> set[str]:
    return {fault.key for fault in validate(run) if fault.severity is Severity.error}


def test_the_default_run_has_no_faults() -> None:
    assert validate(composed()) == []
    assert report([]) == "no faults"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.num_heads=3"], "model.num_heads"),
        (["model.num_kv_heads=3"], "model.num_kv_heads"),
        (["model.head_dim=33"], "model.head_dim"),
        (["sparsity.router.moe_top_k=9"], "sparsity.router.moe_top_k"),
        (["sparsity.router.moe_top_k=0"], "sparsity.router.moe_top_k"),
        (["sparsity.num_experts=1"], "sparsity.router.moe_top_k"),
        (["data.sequence_length=1025"], "data.sequence_length"),
        (["hardware=4xh100", "distributed.expert_parallel=3"], "distributed.expert_parallel"),
        (["hardware.num_devices=2", "distributed.expert_parallel=4"], "distributed.expert_parallel"),
        (["hardware=4xh100", "sparsity=dense", "distributed.expert_parallel=2"], "distributed.expert_parallel"),
        (["hardware=4xh100", "distributed=fsdp2", "distributed.expert_parallel=2"], "distributed.backend"),
        (
            ["hardware=4xh100", "distributed.expert_parallel=2", "distributed.gradient_compression=bf16"],
            "distributed.gradient_compression",
        ),
        (["hardware=4xh100", "distributed=fsdp2", "training.offload_activations=true"], "training.offload_activations"),
        (["model.rope_scaling=linear"], "model.rope_scaling_factor"),
        (["model.rope_scaling_factor=2"], "model.rope_scaling_factor"),
        (["model.original_max_position_embeddings=512"], "model.original_max_position_embeddings"),
        (
            ["model.rope_scaling=ntk", "model.original_max_position_embeddings=2048"],
            "model.original_max_position_embeddings",
        ),
        ([*YARN, "model.yarn_beta_fast=1"], "model.yarn_beta_fast"),
        ([*YARN, "model.rope_theta=1"], "model.rope_theta"),
        (["model.yarn_attention_factor=1.1"], "model.yarn_attention_factor"),
        (["attention.sliding_window=0"], "attention.sliding_window"),
        (["attention=mixture_of_heads", "attention.num_shared_heads=4"], "attention.num_shared_heads"),
        (["attention=mixture_of_heads", "attention.heads_per_token=4"], "attention.heads_per_token"),
        (["attention=mixture_of_heads", "attention.heads_per_token=0"], "attention.heads_per_token"),
        (["attention=multi_level", "attention.progressive_sparsity=0.5"], "attention.progressive_sparsity"),
        (["attention=multi_level", "attention.num_levels=10"], "attention.num_levels"),
        (["attention.backend=flex", "attention.attention_dropout=0.1"], "attention.attention_dropout"),
        (["prediction=multi_token", "prediction.num_prediction_heads=256"], "prediction.num_prediction_heads"),
        ([f"model.vocab_size={MIN_VOCABULARY - 1}"], "tokenizer.vocab_size"),
        (["tokenizer.vocab_size=5000"], "tokenizer.vocab_size"),
        (["optimizer.betas=[0.9]"], "optimizer.betas"),
        (["optimizer.betas=[0.9,1.0]"], "optimizer.betas"),
        (["schedule=wsd", "schedule.decay_ratio=0.99"], "schedule.decay_ratio"),
        (["precision=fp32", "precision.stochastic_rounding=true"], "precision.stochastic_rounding"),
        (["precision=mixed_bf16", "precision.stochastic_rounding=true"], "precision.stochastic_rounding"),
        (["precision.stochastic_rounding=true"], "precision.stochastic_rounding"),
        (["training.compile=true", "training.recompute=selective"], "training.recompute"),
        (["distributed=fsdp2", "training.compile=true"], "training.compile"),
        (["distributed=zero3", "training.compile=true"], "training.compile"),
        (
            ["distributed=zero3_offload", "hardware=a100", "training.offload_activations=true"],
            "training.offload_activations",
        ),
        (["distributed=zero1", "precision=bf16"], "precision.training"),
        (["distributed=zero2", "precision=bf16", "precision.stochastic_rounding=true"], "precision.training"),
        (["distributed=zero3", "hardware=a100", "precision=fp16"], "precision.training"),
        (["hardware=cpu", "training.offload_activations=true"], "training.offload_activations"),
        (["name=.hidden"], "name"),
        (["name=../up"], "name"),
        (["name='a b'"], "name"),
        (["name=''"], "name"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate"),
        (["optimizer.learning_rate=inf"], "optimizer.learning_rate"),
        (["optimizer.betas=[0.9,nan]"], "optimizer.betas[1]"),
        (["hardware=cpu", "precision=fp16"], "precision.training"),
        (["hardware=cpu", "precision.inference=mixed_fp16"], "precision.training"),
    ],
)
def test_contradictions_are_errors(overrides: list[str], key: str) -> None:
    assert key in error_keys(composed(*overrides))


GROUPS = ["router=two_stage", "sparsity.num_experts=8"]
TREE = ["router=hierarchical", "sparsity.num_experts=8"]
PRODUCT = "`sparsity.router.branching` must be numbers of children whose product is `sparsity.num_experts` (8)"
NULL, AVERAGE = "`sparsity.capacity_factor` must be null", "`sparsity.router.average_experts`"
CHILDREN = "`sparsity.router.choices` must be at each level 1 to its number of children, [2, 4]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sparsity.router.moe_top_k=9"],
            "`sparsity.router.moe_top_k` must be 1 to `sparsity.num_experts` (8), but is 9 instead.",
        ),
        (
            [*GROUPS, "sparsity.router.num_groups=3"],
            "`sparsity.router.num_groups` must be a divisor of `sparsity.num_experts` (8), but is 3 instead.",
        ),
        (
            ["router=deepseek", "sparsity.router.num_groups=16"],
            "`sparsity.router.num_groups` must be a divisor of `sparsity.num_experts` (8), but is 16 instead.",
        ),
        (
            [*GROUPS, "sparsity.router.groups_per_token=3"],
            "`sparsity.router.groups_per_token` must be at most the 2 groups, but is 3 instead.",
        ),
        (
            [*GROUPS, "sparsity.router.num_groups=4", "sparsity.router.moe_top_k=3"],
            "`sparsity.router.moe_top_k` must be at most 2, the experts of 1 of 4 groups, but is 3 instead.",
        ),
        ([*TREE, "sparsity.router.branching=[2,3]"], f"{PRODUCT}, but is [2, 3] instead."),
        ([*TREE, "sparsity.router.branching=[]"], f"{PRODUCT}, but is [] instead."),
        ([*TREE, "sparsity.router.branching=[-2,-4]"], f"{PRODUCT}, but is [-2, -4] instead."),
        (
            [*TREE, "sparsity.router.choices=[2]"],
            "`sparsity.router.choices` must be as long as the branching [2, 4], but is [2] instead.",
        ),
        ([*TREE, "sparsity.router.choices=[3,1]"], f"{CHILDREN}, but is [3, 1] instead."),
        ([*TREE, "sparsity.router.choices=[1,0]"], f"{CHILDREN}, but is [1, 0] instead."),
        (
            ["router=soft", "sparsity.capacity_factor=2"],
            f"{NULL}, for in soft routing every expert takes every token, but is 2.0 instead.",
        ),
        (
            ["router=expert_choice", "sparsity.capacity_factor=2"],
            f"{NULL}, for with expert choice {AVERAGE} says what an expert takes, but is 2.0 instead.",
        ),
        (
            ["sparsity.first_k_dense=4"],
            "`sparsity.first_k_dense` must be below `model.num_layers` (4), but is 4 instead.",
        ),
    ],
)
def test_a_router_that_does_not_fit_is_told_exactly(overrides: list[str], message: str) -> None:
    faults = [fault for fault in validate(composed(*overrides)) if fault.severity is Severity.error]
    assert [fault.message for fault in faults] == [message]


def test_a_remedy_is_told_where_there_is_one() -> None:
    (groups,) = validate(composed(*GROUPS, "sparsity.router.num_groups=4", "sparsity.router.moe_top_k=3"))
    assert groups.mend == "Raise `sparsity.router.groups_per_token`, or lower `sparsity.router.num_groups`."
    (layers,) = validate(composed("sparsity.first_k_dense=5"))
    assert layers.mend == "Or take `sparsity=dense`."


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["schedule.warmup_steps=5", "schedule.warmup_tokens=5"], "schedule.warmup_tokens"),
        (["schedule.warmup_steps=5", "budget.steps=5"], "schedule.warmup_steps"),
        (["budget.chinchilla_multiplier=4"], "budget.chinchilla_multiplier"),
        (["budget.chinchilla_multiplier=51"], "budget.chinchilla_multiplier"),
        (
            [*YARN, "model.original_max_position_embeddings=100"],
            "model.max_position_embeddings",
        ),
        (["hardware=v100", "precision=mixed_bf16"], "precision.training"),
    ],
)
def test_what_is_unusual_is_a_warning_and_does_not_stop_the_run(overrides: list[str], key: str) -> None:
    faults = validate(composed(*overrides))
    assert [(fault.severity, fault.key) for fault in faults] == [(Severity.warning, key)]
    assert not is_blocked(faults)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.hidden_size=250", "model.num_heads=3", "model.head_dim=64"],
        ["model.num_kv_heads=1"],
        [*YARN, "model.original_max_position_embeddings=512", "model.yarn_attention_factor=1"],
        ["model.rope_scaling=linear", "model.rope_scaling_factor=1"],
        ["model.rope_scaling=ntk", "model.rope_scaling_factor=1.7"],
        ["sparsity.num_experts=1", "sparsity.router.moe_top_k=1"],
        ["data.sequence_length=1024"],
        [f"model.vocab_size={MIN_VOCABULARY}"],
        ["budget.chinchilla_multiplier=50"],
        ["hardware=a100", "precision=bf16"],
        ["hardware=v100", "precision=mixed_fp16"],
        ["precision=bf16", "precision.stochastic_rounding=true", "training.recompute=selective"],
        ["hardware=a100", "training.offload_activations=true", "training.recompute=full", "training.compile=true"],
        ["checkpoint.save_total_limit=0", "evaluation.max_tokens=null", "training.batch_size=null"],
        ["stage=generate", "stage.temperature=0", "stage.top_p=1.0"],
        ["sparsity.first_k_dense=3"],
        ["router=two_stage", "sparsity.num_experts=7"],
        ["router=two_stage", "sparsity.router.num_groups=8", "sparsity.router.groups_per_token=2"],
        ["router=deepseek", "sparsity.router.num_groups=4", "sparsity.router.groups_per_token=4"],
        ["router=hierarchical", "sparsity.router.branching=[2,2,2]", "sparsity.router.choices=[2,2,2]"],
        ["router=dynamic", "sparsity.router.threshold=1", "sparsity.router.max_experts=100"],
        ["router=expert_choice", "sparsity.router.average_experts=0.5"],
        ["router=sinkhorn", "sparsity.capacity_factor=0.5", "sparsity.overflow=residual"],
    ],
)
def test_what_is_at_the_edge_is_allowed(overrides: list[str]) -> None:
    assert validate(composed(*overrides)) == []


WRONG = {
    "at least 1": [0, -1],
    "above 0": [0.0, -1.0],
    "0 or more": [-1],
    "at least 0 and below 1": [-0.1, 1.0],
    "between 0 and 1": [-0.1, 1.1],
    "above 0 and below 1": [0.0, 1.0],
    "above 0 and at most 1": [0.0, 1.1],
    "above 1": [1.0],
}
EVERY_BOUND = [(bound, key) for bound in BOUNDS for key in bound.keys]


@pytest.mark.parametrize(("bound", "key"), EVERY_BOUND, ids=[key for _, key in EVERY_BOUND])
def test_every_bound_is_kept_at_a_key_that_exists(bound: Bound, key: str) -> None:
    assert key in all_keys()
    for wrong in WRONG[bound.expected]:
        run = run_with(key)
        section = value_at(run, key.rpartition(".")[0]) if "." in key else run
        setattr(section, key.rpartition(".")[2], wrong)
        assert key in error_keys(run)


def run_with(key: str) -> RunConfig:
    """The default run, with an option of the key's group that has the key."""
    needed = {"data=files": ["data.paths=[.]"]}
    default, (section, _, name) = composed(), key.rpartition(".")
    if hasattr(value_at(default, section) if section else default, name):
        return default
    choice = options_with(key)[0]
    return composed(choice, *needed.get(choice, []))


def test_every_number_has_a_bound_or_a_reason_to_have_none() -> None:
    bounded = {key for bound in BOUNDS for key in bound.keys}
    trees = {"sparsity.router.branching", "sparsity.router.choices"}
    checked_elsewhere = {"optimizer.betas", "sweep.devices", "tokenizer.vocab_size", "stage.value"} | trees
    any_number_will_do = {"stage.generation_seed"}
    numbers = {key for key in all_keys() if any(is_number(annotation) for annotation in annotations_at(key))}
    assert numbers - bounded - checked_elsewhere - any_number_will_do == set()


def is_number(annotation: Any) -> bool:
    text = str(annotation)
    return ("int" in text or "float" in text) and "bool" not in text and "enum" not in text and "str" not in text


@pytest.mark.parametrize("names", ["[]", "[gelu,relu,gelu]"])
def test_a_mixture_is_of_different_activations(names: str) -> None:
    run = composed("model.activation=mixture", f"model.mixed_activations={names}")
    assert error_keys(run) == {"model.mixed_activations"}
    assert validate(composed("model.activation=hard_mixture", "model.mixed_activations=[tanh]")) == []


def test_all_faults_are_told_at_once_the_gravest_first() -> None:
    overrides = ["model.num_heads=0", "sparsity.router.moe_top_k=99", "optimizer.learning_rate=-1", "name='/'"]
    faults = validate(composed(*overrides, "budget.chinchilla_multiplier=1"))
    assert {fault.key for fault in faults} >= {"model.num_heads", "sparsity.router.moe_top_k", "name"}
    order = [list(Severity).index(fault.severity) for fault in faults]
    assert order == sorted(order)
    text = report(faults)
    assert text.startswith("faults: 5 error, 1 warning\n")
    assert all(fault.message in text for fault in faults)


@pytest.mark.parametrize("precision", [Precision.fp16, Precision.mixed_fp16])
def test_half_precision_on_a_cpu_is_refused_with_what_to_take(precision: Precision) -> None:
    with pytest.raises(ConfigError, match="precision=mixed_bf16"):
        raise_if_fatal(precision_faults(DeviceType.cpu, None, precision))


@pytest.mark.parametrize(
    ("device", "capability", "precision"),
    [
        (DeviceType.cpu, None, Precision.bf16),
        (DeviceType.cuda, "8.0", Precision.bf16),
        (DeviceType.cuda, "10.0", Precision.mixed_bf16),
        (DeviceType.cuda, "7.0", Precision.mixed_fp16),
        (DeviceType.mps, None, Precision.fp16),
        (DeviceType.auto, None, Precision.fp16),
    ],
)
def test_precisions_that_a_device_computes_in(device: DeviceType, capability: str | None, precision: Precision) -> None:
    assert precision_faults(device, capability, precision) == []


def test_emulated_precision_is_a_warning_which_is_not_fatal() -> None:
    faults = precision_faults(DeviceType.cuda, "7.5", Precision.bf16)
    assert [fault.severity for fault in faults] == [Severity.warning]
    raise_if_fatal(faults)


def test_the_least_vocabulary_is_that_of_the_tokenizer() -> None:
    from ava_exp.tokenizer.bpe import MIN_VOCAB_SIZE

    assert MIN_VOCAB_SIZE == MIN_VOCABULARY


def test_no_bound_lets_nan_through() -> None:
    assert not any(bound.holds(math.nan) for bound in BOUNDS)
