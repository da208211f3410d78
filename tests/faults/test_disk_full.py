"""A full disk: what is there stays, what is half there goes, the user is told, and trying has an end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.training.checkpoint import step_of, verify_checkpoint
from tests.faults.faults import Fault
from tests.faults.harness import Experiment, uninterrupted


def no_space(operation: str = "write", path: str = r"\.tmp/", at: int = 1, times: int = 1) -> Fault:
    return Fault(action="no_space", operation=operation, path=path, at=at, times=times)


def steps_kept(experiment: Experiment) -> list[int]:
    """Return the steps of the checkpoints, all of which verify, and nothing else may lie beside them."""
    folders = sorted(experiment.folder.checkpoints.iterdir())
    assert [verify_checkpoint(folder) for folder in folders] == [None] * len(folders), folders
    return [step_of(folder) for folder in folders]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "flush", "fsync", "rename"])
def test_4_a_save_that_fails_is_told_and_training_goes_on(tmp_path: Path, operation: str, asynchronous: str) -> None:
    experiment = Experiment(output_dir=tmp_path, overrides=(f"checkpoint.asynchronous={asynchronous}",))
    ended = experiment.run(no_space(operation, path=r"step_00000006\.tmp"))
    assert ended.code == 0
    assert ended.err.count("checkpoint at step 6 was not saved: [Errno 28] No space left on device") == 1
    assert "Older ones are kept" in ended.err
    assert steps_kept(experiment) == [3, 9, 12]
    assert experiment.finish() == uninterrupted()


def test_4_after_three_failures_in_a_row_it_stops_with_what_it_has(experiment: Experiment) -> None:
    ended = experiment.run(no_space(path=r"step_000000(06|09|12)\.tmp", times=100))
    assert ended.code == EXIT_USER_ERROR and "Traceback" not in ended.err
    assert [ended.err.count(f"checkpoint at step {step} was not saved") for step in (6, 9, 12)] == [1, 1, 1]
    assert "3 checkpoints in a row could not be saved" in ended.err
    assert "No space left on device" in ended.err and "Make room there and give the same command again" in ended.err
    assert steps_kept(experiment) == [3]
    assert experiment.folder.read_json("status.json")["status"] == "failed"
    again = experiment.run()
    assert "Going on from step 3" in again.out
    assert experiment.finish() == uninterrupted()


def test_4_failures_that_are_not_in_a_row_do_not_stop_it(experiment: Experiment) -> None:
    ended = experiment.run(*(no_space(path=rf"step_000000{step}\.tmp") for step in ("03", "06", "12")))
    assert ended.code == 0 and ended.err.count("was not saved") == 3
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_4_the_last_save_is_tried_again(tmp_path: Path, asynchronous: str) -> None:
    """No further one will come to make up for it: a finished run must have its weights."""
    experiment = Experiment(output_dir=tmp_path, overrides=(f"checkpoint.asynchronous={asynchronous}",))
    ended = experiment.run(no_space(path=r"step_00000012\.tmp"))
    assert ended.code == 0
    assert ended.err.count("checkpoint at step 12 was not saved") == 1
    assert steps_kept(experiment)[-1] == 12
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("also", [(), (Fault(action="SIGTERM", operation="step", at=8),)], ids=["finished", "stopped"])
def test_4_a_run_whose_last_state_is_not_on_disk_says_neither_finished_nor_saved(
    experiment: Experiment, also: tuple[Fault, ...]
) -> None:
    ended = experiment.run(no_space(path=r"step_000000(08|12)\.tmp", times=100), *also)
    assert ended.code == EXIT_USER_ERROR
    assert "Stopped by" not in ended.out and "Report" not in ended.out
    assert ended.err.count("was not saved") == 3, "the attempts are bounded"
    assert experiment.folder.read_json("status.json")["status"] == "failed"
    assert "This run is finished" not in experiment.run().out
    assert experiment.finish() == uninterrupted()


def test_4_the_error_is_told_although_the_status_cannot_be_written_either(experiment: Experiment) -> None:
    nothing_fits = no_space(path=r"\.tmp/|/\.status\.json", at=20, times=1000)
    ended = experiment.run(nothing_fits)
    assert ended.code == EXIT_USER_ERROR
    assert "ava_exp: 3 checkpoints in a row could not be saved" in ended.err


def test_4_a_removal_that_fails_does_not_stop_the_run(experiment: Experiment) -> None:
    ended = experiment.run(no_space("rename", path=r"step_00000003$"))
    assert ended.code == 0
    assert "step_00000003" in ended.err
    assert experiment.finish() == uninterrupted()


def test_5_metrics_and_logs_without_room_do_not_stop_the_run(experiment: Experiment) -> None:
    ended = experiment.run(no_space(path=r"metrics\.jsonl|/logs/", at=8, times=20))
    assert ended.code == 0, ended.err
    assert ended.err.count("Metrics cannot be written") == 1
    assert ended.err.count("Logs cannot be written") == 1
    assert experiment.finish() == uninterrupted(), "the records waited in memory until there was room"


def test_5_metrics_that_cannot_be_synced_do_not_stop_the_run(experiment: Experiment) -> None:
    ended = experiment.run(no_space("fsync", path=r"metrics\.jsonl"))
    assert ended.code == 0, ended.err
    assert experiment.finish() == uninterrupted()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place))
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(arguments, 127, "", str(error))


def test_4_on_a_real_disk_that_is_full(small_disk: Path) -> None:
    experiment = Experiment(output_dir=small_disk)
    ended = experiment.run()
    assert ended.code == EXIT_USER_ERROR, ended
    assert "No space left on device" in ended.err and "Traceback" not in ended.err
    assert steps_kept(experiment) == [3, 6]
    assert mount("-o", "remount,size=20m", str(small_disk)).returncode == 0
    again = experiment.run()
    assert again.code == 0 and "Going on from step 6" in again.out
    assert experiment.finish() == uninterrupted()


def test_4_on_a_real_disk_a_stop_is_not_called_saved(small_disk: Path) -> None:
    experiment = Experiment(output_dir=small_disk)
    ended = experiment.run(Fault(action="SIGTERM", operation="step", at=8))
    assert ended.code == EXIT_USER_ERROR != EXIT_RESUMABLE
    assert steps_kept(experiment) == [3, 6]
