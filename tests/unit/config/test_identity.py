"""A run's identity: what makes two runs the same, and what does not."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_exp.config.compose import compose
from ava_exp.config.folders import group_names, option_names
from ava_exp.config.identity import config_hash, difference_from_default, from_plain, run_id, to_plain
from ava_exp.config.run import NOT_IDENTITY, RunConfig
from ava_exp.config.schema import KINDS, field_types
from ava_exp.errors import ConfigError

NEEDED = {"data=files": ["data.paths=[a]"], "tokenizer=file": ["tokenizer.path=a"]}
CHOICES = [f"{group}={option}" for group in group_names() if group != "local" for option in option_names(group)]


@functools.cache
def composed_once(*overrides: str) -> RunConfig:
    needed = [more for override in overrides for more in NEEDED.get(override, [])]
    return compose(["~local", *overrides, *needed])


def composed(*overrides: str) -> RunConfig:
    return copy.deepcopy(composed_once(*overrides))


@pytest.mark.parametrize("choice", CHOICES)
def test_plain_values_round_trip_through_json(choice: str) -> None:
    run = composed(choice)
    assert from_plain(json.loads(json.dumps(to_plain(run)))) == run


@settings(max_examples=50, deadline=None)
@given(name=st.text(min_size=1), rate=st.floats(min_value=1e-9, max_value=1, allow_nan=False), seed=st.integers(0))
def test_any_values_round_trip(name: str, rate: float, seed: int) -> None:
    run = composed()
    run.name, run.optimizer.learning_rate, run.seed = name, rate, seed
    run.tracker.tags = {name: "${not.a.reference}"}  # type: ignore[attr-defined]
    assert from_plain(json.loads(json.dumps(to_plain(run)))) == run


def test_no_field_is_called_kind() -> None:
    assert not [schema for schema in KINDS if "kind" in field_types(schema)]


def test_options_with_the_same_fields_are_different_runs() -> None:
    hashes = {config_hash(composed(f"schedule={shape}")) for shape in ("cosine", "linear", "constant", "inverse_sqrt")}
    assert len(hashes) == 4


def test_identity_does_not_depend_on_how_the_run_was_written_down() -> None:
    overrides = ["model=small", "optimizer.learning_rate=3e-4", "sparsity.num_experts=4"]
    hashes = {config_hash(composed(*order)) for order in itertools.permutations(overrides)}
    hashes.add(config_hash(composed("sparsity={num_experts: 4}", "optimizer={learning_rate: 0.0003}", "model=small")))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "override",
    [
        "budget.steps=3",
        "stage=evaluate",
        "tracker=none",
        "sweep=learning_rate",
        "pipeline=longer_texts",
        "hardware=h100",
        "launcher=slurm",
        "resume=never",
        "reset_optimizer=true",
        "allow_changed_inputs=true",
        "output_dir=elsewhere",
        "cache_dir=elsewhere",
    ],
)
def test_what_is_not_identity_leaves_the_hash_alone(override: str) -> None:
    assert config_hash(composed(override)) == config_hash(composed())
    assert override.partition("=")[0].partition(".")[0] in NOT_IDENTITY


def test_compressed_gradients_make_another_run() -> None:
    hashes = {
        config_hash(composed(f"distributed.gradient_compression={name}")) for name in ("none", "fp16", "powersgd")
    }
    hashes.add(config_hash(composed("distributed.gradient_compression=powersgd", "distributed.powersgd_rank=8")))
    assert len(hashes) == 4 and config_hash(composed()) in hashes
    assert config_hash(composed("distributed.powersgd_rank=8")) == config_hash(composed())


@pytest.mark.parametrize("field", sorted(set(field_types(RunConfig)) - NOT_IDENTITY))
def test_every_other_field_is_identity(field: str) -> None:
    plain = to_plain(composed())
    changed = {
        "name": "name=other",
        "seed": "seed=1",
        "init_from": "init_from=another",
        "model": "model.dropout=0.1",
        "attention": "attention.qk_norm=true",
        "sparsity": "sparsity=dense",
        "mod": "mod=learned",
        "prediction": "prediction=multi_token",
        "loss": "loss.label_smoothing=0.1",
        "data": "data.sequence_length=128",
        "tokenizer": "tokenizer.min_frequency=3",
        "optimizer": "optimizer.weight_decay=0.1",
        "schedule": "schedule.min_lr_ratio=0.2",
        "precision": "precision=fp32",
        "training": "training.gradient_clip_val=2",
        "evaluation": "evaluation.interval_steps=5",
        "checkpoint": "checkpoint.save_total_limit=3",
    }
    assert set(changed) == set(plain) - NOT_IDENTITY - {"kind"}
    assert config_hash(composed(changed[field])) != config_hash(composed())


def test_run_id_is_a_name_and_eight_digits() -> None:
    run = composed("name=first.try_1")
    assert re.fullmatch(r"first\.try_1-[0-9a-f]{8}", run_id(run))


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\0b", "a b", "é", "a\n"])
def test_run_id_is_always_a_safe_file_name(name: str) -> None:
    run = composed()
    run.name = name
    with pytest.raises(ConfigError, match="`name` must be"):
        run_id(run)


def test_a_hash_of_what_is_not_a_number_is_refused() -> None:
    run = composed()
    run.optimizer.learning_rate = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        config_hash(run)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["typo"], 1, "`typo` does not exist"),
        (["model", "hiden_size"], 1, "`model.hiden_size` does not exist: did you mean `hidden_size`"),
        (["model", "hidden_size"], "64", "`model.hidden_size` must be a whole number, but is '64' instead."),
        (["model", "hidden_size"], True, "`model.hidden_size` must be a whole number"),
        (["model", "hidden_size"], None, "`model.hidden_size` must be a whole number"),
        (["model", "norm"], "group", "`model.norm` must be one of `rms`, `layer`"),
        (["optimizer", "betas"], [0.9, "x"], "`optimizer.betas[1]` must be a number"),
        (["optimizer", "betas"], 0.9, "`optimizer.betas` must be a list"),
        (["model"], 3, "`model` must be a mapping"),
        (["schedule", "kind"], "os.system", "`schedule.kind` 'os.system' is unknown"),
        (["schedule", "kind"], "stage/plan", "`schedule.kind` 'stage/plan' is unknown"),
        (["stage", "_target_"], "os.system", "`stage._target_` does not exist"),
        (["tracker", "tags"], {"a": 1}, "`tracker.tags.a` must be text"),
    ],
)
def test_a_stored_configuration_is_not_trusted(path: list[str], value: Any, complaint: str) -> None:
    plain = to_plain(composed())
    section = plain
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        from_plain(plain)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("plain", [None, 3, [], {}, {"kind": "model"}])
def test_what_is_no_run_is_refused(plain: Any) -> None:
    with pytest.raises(ConfigError):
        from_plain(plain)


def test_an_absent_field_takes_its_default_but_not_a_reference() -> None:
    plain = to_plain(composed())
    del plain["training"]["log_interval"]
    assert from_plain(plain) == composed()
    del plain["tokenizer"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"`tokenizer\.vocab_size` is missing"):
        from_plain(plain)


def test_whole_numbers_are_read_where_a_number_is_expected() -> None:
    plain = to_plain(composed())
    plain["optimizer"]["weight_decay"] = 0
    value = from_plain(plain).optimizer.weight_decay
    assert (value, type(value)) == (0.0, float)


def test_difference_from_default() -> None:
    assert difference_from_default(composed()) == {}
    difference = difference_from_default(composed("schedule=wsd", "seed=3", "+tracker.tags.note=x"))
    assert difference == {
        "seed": (0, 3),
        "schedule.kind": ("schedule/cosine", "schedule/wsd"),
        "schedule.decay_ratio": (None, 0.2),
        "tracker.tags.note": (None, "x"),
        "tracker.tags": ({}, None),
    }
