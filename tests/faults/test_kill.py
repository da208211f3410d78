"""Processes that are killed: the same command then ends as if nothing had ever happened, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from ava_exp.tracking.metrics import read_metrics
from ava_exp.training.checkpoint import newest_good_checkpoint, step_of, verify_checkpoint
from tests.faults.faults import Fault, kill_at_step
from tests.faults.harness import NUM_STEPS, SAVE_EVERY, SYNCHRONOUS, Experiment, uninterrupted

SETTINGS = (
    ("precision=fp32",),
    ("precision=mixed_bf16",),
    ("precision=bf16", "training.gradient_accumulation_steps=2"),
)
OPERATIONS_OF_A_SAVE = 28
SLOWEST_STEP_S = 0.015
NUM_SHARES = 4


def in_a_save(chance: random.Random, num_saves: int) -> Fault:
    """Kill at some operation of one of the next saves, half of the times in the middle of a write."""
    if chance.random() < 0.5:
        return Fault(action="tear", operation="write", at=chance.randint(1, 6 * num_saves))
    return Fault(at=chance.randint(1, OPERATIONS_OF_A_SAVE * num_saves), after=chance.random() < 0.5)


def at_any_moment(chance: random.Random, last_step: int) -> Fault:
    return kill_at_step(chance.randint(1, last_step), delay_s=chance.uniform(1e-4, SLOWEST_STEP_S))


@pytest.mark.parametrize("seed", range(12))
def test_1_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    """Two kills a seed, one of them inside a save; every second seed begins with that one."""
    chance, settings = random.Random(seed), SETTINGS[seed % len(SETTINGS)]
    asynchronous = f"checkpoint.asynchronous={str(seed % 4 < 2).lower()}"
    experiment = Experiment(output_dir=tmp_path, overrides=(*settings, asynchronous))
    if seed % 2:
        faults = [in_a_save(chance, num_saves=3), at_any_moment(chance, last_step=2)]
    else:
        faults = [at_any_moment(chance, last_step=NUM_STEPS - 1), in_a_save(chance, num_saves=1)]
    for fault in faults:
        ended = experiment.run(fault)
        assert ended.killed, (fault, ended)
    assert experiment.finish() == uninterrupted(*settings)


def test_the_comparison_sees_differences(tmp_path: Path) -> None:
    plain, other = Experiment(output_dir=tmp_path / "a"), Experiment(output_dir=tmp_path / "b", overrides=("seed=1",))
    assert plain.finish() == uninterrupted() != other.finish()
    assert plain.finish().records != uninterrupted("precision=bf16").records
    random_states = {run.finish().final["random.safetensors"] for run in (plain, other)}
    assert len(random_states) == 2


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A run killed in its seventh step, and what the same command would do to checkpoints from there to the end."""

    experiment: Experiment
    operations: list[tuple[str, str]]


def interrupted(place: Path, *overrides: str) -> Interrupted:
    experiment = Experiment(output_dir=place / "interrupted", overrides=(SYNCHRONOUS, *overrides))
    assert experiment.run(kill_at_step(7)).killed
    dry_run = experiment.copy(place / "dry_run").run()
    return Interrupted(experiment, [name for name in dry_run.operations if "/checkpoints" in name[1]])


@pytest.fixture(scope="module")
def before_a_save(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    return interrupted(tmp_path_factory.mktemp("save"))


@pytest.fixture(scope="module")
def before_a_removal(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    return interrupted(tmp_path_factory.mktemp("removal"), "checkpoint.save_total_limit=0")


def numbers_of(operations: list[tuple[str, str]], path: str) -> list[int]:
    """Return the numbers of a block of operations, from the first to the last that concerns `path`."""
    numbers = [number for number, (_, concerned) in enumerate(operations, start=1) if path in concerned]
    return list(range(numbers[0], numbers[-1] + 1))


def test_a_save_syncs_before_it_renames(before_a_save: Interrupted) -> None:
    """The recipe itself: every file is on the disk before the manifest is begun, and that before the rename."""
    operations = before_a_save.operations
    save = [operations[number - 1] for number in numbers_of(operations, "step_00000009")]
    names = [f"{operation} {Path(path).name}" for operation, path in save]
    files = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "routing.safetensors")
    files = (*files, "state.json", "manifest.json")
    of_files = [f"{operation} {file}" for file in files for operation in ("open", "write", "flush", "fsync")]
    folder = "step_00000009.tmp"
    assert names == [f"mkdir {folder}", *of_files, f"fsync {folder}", f"rename {folder}"]
    assert operations[numbers_of(operations, "step_00000009")[-1]][0] == "fsync", "the rename must be synced too"


@pytest.mark.parametrize("share", range(NUM_SHARES))
def test_2_killed_at_every_operation_of_a_save(tmp_path: Path, before_a_save: Interrupted, share: int) -> None:
    """Before the first operation, between each two, after the last one, and in the middle of every write."""
    save = numbers_of(before_a_save.operations, "step_00000009")
    save.append(save[-1] + 1)  # the synchronisation of the folder after the rename
    faults = [Fault(at=number, path="/checkpoints") for number in save]
    faults.append(Fault(at=save[-1], path="/checkpoints", after=True))
    writes = [number for number in save if before_a_save.operations[number - 1][0] == "write"]
    faults += [Fault(action="tear", at=number, path="/checkpoints") for number in writes]
    assert len(faults) == OPERATIONS_OF_A_SAVE + 1 + 6
    for number, fault in list(enumerate(faults))[share::NUM_SHARES]:
        experiment = before_a_save.experiment.copy(tmp_path / str(number))
        assert experiment.run(fault).killed, fault
        newest, problems = newest_good_checkpoint(experiment.folder.checkpoints)
        was_renamed = fault.at == save[-1]
        assert newest is not None and step_of(newest) == (9 if was_renamed else 6), fault
        assert problems == [], "an unfinished save must not look like a checkpoint"
        assert experiment.finish() == uninterrupted(), fault


def test_3_killed_at_every_operation_of_a_removal(tmp_path: Path, before_a_removal: Interrupted) -> None:
    removal = numbers_of(before_a_removal.operations, "step_00000006")
    kinds = [before_a_removal.operations[number - 1][0] for number in removal]
    assert kinds == ["rename", *["unlink"] * 6, "rmdir"]
    faults = [Fault(at=number, path="/checkpoints") for number in removal]
    for number, fault in enumerate([*faults, Fault(at=removal[-1], path="/checkpoints", after=True)]):
        experiment = before_a_removal.experiment.copy(tmp_path / str(number))
        assert experiment.run(fault).killed, fault
        newest, problems = newest_good_checkpoint(experiment.folder.checkpoints)
        assert newest is not None and step_of(newest) == 9 and problems == [], fault
        assert experiment.finish() == uninterrupted(), fault
        assert [step_of(path) for path in experiment.checkpoints] == [NUM_STEPS], "what was half removed must go"
        assert len(list(experiment.folder.checkpoints.iterdir())) == 1


def test_killed_before_the_first_checkpoint_it_starts_from_zero_with_empty_metrics(experiment: Experiment) -> None:
    assert experiment.run(kill_at_step(SAVE_EVERY)).killed
    assert [record["step"] for record in read_metrics(experiment.folder.metrics)] == [1, 2]
    ended = experiment.run(kill_at_step(1))
    assert ended.killed and "Going on" not in ended.out
    assert read_metrics(experiment.folder.metrics) == []
    assert experiment.finish() == uninterrupted()


def test_metrics_hold_each_step_once_whatever_was_written_after_the_checkpoint(experiment: Experiment) -> None:
    for _ in range(3):
        assert experiment.run(kill_at_step(6)).killed  # each goes on from the newest checkpoint and gets 5 steps far
        with experiment.folder.metrics.open("ab") as file:
            file.write(b'{"kind": "train", "step": 1')  # torn by the kill
    experiment.finish()
    records = read_metrics(experiment.folder.metrics)
    steps = {kind: [r["step"] for r in records if r["kind"] == kind] for kind in ("train", "eval")}
    assert steps == {"train": list(range(1, NUM_STEPS + 1)), "eval": [3, 6, 9, 12]}
    text = experiment.folder.metrics.read_text()
    assert text.count("\n") == len(records) and text.endswith("}\n")


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_killed_while_the_metrics_are_cut_back(experiment: Experiment, operation: str) -> None:
    assert experiment.run(kill_at_step(6)).killed
    assert experiment.run(Fault(operation=operation, path=r"\.metrics\.jsonl\.")).killed
    assert experiment.finish() == uninterrupted()


def test_killed_after_the_last_checkpoint_it_only_finishes(experiment: Experiment) -> None:
    assert experiment.run(Fault(operation="rename", path="step_00000012", after=True)).killed
    ended = experiment.run()
    assert ended.code == 0 and ("step", "") not in ended.operations
    assert experiment.finish() == uninterrupted()
    assert experiment.folder.read_json("status.json")["status"] == "finished"
    assert experiment.folder.read_json("summary.json")["steps"] == NUM_STEPS


@pytest.mark.parametrize(
    ("operation", "file"),
    [
        ("write", "config.yaml"),
        ("rename", "resolution.json"),
        ("rename", "metadata.json"),
        ("rename", "status.json"),
        ("rename", "latest"),
    ],
)
def test_killed_while_the_run_is_described(experiment: Experiment, operation: str, file: str) -> None:
    """Files that say what a run is are whole, absent, or written again, at its first start and at a later one."""
    for _ in range(2):
        assert experiment.run(Fault(action="tear", operation=operation, path=rf"/\.?{file}")).killed
        assert experiment.run(kill_at_step(5)).killed
    assert experiment.finish() == uninterrupted()
    assert len(list((experiment.output_dir / "runs").iterdir())) == 1


def test_all_checkpoints_that_are_kept_can_be_used(experiment: Experiment) -> None:
    experiment.finish()
    assert len(experiment.checkpoints) == 3
    assert [verify_checkpoint(path) for path in experiment.checkpoints] == [None] * 3
