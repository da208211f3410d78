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
