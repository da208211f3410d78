"""The command line as a user meets it: what it prints, what it returns, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn

from ava_exp.config.folders import group_names, option_names
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PlanConfig
from ava_exp.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR, DataError

if TYPE_CHECKING:
    from tests.conftest import CommandLine


class RecordingStage:
    """Stands in for a stage: remembers the runs it was given, and ends each as it is told to by the run's seed."""

    def __init__(self) -> None:
        self.runs: list[RunConfig] = []
        self.ends: dict[int, int | BaseException] = {}

    def __call__(self, config: RunConfig) -> int:
        self.runs.append(config)
        end = self.ends.get(config.seed, EXIT_OK)
        if isinstance(end, BaseException):
            raise end
        return end


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> RecordingStage:
    """The stage that `stage=plan` runs."""
    recording = RecordingStage()
    monkeypatch.setattr(PlanConfig, "component", lambda self: recording)
    return recording


def test_the_composed_run_reaches_the_stage_and_its_code_is_returned(
    command_line: CommandLine, stage: RecordingStage
) -> None:
    stage.ends = {3: EXIT_RESUMABLE}
    outcome = command_line("stage=plan", "model=small", "seed=3")
    assert outcome.code == EXIT_RESUMABLE
    assert [(run.model.preset, run.seed) for run in stage.runs] == [("small", 3)]
    assert (outcome.out, outcome.err) == ("", "")


def test_nothing_is_written_by_the_command_line_itself(
    command_line: CommandLine, stage: RecordingStage, tmp_path: Path
) -> None:
    assert command_line("stage=plan").code == EXIT_OK
    assert list(tmp_path.iterdir()) == []


def test_a_users_error_in_a_stage_is_one_line(command_line: CommandLine, stage: RecordingStage) -> None:
    stage.ends = {0: DataError("`data.paths` holds nothing.")}
    outcome = command_line("stage=plan")
    assert (outcome.code, outcome.err) == (EXIT_USER_ERROR, "ava_exp: `data.paths` holds nothing.\n")


def test_a_bug_in_a_stage_keeps_its_traceback(command_line: CommandLine, stage: RecordingStage) -> None:
    stage.ends = {0: ValueError("a bug")}
    outcome = command_line("stage=plan")
    assert outcome.code == EXIT_FAILURE
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.endswith("ValueError: a bug\n")


def test_ctrl_c_is_one_line(command_line: CommandLine, stage: RecordingStage) -> None:
    stage.ends = {0: KeyboardInterrupt()}
    outcome = command_line("stage=plan")
    assert (outcome.code, outcome.err) == (EXIT_INTERRUPTED, "ava_exp: interrupted.\n")


def test_a_real_interrupt_is_one_line(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from ava_exp.config.stage import PlanConfig\n"
        "PlanConfig.component = lambda self: lambda config: (print('started', flush=True), time.sleep(60))\n"
        "from ava_exp.cli import main\n"
        "sys.exit(main(['stage=plan']))\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (EXIT_INTERRUPTED, "ava_exp: interrupted.\n")


def test_all_faults_are_listed_and_the_stage_does_not_start(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("stage=plan", "model.num_heads=3", "sparsity.router.moe_top_k=9")
    assert outcome.code == EXIT_USER_ERROR
    assert "`model.num_heads` must be" in outcome.err
    assert "`sparsity.router.moe_top_k` must be" in outcome.err
    assert stage.runs == []


def test_warnings_are_told_and_the_run_goes_on(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("stage=plan", "budget.chinchilla_multiplier=2")
    assert outcome.code == EXIT_OK
    assert outcome.err.startswith("faults: 1 warning\n")
    assert len(stage.runs) == 1


def test_the_validate_stage_prints_its_report(command_line: CommandLine) -> None:
    good, bad = command_line("stage=validate"), command_line("stage=validate", "model.num_heads=3")
    assert (good.code, good.out, good.err) == (EXIT_OK, "no faults\n", "")
    assert (bad.code, bad.err) == (EXIT_USER_ERROR, "")
    assert "`model.num_heads` must be" in bad.out


def test_composition_errors_are_one_line(command_line: CommandLine) -> None:
    outcome = command_line("modle=small")
    assert (outcome.code, outcome.out) == (EXIT_USER_ERROR, "")
    assert outcome.err == "ava_exp: `modle` does not exist: did you mean `model` or `mod`?\n"


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--info", "defaults-tree"], ["-m"]])
def test_added_keys_are_refused_whatever_is_asked_for(command_line: CommandLine, arguments: list[str]) -> None:
    outcome = command_line(*arguments, "+model.hiden_size=1")
    assert (outcome.code, outcome.out) == (EXIT_USER_ERROR, "")
    assert "did you mean `model.hidden_size`" in outcome.err


# Several points


def test_multirun_runs_every_point(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("-m", "stage=plan", "seed=1,2", "model=small,tiny")
    assert outcome.code == EXIT_OK
    assert [(run.seed, run.model.preset) for run in stage.runs] == [
        (1, "small"),
        (1, "tiny"),
        (2, "small"),
        (2, "tiny"),
    ]
    assert "── point 3: stage=plan seed=2 model=tiny" in outcome.out


def test_a_point_that_fails_does_not_keep_the_next_from_running(
    command_line: CommandLine, stage: RecordingStage
) -> None:
    stage.ends = {1: RuntimeError("a bug"), 2: DataError("no data"), 4: 7}
    outcome = command_line("-m", "stage=plan", "seed=1,2,3,4,5")
    assert [run.seed for run in stage.runs] == [1, 2, 3, 4, 5]
    assert outcome.code == EXIT_FAILURE
    assert "RuntimeError: a bug" in outcome.err
    assert "ava_exp: no data" in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last == "ava_exp: 3 of 5 points did not finish: 0 (exit code 1), 1 (exit code 2), 3 (exit code 7)."


def test_a_point_with_faults_is_reported_and_the_others_run(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("-m", "stage=plan", "sparsity.router.moe_top_k=1,9,2")
    assert outcome.code == EXIT_USER_ERROR
    assert len(stage.runs) == 2
    assert "1 of 3 points did not finish: 1 (exit code 2)." in outcome.err


def test_a_request_to_stop_ends_the_remaining_points(command_line: CommandLine, stage: RecordingStage) -> None:
    stage.ends = {2: EXIT_RESUMABLE}
    outcome = command_line("-m", "stage=plan", "seed=1,2,3")
    assert [run.seed for run in stage.runs] == [1, 2]
    assert outcome.code == EXIT_RESUMABLE


@pytest.mark.parametrize("override", ["modle=small,tiny", "seed=1,x", "model=small,smal", "model=small,../x"])
def test_a_wrong_point_is_one_line_before_anything_runs(
    command_line: CommandLine, stage: RecordingStage, override: str
) -> None:
    outcome = command_line("-m", "stage=plan", override)
    assert outcome.code == EXIT_USER_ERROR
    assert outcome.err.count("\n") == 1
    assert stage.runs == []


def test_multirun_into_an_unwritable_folder_is_one_line(
    command_line: CommandLine, stage: RecordingStage, tmp_path: Path
) -> None:
    (tmp_path / "outputs").write_text("a file in the folder's place")
    outcome = command_line("-m", "stage=plan", "seed=1,2")
    assert (outcome.code, outcome.err.count("\n")) == (EXIT_USER_ERROR, 1)
    assert "outputs" in outcome.err


@pytest.mark.parametrize("name", option_names("sweep"))
def test_a_sweep_runs_by_name(command_line: CommandLine, stage: RecordingStage, name: str) -> None:
    outcome = command_line("-m", f"sweep={name}", "stage=plan")
    assert outcome.code == EXIT_OK
    is_search = bool(stage.runs[0].sweep.optuna.space) or name == "recipe_search"
    assert len(stage.runs) == 1 if is_search else len(stage.runs) > 1
    assert len({repr(run) for run in stage.runs}) == len(stage.runs)


@pytest.mark.parametrize("arguments", [["sweep=learning_rate"], ["seed=1", "sweep.num_parallel=2"]])
def test_a_sweep_without_its_flag_is_refused_with_the_right_command(
    command_line: CommandLine, stage: RecordingStage, arguments: list[str]
) -> None:
    outcome = command_line("stage=plan", *arguments)
    assert (outcome.code, stage.runs) == (EXIT_USER_ERROR, [])
    assert f"write `python -m ava_exp -m stage=plan {' '.join(arguments)}`." in outcome.err


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "defaults"]])
def test_a_sweep_can_be_looked_at(program: CommandLine, flags: list[str]) -> None:
    outcome = program("sweep=learning_rate", *flags)
    assert outcome.code == EXIT_OK, outcome.err
    assert "sweep" in outcome.out


def test_points_that_differ_in_values_are_composed_once(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("-m", "stage=plan", "model=tiny,small", "seed=range(0,30)", "optimizer.learning_rate=1e-3,1")
    assert outcome.code == EXIT_OK
    expected = [(m, s, r) for m in ("tiny", "small") for s in range(30) for r in (1e-3, 1.0)]
    assert [(run.model.preset, run.seed, run.optimizer.learning_rate) for run in stage.runs] == expected


def test_hydras_own_sweeper_can_be_chosen(command_line: CommandLine, stage: RecordingStage) -> None:
    outcome = command_line("-m", "hydra/sweeper=basic", "stage=plan", "seed=1,2")
    assert outcome.code == EXIT_OK
    assert [run.seed for run in stage.runs] == [1, 2]
    assert "── point 1: stage=plan seed=2" in outcome.out


class FakeLauncher(BasicLauncher):
    """Runs points here, and remembers that it was asked to."""

    launched: ClassVar[list[list[str]]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.launched.extend([*overrides] for overrides in job_overrides)
        return super().launch(job_overrides, initial_job_idx)


def test_a_launcher_of_hydra_gets_all_points(
    command_line: CommandLine, stage: RecordingStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "hydra_plugins.fake.FakeLauncher"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, FakeLauncher)
    monkeypatch.setattr(FakeLauncher, "launched", [])
    ConfigStore.instance().store(group="hydra/launcher", name="fake", node={"_target_": name}, provider="tests")
    stage.ends = {2: EXIT_USER_ERROR}
    outcome = command_line("-m", "hydra/launcher=fake", "stage=plan", "seed=1,2,3")
    assert FakeLauncher.launched == [["stage=plan", f"seed={seed}"] for seed in (1, 2, 3)]
    assert [run.seed for run in stage.runs] == [1, 2, 3]
    assert outcome.code == EXIT_USER_ERROR


def test_a_sweep_is_kept_with_the_outputs(command_line: CommandLine, stage: RecordingStage, tmp_path: Path) -> None:
    command_line("-m", "stage=plan", "seed=1,2")
    (kept,) = tmp_path.rglob("multirun.yaml")
    assert kept.parent.parent == tmp_path / "outputs" / "sweeps"


# Flags


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "/tmp"],
        ["--config-dir=/tmp"],
        ["--config-d", "/tmp"],
        ["-cd", "/tmp"],
        ["--config-path", "/tmp"],
        ["-cp", "/tmp"],
        ["--config-name", "../secret"],
        ["-cn", "../secret"],
        ["--experimental-rerun", "job.pickle"],
        ["--exp", "job.pickle"],
    ],
)
def test_flags_that_read_elsewhere_are_refused(command_line: CommandLine, arguments: list[str]) -> None:
    outcome = command_line("stage=validate", *arguments)
    assert (outcome.code, outcome.out) == (EXIT_USER_ERROR, "")
    assert "is not accepted: a run is composed from `conf/` alone." in outcome.err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--cfg", "nonsense"], ["--run", "--multirun"], ["--resolve"]])
def test_wrong_flags_are_one_line(command_line: CommandLine, arguments: list[str]) -> None:
    outcome = command_line(*arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (EXIT_USER_ERROR, "", 1)


def test_flags_may_stand_anywhere(command_line: CommandLine, stage: RecordingStage) -> None:
    assert command_line("stage=plan", "-m", "seed=1,2", "model=small").code == EXIT_OK
    assert [run.seed for run in stage.runs] == [1, 2]


def test_help_names_every_group_and_option(command_line: CommandLine) -> None:
    outcome = command_line("--help")
    assert outcome.code == EXIT_OK
    for group in group_names():
        for option in option_names(group):
            assert option in outcome.out
    assert "pretrain*" in outcome.out
    assert "_schema" not in outcome.out


def test_version(command_line: CommandLine) -> None:
    import ava_exp

    assert command_line("--version").out == f"ava_exp {ava_exp.__version__}\n"


def test_cfg_shows_the_configuration_as_written_and_resolved(command_line: CommandLine) -> None:
    assert "cache_dir: ${output_dir}/cache\n" in command_line("--cfg", "job", "output_dir=x").out
    assert "cache_dir: x/cache\n" in command_line("--cfg", "job", "--resolve", "output_dir=x").out
    assert command_line("--cfg", "job", "--package", "optimizer").out.startswith("# @package optimizer\nlearning_rate:")


def test_info_shows_where_things_come_from(command_line: CommandLine) -> None:
    tree = command_line("--info", "defaults-tree", "model=small").out
    assert "model: small:" in tree
    assert "sparsity: moe:" in tree


def test_shell_completion_is_for_the_console_script(command_line: CommandLine) -> None:
    outcome = command_line("-sc", "install=bash")
    assert outcome.code == EXIT_OK
    assert outcome.out.rstrip().endswith("hydra_bash_completion ava-exp")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("model=sm", "model=small"), ("optimizer.lea", "optimizer.learning_rate="), ("experi", "experiment=")],
)
def test_shell_completion_completes(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    monkeypatch.setenv("COMP_LINE", f"ava-exp {line}")
    assert command_line("-sc", "query=bash").out.strip() == expected


# As a program


def test_showing_the_configuration_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ["torch", "mlflow", "datasets", "accelerate", "deepspeed", "transformers", "numpy", "rich", "submitit"]
    script = (
        "import sys\n"
        "from ava_exp.cli import main\n"
        "codes = [main(['--cfg', 'job']), main(['stage=validate']), main(['modle=x']), main(['--help'])]\n"
        f"print(codes, [name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 2, 0] []"


def test_the_same_from_any_directory(program: CommandLine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "conf"  # a folder of that name means nothing
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.yaml").write_text("model: {hidden_size: 1}")
    here, there = program("--cfg", "job"), program("--cfg", "job", cwd=elsewhere.parent)
    assert here.code == there.code == EXIT_OK
    assert here.out == there.out
    assert here.err == there.err == ""


def test_exit_codes_reach_the_shell(program: CommandLine) -> None:
    assert program("stage=validate").code == EXIT_OK
    assert program("stage=validate", "model.num_heads=3").code == EXIT_USER_ERROR
    assert program("modle=small").code == EXIT_USER_ERROR


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ava_exp", "--cfg", "all"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
