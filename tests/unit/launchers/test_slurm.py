"""Submission to a cluster that is played by scripts: what sbatch is given, and what is said when it cannot be.

`tests/slurm` does the same with a real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.faults import Severity
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.validate import validate
from ava_exp.tracking.jobs import JobFolder, all_jobs
from ava_launchers import slurm_commands, slurm_task
from ava_launchers.slurm import SlurmLauncher
from ava_launchers.slurm_task import SlurmTask
from ava_launchers.snapshot import take_snapshot
from ava_launchers.supervisor import STOP_SIGNALS
from tests.unit.launchers.conftest import Script

if TYPE_CHECKING:
    from tests.conftest import CommandLine

SUBMIT = ("~local", "launcher=slurm", "model=tiny", "tracker=none", "hardware=cpu")


def submitted(tmp_path: Path) -> str:
    return (tmp_path / "submitted.sh").read_text()


def command_of(tmp_path: Path) -> list[str]:
    """Return the overrides that the ranks of the only job get."""
    import submitit

    ((folder, job),) = all_jobs(tmp_path / "outputs")
    task = submitit.SlurmJob(folder.logs, job.id).submission().function
    assert isinstance(task, SlurmTask)
    return task.overrides


def test_a_job_is_submitted_and_everything_is_told(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    outcome = command_line(*SUBMIT)
    assert outcome.code == 0, outcome.err
    ((folder, job),) = all_jobs(tmp_path / "outputs")
    run = next((tmp_path / "outputs" / "runs").iterdir())
    assert (job.id, job.name, job.run_folder) == ("42", run.name, str(run))
    assert folder.root.name == f"{run.name}-1"
    assert outcome.out.splitlines()[0] == "Job 42 was submitted."
    for text in (str(run), str(folder.root), "ava_exp.runs watch 42", "ava_exp.runs logs 42", "ava_exp.runs cancel 42"):
        assert text in outcome.out


def test_what_sbatch_is_asked_for(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    outcome = command_line(
        *SUBMIT,
        "hardware.num_devices=3",
        "launcher.num_nodes=2",
        "launcher.partition=gpu",
        "launcher.account=lab",
        "launcher.time_limit_minutes=90",
        "launcher.warning_s=30",
        "launcher.memory_gib=1.5",
        "launcher.cpus_per_device=4",
        "launcher.gres_per_device='gpu:h100'",
        "launcher.setup=['module load cuda']",
        "+launcher.sbatch_parameters.constraint=fast",
        "launcher.srun_arguments=['--container-image=x']",
        "launcher.python='container python'",
    )
    assert outcome.code == 0, outcome.err
    text = submitted(tmp_path)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    expected = {
        "partition": "gpu",
        "account": "lab",
        "time": "90",
        "nodes": "2",
        "ntasks-per-node": "2",
        "cpus-per-task": "4",
        "gres": "gpu:h100:2",
        "mem": "1536M",
        "signal": "USR2@30",
        "constraint": "fast",
        "open-mode": "append",
    }
    assert {name: options.get(name) for name in expected} == expected
    assert "#SBATCH --requeue" in text.splitlines()
    assert text.index("module load cuda") < text.index("export PYTHONPATH=")
    assert "--kill-on-bad-exit=1 --container-image=x container python -u -m submitit" in text
    assert command_of(tmp_path)[0] == "hardware.strict=true"
    assert command_of(tmp_path)[-1] == "hardware.num_devices=4", "as many as are started: two nodes of two"


def test_what_is_not_asked_for_is_left_to_the_cluster(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    command_line(*SUBMIT)
    options = set(re.findall(r"^#SBATCH --([\w-]+)", submitted(tmp_path), re.MULTILINE))
    usual = {"job-name", "nodes", "ntasks-per-node", "output", "open-mode", "requeue", "signal"}
    assert options == usual


@pytest.mark.parametrize(
    ("device", "gres", "expected"),
    [
        (DeviceType.cuda, None, {"gpus_per_node": 4, "gres": None}),
        (DeviceType.cuda, "gpu:a100", {"gpus_per_node": None, "gres": "gpu:a100:4"}),
        (DeviceType.cpu, None, {"gpus_per_node": None, "gres": None}),
    ],
)
def test_devices_are_asked_for_as_the_cluster_calls_them(
    tmp_path: Path, device: DeviceType, gres: str | None, expected: dict[str, Any]
) -> None:
    launcher = compose(["~local", "launcher=slurm"]).launcher
    launcher.gres_per_device = gres  # type: ignore[attr-defined]
    built: SlurmLauncher = launcher.build()
    parameters = built.parameters(HardwareConfig(device=device), 4, "name", JobFolder(tmp_path))
    assert {key: parameters[key] for key in expected} == expected


@pytest.mark.parametrize("in_a_job", [True, False])
def test_a_job_does_not_hand_its_variables_on(
    command_line: CommandLine,
    cluster: None,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_a_job: bool,
) -> None:
    script("sbatch", f"env >{tmp_path}/environment; echo Submitted batch job 42")
    given = {"SLURM_CONF": "here", "SBATCH_ACCOUNT": "lab", "SLURM_NTASKS": "3"}
    if in_a_job:
        given["SLURM_JOB_ID"] = "41"
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert command_line(*SUBMIT).code == 0
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    assert {name: seen[name] for name in given if name in seen} == ({"SLURM_CONF": "here"} if in_a_job else given)
    assert {name: os.environ[name] for name in given} == given


def test_what_starts_runs_the_code_as_it_was(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    command_line(*SUBMIT)
    ((folder, _),) = all_jobs(tmp_path / "outputs")
    exports = [line for line in submitted(tmp_path).splitlines() if line.startswith("export PYTHON")]
    code = "import ava_exp, ava_exp.config.folders as f, ava_launchers; print(ava_exp.__file__, f.data_folder('conf'))"
    (tmp_path / "ava_exp").mkdir()  # where the job starts lies a checkout
    (tmp_path / "ava_exp" / "__init__.py").write_text("raise SystemExit('the wrong code')")
    shell = "\n".join([*exports, f'{sys.executable} -c "{code}"'])
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder.snapshot / "ava_exp" / "__init__.py"), str(folder.snapshot / "conf")]


def test_a_further_attempt_is_decided_once(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    """Or each start of a requeued job would begin another one."""
    command_line(*SUBMIT)
    command_line(*SUBMIT, "resume=never")
    first, second = sorted(path.name for path in (tmp_path / "outputs" / "runs").iterdir())
    assert second == f"{first}-2"
    (_, job) = all_jobs(tmp_path / "outputs")[-1]
    assert job.run_folder is not None and Path(job.run_folder).name == second
    assert job.overrides.index("resume=auto") > job.overrides.index("resume=never")


def test_a_run_is_not_submitted_twice(command_line: CommandLine, cluster: None, script: Script, tmp_path: Path) -> None:
    command_line(*SUBMIT)
    script("squeue", "echo '42|PENDING'")
    outcome = command_line(*SUBMIT)
    assert outcome.code == 2
    assert re.search(r"job 42 \(PENDING\) trains tiny-\w+ already.*scancel 42.*resume=never", outcome.err)
    assert len(all_jobs(tmp_path / "outputs")) == 1
    script("squeue", "echo '42|COMPLETED'")
    assert command_line(*SUBMIT).code == 0


def test_a_stage_that_trains_nothing_is_one_task(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    assert command_line(*SUBMIT, "stage=prepare", "hardware.num_devices=4").code == 0
    assert "#SBATCH --ntasks-per-node=1" in submitted(tmp_path).splitlines()
    ((_, job),) = all_jobs(tmp_path / "outputs")
    assert (job.run_folder, job.name) == (None, "tiny-prepare")
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("FAILED", 1), ("TIMEOUT", 1), ("CANCELLED", 1)])
def test_waiting_ends_with_the_job(
    command_line: CommandLine, cluster: None, script: Script, state: str, code: int
) -> None:
    script("squeue", f"echo '42|{state}'")
    outcome = command_line(*SUBMIT, "launcher.wait=true")
    assert outcome.code == code
    assert f"Job 42: {state}" in outcome.out
    assert ("ava_exp: job 42 ended" in outcome.err) == (code != 0)


def test_a_refusal_of_the_cluster_is_one_line_and_leaves_nothing(
    command_line: CommandLine, cluster: None, script: Script, tmp_path: Path
) -> None:
    script("sbatch", "echo 'sbatch: error: invalid partition specified: gpux' >&2; exit 1")
    outcome = command_line(*SUBMIT, "launcher.partition=gpux")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1 and "invalid partition specified: gpux" in outcome.err
    assert list((tmp_path / "outputs" / "jobs").iterdir()) == []


def test_a_machine_without_a_cluster_is_told_what_to_do(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = command_line(*SUBMIT)
    assert outcome.code == 2
    assert outcome.err == (
        "ava_exp: `launcher=slurm` needs `sbatch`, which is not on this machine: run the command where the cluster "
        "takes jobs (a login node), or leave `launcher=slurm` out.\n"
    )
    assert not (tmp_path / "outputs").exists()


def test_a_missing_library_is_told(command_line: CommandLine, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    outcome = command_line(*SUBMIT)
    assert (outcome.code, outcome.err) == (
        2,
        "ava_exp: `launcher=slurm` needs submitit: `pip install 'ava_exp[slurm]'`.\n",
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["stage=generate", "launcher.num_nodes=2"], "launcher.num_nodes"),
        (["distributed=single", "launcher.num_nodes=2"], "distributed.backend"),
        (["distributed=single", "hardware.num_devices=2"], "distributed.backend"),
        (["launcher.time_limit_minutes=1", "launcher.warning_s=60"], "launcher.warning_s"),
    ],
)
def test_contradictions_are_found_before(overrides: list[str], key: str) -> None:
    faults = validate(compose(["~local", "launcher=slurm", *overrides]))
    assert [fault.key for fault in faults if fault.severity is Severity.error] == [key]


def test_a_snapshot_is_everything_that_composes_a_run(tmp_path: Path) -> None:
    take_snapshot(tmp_path / "snapshot")
    assert not list(tmp_path.rglob("__pycache__"))
    command = [sys.executable, "-P", "-m", "ava_exp", "--cfg", "job", "~local", "model=tiny"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "snapshot")}
    outputs = [
        subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for env in (environment, os.environ)
    ]
    assert outputs[0] == outputs[1] != ""


TASK = SlurmTask(overrides=[], grace_s=0.3, hang_timeout_s=None, max_requeues=2, ended="")


@pytest.fixture
def in_job(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of a job that runs."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    script("sbatch", "")
    script("squeue", "echo '42|RUNNING'")
    script("scontrol", f'echo "$@" >>{tmp_path}/asked')


def asked(tmp_path: Path) -> str:
    path = tmp_path / "asked"
    return path.read_text() if path.exists() else ""


def test_a_stopped_job_goes_back_into_the_queue(in_job: None, tmp_path: Path) -> None:
    assert TASK._requeue()
    assert asked(tmp_path) == "requeue 42\n"


def test_a_job_of_an_array_goes_back_by_its_own_name(
    in_job: None, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`SLURM_JOB_ID` is then a number that the queue does not show."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    script("squeue", "echo '40_2|RUNNING'")
    assert TASK._requeue()
    assert asked(tmp_path) == "requeue 40_2\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "REQUEUED", "TIMEOUT"])
def test_what_somebody_ended_or_requeued_is_left_alone(
    in_job: None, script: Script, tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script("squeue", f"echo '42|{state}'")
    assert not TASK._requeue()
    assert asked(tmp_path) == ""
    assert f"job 42 is {state}" in capsys.readouterr().err


def test_a_job_is_not_started_again_for_ever(
    in_job: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not TASK._requeue()
    assert asked(tmp_path) == ""
    assert "`launcher.max_requeues`" in capsys.readouterr().err


def test_a_failing_requeue_is_told(in_job: None, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script("scontrol", "echo 'Job requeue disabled' >&2; exit 1")
    assert not TASK._requeue()
    assert "job 42 could not be put back into the queue: Job requeue disabled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "rank", "end", "requeues"),
    [
        ("raise SystemExit(0)", 0, 0, 0),
        ("raise SystemExit(75)", 0, 0, 1),
        ("raise SystemExit(75)", 1, 0, 0),
        ("raise SystemExit(3)", 0, 3, 0),
        ("raise SystemExit(3)", 1, 3, 0),
    ],
)
def test_one_task_of_a_job_requeues_it(
    in_job: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, rank: int, end: int, requeues: int
) -> None:
    place = slurm_task.Place(
        rank=rank, local_rank=0, world_size=2, local_world_size=1, master_address="127.0.0.1", master_port=1
    )
    monkeypatch.setattr(slurm_task, "place_in_job", lambda: place)
    (tmp_path / "stub" / "ava_exp").mkdir(parents=True)
    (tmp_path / "stub" / "ava_exp" / "__init__.py").touch()
    (tmp_path / "stub" / "ava_exp" / "__main__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT)}
    task = SlurmTask(overrides=["a=1"], grace_s=0.3, hang_timeout_s=None, max_requeues=2, ended=str(tmp_path / "ended"))
    if end:
        with pytest.raises(SystemExit) as caught:
            task()
        assert caught.value.code == end
    else:
        assert task() == 0
    for number, handler in before.items():
        assert signal.signal(number, handler) is signal.SIG_IGN, "a late warning must not end the task"
    assert asked(tmp_path).count("requeue 42") == requeues
    assert (tmp_path / "ended" / "42.0" / str(rank)).exists()


def test_states_are_those_of_the_jobs_that_were_asked_for(script: Script) -> None:
    script("sbatch", "")
    script("squeue", "echo '1|RUNNING'; echo '7|PENDING'; echo '2|CANCELLED by 0'")
    assert slurm_commands.states(["1", "2"]) == {"1": "RUNNING", "2": "CANCELLED"}


def test_the_jobs_of_an_array_are_told_apart(script: Script, tmp_path: Path) -> None:
    script("sbatch", "")
    script("squeue", f"echo \"$@\" >>{tmp_path}/asked; echo '7_0|RUNNING'; echo '7_[1-2,5%2]|PENDING'")
    found = slurm_commands.states([f"7_{index}" for index in range(5)])
    assert found == {"7_0": "RUNNING", "7_1": "PENDING", "7_2": "PENDING"}
    script("squeue", "echo '7|CANCELLED'; echo '7_0|COMPLETED'")
    assert slurm_commands.states(["7_0", "7_1"]) == {"7_0": "COMPLETED", "7_1": "CANCELLED"}
    assert "--jobs=7\n" in (tmp_path / "asked").read_text()


def test_a_queue_that_does_not_answer_is_no_empty_one(
    command_line: CommandLine, cluster: None, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is at work would be submitted a second time."""
    command_line(*SUBMIT)
    monkeypatch.setattr(slurm_commands, "PAUSE_S", 0.0)
    script("squeue", f"echo asked >>{tmp_path}/asked; echo 'squeue: error: Unable to contact controller' >&2; exit 1")
    outcome = command_line(*SUBMIT)
    assert outcome.code == 2
    assert outcome.err == (
        "ava_exp: SLURM does not tell which jobs there are (squeue: error: Unable to contact controller): "
        "try again later.\n"
    )
    assert (tmp_path / "asked").read_text().count("asked") == slurm_commands.NUM_REPEATS + 1
    assert slurm_commands.states(["42"]) == {}, "where nothing depends on it, that is all"


def test_a_job_that_the_queue_forgot_is_looked_up_in_the_accounts(script: Script) -> None:
    script("sbatch", "")
    script("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    script("sacct", "echo '5|TIMEOUT'")
    assert slurm_commands.states(["5"]) == {"5": "TIMEOUT"}


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("0:59", 59),
        ("12:34", 754),
        ("1:00:00", 3600),
        ("2-03:04:05", 183_845),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_the_time_that_a_job_has_left(script: Script, told: str, seconds: float | None) -> None:
    script("squeue", f"echo '{told}'")
    assert slurm_commands.time_left_s("42") == seconds


def test_a_damaged_record_of_a_job_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "a-1").mkdir(parents=True)
    for text in ("{", "[]", "3", json.dumps([{"id": "1", "surprise": 2}])):
        (tmp_path / "jobs" / "a-1" / "jobs.json").write_text(text)
        assert all_jobs(tmp_path) == []
