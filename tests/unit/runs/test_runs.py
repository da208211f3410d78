"""`python -m ava_exp.runs`: what it tells of folders as runs leave them, and whom it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ava_exp.runs import catalogue
from ava_exp.runs.__main__ import main
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.jobs import Job, JobFolder
from ava_exp.tracking.lock import read_owner
from ava_exp.training.checkpoint import Snapshot, write_checkpoint
from ava_launchers.slurm_commands import ACTIVE

Run = Callable[..., RunFolder]
Ask = Callable[..., tuple[int, list[str], str]]


class PlayedCluster:
    """A cluster on which jobs are in the states that a test gives them."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.cancelled: list[str] = []

    def states(self, job_ids: Sequence[str], *, must_answer: bool = False) -> dict[str, str]:
        return {job_id: self.known[job_id] for job_id in job_ids if job_id in self.known}

    def is_active(self, state: str) -> bool:
        return state in ACTIVE

    def cancel(self, job_ids: Sequence[str]) -> None:
        self.cancelled += job_ids


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> PlayedCluster:
    played = PlayedCluster()
    monkeypatch.setattr(catalogue, "cluster", lambda: played)
    monkeypatch.setattr("ava_exp.runs.commands.cluster", lambda: played)
    return played


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Makes the folder of a run: its status, and a record for each of its steps."""

    def make(name: str, status: str | None = "finished", num_steps: int = 3, total: int = 10) -> RunFolder:
        folder = RunFolder(tmp_path / "outputs" / "runs" / name).create()
        if status:
            folder.write_json("status.json", {"status": status, "step": num_steps, "total_steps": total})
        records = [{"kind": "train", "step": step, "loss": 10.0 - step} for step in range(1, num_steps + 1)]
        records.append({"kind": "eval", "step": num_steps, "loss": 99.0})
        folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return make


def add_job(output_dir: Path, job_id: str, run_folder: RunFolder | None, name: str = "job") -> JobFolder:
    return add_array(output_dir, name, {job_id: run_folder})


def add_array(output_dir: Path, name: str, jobs: dict[str, RunFolder | None]) -> JobFolder:
    number = next(iter(jobs)).partition("_")[0]
    folder = JobFolder(output_dir / "jobs" / f"{name}-{number}")
    folder.logs.mkdir(parents=True)
    folder.write(
        [
            Job(
                id=job_id,
                name=name,
                launcher="launcher/slurm",
                stage="pretrain",
                run_folder=str(run_folder.root) if run_folder else None,
                overrides=["stage=plan", "model=tiny", "seed=1"],
                directory=str(output_dir.parent / "elsewhere"),
                submitted=f"2026-01-01T00:00:{int(number):02d}+00:00",
                commit="abc+",
            )
            for job_id, run_folder in jobs.items()
        ]
    )
    return folder


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Exit code, lines and errors of `python -m ava_exp.runs ARGUMENTS`."""
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: str) -> tuple[int, list[str], str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return asked


@pytest.fixture
def worker() -> Iterator[Callable[[RunFolder], subprocess.Popen[str]]]:
    """Starts a process that works in a run's folder until it is told to stop."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: RunFolder) -> subprocess.Popen[str]:
        code = (
            "import pathlib, signal, sys\n"
            "from ava_exp.tracking.lock import RunLock\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
            f"with RunLock(pathlib.Path({str(folder.lock)!r})):\n"
            "    print('at work', flush=True)\n"
            "    while True: signal.pause()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_nothing_is_listed_where_nothing_is(ask: Ask) -> None:
    assert ask("list") == (0, ["There are no runs in outputs yet."], "")


def test_runs_are_listed_with_status_step_and_newest_training_loss(ask: Ask, run: Run, tmp_path: Path) -> None:
    run("a-1", "finished", num_steps=10)
    run("b-2", "stopped")
    run("c-3", "failed")
    run("d-4", "running")
    run("e-5", None, num_steps=0)
    code, lines, _ = ask("list")
    assert code == 0
    assert lines[0].split() == ["name", "status", "step", "loss", "job"]
    assert sorted(line.split() for line in lines[1:]) == [
        ["a-1", "finished", "10/10", "0.0000"],
        ["b-2", "stopped", "3/10", "7.0000"],
        ["c-3", "failed", "3/10", "7.0000"],
        ["d-4", "interrupted", "3/10", "7.0000"],
        ["e-5", "interrupted"],
    ]
    assert ask("list", "--output-dir", str(tmp_path / "outputs"))[1] == lines


def test_jobs_are_listed_with_the_run_that_they_train(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path
) -> None:
    pending, done = run("a-1", None, num_steps=0), run("b-2", "finished")
    for job_id, folder in (("1", pending), ("2", pending), ("3", done), ("4", None)):
        add_job(tmp_path / "outputs", job_id, folder, "prepare" if folder is None else "job")
    cluster.known = {"1": "CANCELLED", "2": "PENDING", "3": "COMPLETED", "4": "FAILED"}
    rows = {row[0]: row for row in (line.split() for line in ask("list")[1][1:])}
    assert rows == {
        "a-1": ["a-1", "pending", "2"],
        "b-2": ["b-2", "finished", "3/10", "7.0000", "3"],
        "prepare-4": ["prepare-4", "failed", "4"],
    }


def test_a_process_at_work_is_seen_and_cancelled(
    ask: Ask, run: Run, worker: Callable[[RunFolder], subprocess.Popen[str]]
) -> None:
    folder = run("a-1", "running")
    process = worker(folder)
    assert ask("list")[1][1].split()[1] == "running"
    assert any(f"process     {process.pid}, since" in line for line in ask("show", "a-1")[1])
    code, lines, _ = ask("cancel", "a-1")
    assert (code, lines) == (
        0,
        [f"Process {process.pid} was asked to save and stop. The same command goes on from there."],
    )
    assert process.wait(20) == 75
    assert ask("list")[1][1].split()[1] == "interrupted"
    assert ask("cancel", "a-1")[::2] == (2, "ava_exp: a-1 is interrupted: there is nothing to cancel.\n")


def test_a_killed_process_is_no_process(
    ask: Ask, run: Run, worker: Callable[[RunFolder], subprocess.Popen[str]]
) -> None:
    folder = run("a-1", "running")
    process = worker(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_owner(folder.lock) is not None, "it did not tidy up"
    assert ask("list")[1][1].split()[1] == "interrupted"


def test_a_process_on_another_machine_is_named(ask: Ask, run: Run) -> None:
    folder = run("a-1", "running")
    folder.lock.write_text(json.dumps({"pid": 5, "host": "far", "started": "then", "command": "x"}))
    assert ask("list")[1][1].split()[1] == "running"
    assert ask("cancel", "a-1")[::2] == (2, "ava_exp: a-1 is the work of process 5 on far: cancel it there.\n")


def test_a_job_is_cancelled_by_the_cluster(ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path) -> None:
    add_job(tmp_path / "outputs", "7", run("a-1", "running"))
    cluster.known = {"7": "RUNNING"}
    assert ask("cancel", "7")[0] == 0
    assert cluster.cancelled == ["7"]
    cluster.known = {"7": "CANCELLED"}
    assert ask("cancel", "a-1")[0] == 2


def test_a_run_is_shown_with_results_differences_and_folders(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path
) -> None:
    folder = run("a-1")
    folder.write_json("summary.json", {"final": {"perplexity": 12.5}, "tokens": 4096})
    folder.write_json("difference.json", {"seed": [0, 3]})
    add_job(tmp_path / "outputs", "7", folder)
    cluster.known = {"7": "COMPLETED"}
    code, lines, _ = ask("show", "a-1")
    text = "\n".join(lines)
    assert code == 0
    for expected in (
        "finished",
        "3/10",
        "12.5000",
        "4096",
        "3 (not 0)",
        "outputs/runs/a-1",
        "outputs/jobs/job-7",
        "abc+",
    ):
        assert expected in text
    assert "7 (completed)" in text


@pytest.mark.parametrize("name", ["a-1", "latest", "7", "job-7", "outputs/runs/a-1"])
def test_a_run_has_many_names(ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path, name: str) -> None:
    folder = run("a-1")
    run("b-2")
    folder.point_latest(tmp_path / "outputs")
    add_job(tmp_path / "outputs", "7", folder)
    assert ask("show", name)[1][0].split() == ["name", "a-1"]


@pytest.mark.parametrize("name", ["7", "rates-7", "rates"])
def test_the_jobs_of_an_array_are_shown_watched_and_cancelled_together(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finished, *others = run("a-1"), run("b-2", "running"), run("c-3", None, num_steps=0)
    add_array(tmp_path / "outputs", "rates", {"7_0": finished, "7_1": others[0], "7_2": others[1]})
    add_job(tmp_path / "outputs", "8", run("d-4"))
    cluster.known = {"7_0": "COMPLETED", "7_1": "RUNNING", "7_2": "PENDING", "8": "RUNNING"}
    assert [line.split()[-1] for line in ask("show", name)[1]] == ["job", "7_0", "7_1", "7_2"]
    assert ask("logs", name)[::2] == (2, f"ava_exp: {name} is 3 jobs; name one of them, from 7_0 to 7_2.\n")
    assert ask("cancel", name)[:2] == (
        0,
        ["2 jobs are cancelled. The same command goes on from the newest checkpoint."],
    )
    assert cluster.cancelled == ["7_2", "7_1"], "what waits is not to take the place of what ends"
    monkeypatch.setattr("time.sleep", lambda seconds: cluster.known.update({"7_1": "CANCELLED", "7_2": "CANCELLED"}))
    code, lines, _ = ask("watch", name)
    assert (code, [line.partition("  ")[2] for line in lines]) == (
        1,
        ["1 finished, 1 pending, 1 running", "1 cancelled, 1 finished, 1 interrupted"],
    )
    assert ask("cancel", name)[0] == 2
    assert ask("show", "7_1")[1][0].split() == ["name", "b-2"], "each has its own name, too"


def test_an_older_job_of_a_run_is_found(ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path) -> None:
    folder = run("a-1")
    older = add_job(tmp_path / "outputs", "7", folder)
    add_job(tmp_path / "outputs", "8", folder)
    (older.logs / "7_0_log.out").write_text("said by 7\n")
    assert ask("logs", "7")[1] == ["said by 7"]


def test_an_unknown_name_is_refused_with_a_known_one(ask: Ask, run: Run) -> None:
    run("quick-1234")
    code, _, err = ask("show", "quick-1243")
    assert (code, err) == (
        2,
        "ava_exp: there is no run or job `quick-1243` in outputs; did you mean `quick-1234`?\n",
    )


def test_a_job_is_submitted_again_where_it_was(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Path, Sequence[str]]] = []
    monkeypatch.setattr("ava_exp.cli.main", lambda overrides: given.append((Path.cwd(), overrides)) or 5)
    (tmp_path / "elsewhere").mkdir()
    add_job(tmp_path / "outputs", "7", run("a-1"))
    run("b-2")
    assert ask("resubmit", "7")[0] == 5
    assert given == [(tmp_path / "elsewhere", ["stage=plan", "model=tiny", "seed=1"])]
    monkeypatch.chdir(tmp_path)
    assert ask("resubmit", "b-2")[::2] == (2, "ava_exp: b-2 was not a job: give its command again.\n")


def test_runs_are_compared_by_results_and_settings(ask: Ask, run: Run) -> None:
    for name, rate, perplexity in (("a-1", 0.1, 12.5), ("b-2", 0.2, 9.25)):
        folder = run(name)
        folder.write_json("summary.json", {"final": {"perplexity": perplexity}, "tokens": 4096})
        folder.config.write_text(f"seed: 3\noptimizer: {{learning_rate: {rate}}}\n")
    run("c-3", None, num_steps=0)
    code, lines, _ = ask("compare", "a-1", "b-2", "c-3")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert code == 0
    assert lines[0].split() == ["a-1", "b-2", "c-3"]
    assert rows["status"] == ["finished", "finished", "interrupted"]
    assert rows["validation"] == ["perplexity", "12.5", "9.25", "-"]
    assert rows["tokens"] == ["4096", "4096", "-"]
    assert rows["optimizer.learning_rate"] == ["0.1", "0.2", "-"]
    assert ask("compare", "a-1", "b-2")[1].count("seed") == 0, "what is the same is left out"
    assert ask("compare", "a-1", "a-1")[1][-1] == "no setting differs"
    assert ask("compare", "a-1")[0] == 2


def test_checkpoints_are_verified(ask: Ask, run: Run) -> None:
    folder = run("a-1")
    assert ask("verify", "a-1")[::2] == (2, "ava_exp: a-1 has no checkpoint.\n")
    good, bad = (
        write_checkpoint(folder.checkpoints, Snapshot(step=step, tensors={"model": {"weight": torch.ones(2)}}))
        for step in (1, 2)
    )
    assert ask("verify", "a-1")[:2] == (0, [f"{path.name}  is as it was written" for path in (good, bad)])
    (bad / "state.json").write_text('{"step": 3}')
    code, lines, _ = ask("verify", "a-1")
    assert code == 1
    assert lines[0] == f"{good.name}  is as it was written"
    assert lines[1].startswith(f"{bad.name}  state.json is not as it was written")


def test_the_end_of_a_log_is_shown(ask: Ask, run: Run) -> None:
    folder = run("a-1")
    (folder.logs / "training.log").write_text("".join(f"line {number}\n" for number in range(100)))
    (folder.logs / "errors.log").write_text("trouble\n")
    assert ask("logs", "a-1", "-n", "2")[1] == ["line 98", "line 99"]
    assert len(ask("logs", "a-1")[1]) == 20
    assert ask("logs", "a-1", "--file", "errors")[1] == ["trouble"]


def test_what_a_job_printed_stands_in_until_the_run_has_a_log(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path
) -> None:
    folder = run("a-1", None, num_steps=0)
    assert ask("logs", "a-1")[::2] == (2, "ava_exp: a-1 has not printed anything yet.\n")
    job = add_job(tmp_path / "outputs", "7", folder)
    for rank in (10, 2, 0):
        (job.logs / f"7_{rank}_log.out").write_text(f"said by {rank}\n")
    (job.logs / "7_1_log.out").touch()
    assert [line for line in ask("logs", "a-1")[1] if not line.startswith("──")] == [
        "said by 0",
        "said by 2",
        "said by 10",
    ]
    (folder.logs / "training.log").write_text("step 1\n")
    assert ask("logs", "a-1")[1] == ["step 1"]
    assert "said by 0" in ask("logs", "a-1", "--file", "job")[1]


def test_watching_tells_each_change_once_and_ends_with_the_run(
    ask: Ask, run: Run, cluster: PlayedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("a-1", None, num_steps=0)
    add_job(tmp_path / "outputs", "7", folder)
    cluster.known = {"7": "PENDING"}
    looks = 0

    def look(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            cluster.known = {"7": "RUNNING"}
        elif looks == 5:
            run("a-1", "finished", num_steps=10)
            cluster.known = {"7": "COMPLETED"}

    monkeypatch.setattr("time.sleep", look)
    code, lines, _ = ask("watch", "a-1")
    assert code == 0
    assert [line.split()[1:] for line in lines] == [["pending"], ["running"], ["finished", "10/10", "loss", "0.0000"]]


def test_watching_a_run_that_failed_ends_with_1(ask: Ask, run: Run) -> None:
    run("a-1", "failed")
    assert ask("watch", "a-1")[0] == 1


@pytest.mark.parametrize("arguments", [[], ["lst"], ["show"], ["logs", "a", "-n", "x"], ["logs", "a", "--file", "x"]])
def test_mistakes_are_one_line(ask: Ask, arguments: list[str]) -> None:
    code, _, err = ask(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1 and "--help" in err


def test_it_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from ava_exp.runs.__main__ import main; main(['list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_cluster_is_found_by_its_name() -> None:
    assert catalogue.cluster().is_active("RUNNING")
    assert not catalogue.cluster().is_active("COMPLETED")
