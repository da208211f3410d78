"""What a pipeline is made of, before any step runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ava_exp.config.compose import compose
from ava_exp.errors import RunFolderError, UserError
from ava_exp.pipelines.definition import define
from ava_exp.stages.dispatch import run
from ava_exp.stages.steps import StepFiles, announce, with_step_runs
from ava_exp.tracking.folder import RunFolder

if TYPE_CHECKING:
    from tests.conftest import CommandLine

COMMON = ["~local", "model=tiny", "tracker=none"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stage=pipeline"], "`pipeline.steps` must be at least one step; `pipeline=NAME` chooses some"),
        (["pipeline=longer_texts"], "`stage` must be pipeline with `pipeline.steps`, but is 'pretrain' instead."),
        (["stage=pipeline", "+pipeline.steps.Two=['seed=1']"], "`pipeline.steps` must be named by small letters"),
        (["stage=pipeline", "+pipeline.steps.a=['sed=1']"], "in step `a`: `sed` does not exist"),
        (["stage=pipeline", "+pipeline.steps.a=['model.num_heads=7']"], "in step `a`: "),
        (["stage=pipeline", "+pipeline.steps.a=['seed=1,2']"], "in step `a`: `seed=1,2` is several values"),
        (["stage=pipeline", "+pipeline.steps.a=['stage=plan']"], "in step `a`: `stage=plan` leaves nothing"),
        (["stage=pipeline", "+pipeline.steps.a=['seed=1']", "resume=never"], "in step `a`: `resume=never` would begin"),
        (
            ["stage=pipeline", "+pipeline.steps.a=[]", "+pipeline.steps.b=['stage=evaluate','stage.run=step:aa']"],
            "in step `b`: `stage.run` must name an earlier step, but is step:aa instead; did you mean `a`?",
        ),
        (["stage=pipeline", "+pipeline.steps.a=['init_from=step:a']"], "but is step:a instead; it is the first."),
        (
            ["stage=pipeline", "+pipeline.steps.a=[]", "+pipeline.steps.b=['launcher=slurm']"],
            "`launcher` must be the same for all steps of a pipeline.",
        ),
        (["-m", "stage=pipeline", "pipeline=longer_texts", "seed=0,1"], "`stage=pipeline` is one at a time"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    command_line: CommandLine, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    outcome = command_line(*COMMON, *overrides)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "outputs" / "runs").exists() and not (tmp_path / "outputs" / "pipelines").exists()


def test_a_program_is_told_that_a_pipeline_is_command_lines() -> None:
    with pytest.raises(UserError, match="made of command lines"):
        run(compose([*COMMON, "stage=pipeline", "pipeline=longer_texts"]))


def test_steps_have_what_is_common_and_their_own(tmp_path: Path) -> None:
    overrides = [*COMMON, "stage=pipeline", "pipeline=longer_texts", f"output_dir={tmp_path}", "seed=3"]
    pipeline = define(compose(overrides), overrides)
    assert [step.name for step in pipeline.steps] == ["prepare", "pretrain", "extend", "evaluate"]
    for step in pipeline.steps:
        assert step.overrides[: len(COMMON) + 2] == [*COMMON, f"output_dir={tmp_path}", "seed=3"]
        assert compose(step.overrides) == step.config, "the step is that command line"
    assert pipeline.id.startswith("longer_texts-")

    def id_of(*more: str) -> str:
        return define(compose([*overrides, *more]), [*overrides, *more]).id

    assert id_of("hardware=cpu", "launcher.grace_s=5") == pipeline.id, "where it runs does not matter"
    assert len({id_of("seed=4"), id_of("budget.steps=7"), pipeline.id}) == 3


def test_a_pipeline_goes_on_at_the_first_step_that_is_left(tmp_path: Path) -> None:
    overrides = [*COMMON, "stage=pipeline", "pipeline=longer_texts", f"output_dir={tmp_path}"]
    pipeline = define(compose(overrides), overrides)
    pipeline.create()
    assert [step.name for step in pipeline.left] == ["prepare", "pretrain", "extend", "evaluate"]
    for step in pipeline.steps[:3]:
        step.files.finished.touch()
    assert [step.name for step in pipeline.left] == ["evaluate"]
    run_folder = RunFolder(tmp_path / "runs" / "a").create()
    announce(pipeline.steps[1].config, run_folder)
    assert pipeline.steps[1].files.run == run_folder.root
    run_folder.root.rename(tmp_path / "elsewhere")
    assert [step.name for step in pipeline.left] == ["pretrain", "extend", "evaluate"], "its run is gone"


def test_names_of_steps_become_their_runs(tmp_path: Path) -> None:
    config = compose([*COMMON, "stage=generate", "stage.run=step:one", "init_from=step:one@12", "pipeline.step=two"])
    config.pipeline.folder = str(tmp_path)
    with pytest.raises(RunFolderError, match="the step `one` has made no run"):
        with_step_runs(config)
    StepFiles(tmp_path, "one").made.write_text('{"run": "/runs/a"}')
    resolved = with_step_runs(config)
    assert (resolved.stage.run, resolved.init_from) == ("/runs/a", "/runs/a@12")  # type: ignore[attr-defined]
    assert (config.stage.run, config.init_from) == ("step:one", "step:one@12")  # type: ignore[attr-defined]
    StepFiles(tmp_path, "one").made.write_text("{")
    with pytest.raises(RunFolderError, match=r"one\.json cannot be read"):
        with_step_runs(config)
