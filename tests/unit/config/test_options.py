"""Every option that is shipped composes, and keeps the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.folders import group_names, option_names
from ava_exp.config.store import SCHEMAS
from ava_exp.config.validate import is_blocked, report, validate

OPTIONS = [(group, option) for group in group_names() if group != "local" for option in option_names(group)]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_option_composes_and_validates(
    group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    needed = {
        "stage=pipeline": ["pipeline=longer_texts"],
        **{f"pipeline={name}": ["stage=pipeline"] for name in option_names("pipeline")},
        "data=files": ["data.paths=[text.txt]"],
        "tokenizer=file": ["tokenizer.path=text.txt"],
        "stage=surgery": ["stage.operation=add_expert"],
    }
    chosen = f"{group}={option}"
    faults = validate(compose(["~local", chosen, *needed.get(chosen, [])]))
    assert not is_blocked(faults), report(faults)


@pytest.mark.parametrize("kind", sorted(kind for kind in SCHEMAS if kind != "run"))
def test_every_schema_has_an_option(kind: str) -> None:
    group, _, option = kind.partition("/")
    assert option_names(group) if not option else option in option_names(group)


def test_the_model_brings_its_sparsity_which_the_command_line_changes() -> None:
    assert type(compose(["model=small"]).sparsity) is SCHEMAS["sparsity/moe"]
    assert type(compose(["model=small", "sparsity=dense"]).sparsity) is SCHEMAS["sparsity/dense"]
    assert type(compose(["experiment=ava_small", "sparsity=dense"]).sparsity) is SCHEMAS["sparsity/dense"]


def test_one_word_composes_the_losses_of_a_source() -> None:
    run = compose(["loss=deepseek"])
    assert type(run.sparsity.router) is SCHEMAS["router/deepseek"]  # type: ignore[attr-defined]
    assert run.sparsity.router.losses()["sequence_balance_loss"] == 1e-4  # type: ignore[attr-defined]
    assert run.loss == compose([]).loss
    assert type(compose(["loss=deepseek", "router=sinkhorn"]).sparsity.router) is SCHEMAS["router/sinkhorn"]  # type: ignore[attr-defined]
    ava = compose(["loss=anti_repetition", "loss.output_diversity_weight=0"]).loss
    assert (ava.repetition_penalty_weight, ava.immediate_repetition_weight) == (0.5, 1.0)
    assert (ava.entropy_regularization, ava.output_diversity_weight) == (0.2, 0.0)
