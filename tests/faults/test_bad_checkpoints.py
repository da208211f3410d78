"""Checkpoints that are damaged, incomplete or forged: noticed, told, never trusted, and never the end of a run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ava_exp.errors import EXIT_USER_ERROR, CheckpointError
from ava_exp.training.checkpoint import (
    Snapshot,
    newest_good_checkpoint,
    read_checkpoint,
    resolve_checkpoint,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from tests.faults.faults import Fault, kill_at_step
from tests.faults.harness import SYNCHRONOUS, Ended, Experiment, uninterrupted

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
FLIPS_PER_FILE = 100
HEADER_BYTES = 64


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run with checkpoints at steps 3, 6 and 9, killed in its eleventh step."""
    made = Experiment(output_dir=tmp_path_factory.mktemp("killed") / "outputs", overrides=(SYNCHRONOUS,))
    assert made.run(kill_at_step(11)).killed
    assert [step_of(path) for path in made.checkpoints] == [3, 6, 9]
    return made


@pytest.fixture
def run(killed_run: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the killed run, to be damaged."""
    return killed_run.copy(tmp_path / "outputs")


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def contents(folder: Path) -> dict[str, str]:
    """Return a checksum of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_refused_in_one_line(ended: Ended) -> bool:
    lines = [line for line in ended.err.splitlines() if line.startswith("ava_exp: ")]
    return ended.code == EXIT_USER_ERROR and len(lines) == 1 and "Traceback" not in ended.err


@pytest.mark.parametrize("file", FILES)
def test_7_a_flipped_bit_anywhere_is_noticed(run: Experiment, file: str) -> None:
    chance, checkpoint = random.Random(file), run.checkpoints[-1]
    path = checkpoint / file
    size = path.stat().st_size
    everywhere = [chance.randrange(size) for _ in range(FLIPS_PER_FILE)]
    for position in [*range(min(HEADER_BYTES, size)), *everywhere]:
        bit = chance.randrange(8)
        flip(path, position, bit)
        assert verify_checkpoint(checkpoint) is not None, f"bit {bit} of byte {position}"
        flip(path, position, bit)
    assert verify_checkpoint(checkpoint) is None


def test_7_each_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Nothing holds a checksum of the manifest itself."""
    snapshot = Snapshot(step=9, tensors={"model": {"a": torch.arange(3.0)}}, state={"train": {"step": 9}})
    checkpoint = write_checkpoint(tmp_path, snapshot)
    manifest = checkpoint / "manifest.json"
    for position in range(manifest.stat().st_size):
        for bit in range(8):
            flip(manifest, position, bit)
            assert verify_checkpoint(checkpoint) is not None, f"bit {bit} of byte {position}"
            flip(manifest, position, bit)
    assert verify_checkpoint(checkpoint) is None


def flip_somewhere(path: Path) -> None:
    chance = random.Random(path.name)
    flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage", [flip_somewhere, truncate, Path.unlink], ids=["7_flipped", "7_truncated", "8_missing"]
)
@pytest.mark.parametrize("file", FILES)
def test_7_8_the_next_older_checkpoint_is_used(run: Experiment, file: str, damage: Callable[[Path], None]) -> None:
    newest = run.checkpoints[-1]
    damage(newest / file)
    damaged = contents(newest)
    ended = run.run()
    assert ended.code == 0
    assert "step_00000009 is not used" in ended.err and file in ended.err
    assert "Going on from step 6" in ended.out
    assert run.finish() == uninterrupted()
    assert contents(newest.with_name("step_00000009.bad")) == damaged, "what is bad is kept, under another name"


def test_7_two_bad_ones_in_a_row(run: Experiment) -> None:
    for checkpoint in run.checkpoints[1:]:
        flip_somewhere(checkpoint / "model.safetensors")
    ended = run.run()
    assert "Going on from step 3" in ended.out
    assert all(f"step_0000000{step} is not used" in ended.err for step in (6, 9))
    assert run.finish() == uninterrupted()


def test_7_a_checkpoint_in_the_place_of_another_is_noticed(run: Experiment) -> None:
    _, middle, newest = run.checkpoints
    other = newest.with_name("other")
    newest.rename(other)
    middle.rename(newest)
    assert "Going on from step 3" in run.run().out
    assert run.finish() == uninterrupted()


def test_7_a_save_survives_although_a_bad_checkpoint_is_newer(tmp_path: Path) -> None:
    """The newest name is not the newest good one: it must not be what is kept in its place."""
    run = Experiment(output_dir=tmp_path, overrides=(SYNCHRONOUS, "checkpoint.save_total_limit=1"))
    assert run.run(kill_at_step(11)).killed
    flip_somewhere(run.checkpoints[-1] / "model.safetensors")
    assert run.run(Fault(action="SIGTERM", operation="step", at=1)).code == 75
    newest, problems = newest_good_checkpoint(run.folder.checkpoints)
    assert newest is not None and step_of(newest) == 7 and problems == []
    assert run.finish() == uninterrupted()


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_something_older_is_kept_even_when_nothing_was_evaluated(tmp_path: Path, num_kept: int) -> None:
    overrides = (f"checkpoint.save_total_limit={num_kept}", "evaluation.interval_steps=100")
    run = Experiment(output_dir=tmp_path, overrides=overrides)
    run.finish()
    assert [step_of(path) for path in run.checkpoints] == [6, 9, 12][-1 - num_kept :]


def test_9_when_every_checkpoint_is_bad_nothing_is_lost_and_nothing_starts(run: Experiment) -> None:
    for checkpoint in run.checkpoints:
        flip_somewhere(checkpoint / "optimizer.safetensors")
    for ending in (".tmp", ".old"):
        (run.folder.checkpoints / f"step_00000011{ending}").mkdir()
        (run.folder.checkpoints / f"step_00000011{ending}" / "model.safetensors").write_bytes(b"perhaps the last hope")
    before, metrics = contents(run.folder.checkpoints), run.folder.metrics.read_bytes()
    ended = run.run()
    assert is_refused_in_one_line(ended), ended
    assert all(f"step_0000000{step} is not used: optimizer.safetensors is not" in ended.err for step in (3, 6, 9))
    assert "resume=never" in ended.err
    assert ("step", "") not in ended.operations
    assert contents(run.folder.checkpoints) == before
    assert run.folder.metrics.read_bytes() == metrics
    assert run.finish(also=["resume=never"]) == uninterrupted()
    assert contents(run.folder.root.with_name(run.folder.root.name.removesuffix("-2")) / "checkpoints") == before


def forge(checkpoint: Path, file: str, content: bytes) -> None:
    """Replace a file, and its description in the manifest too."""
    (checkpoint / file).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def tensor_file(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(**changes: object) -> bytes:
    return tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}})


HOSTILE_HEADERS = {
    "empty": b"",
    "shorter than a length": b"\x01\0\0",
    "a length of 8 exbibytes": tensor_file({}, length=2**63 - 1),
    "a negative length": tensor_file({}, length=2**64 - 1),
    "a length of a tebibyte": tensor_file({}, length=2**40),
    "a length beyond the file": tensor_file({}, length=1000),
    "not JSON": tensor_file(b"\xff" * 100),
    "not an object": tensor_file([1, 2]),
    "a million brackets": tensor_file(b"[" * 1_000_000),
    "nested too deeply": tensor_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no offsets": tensor_file({"a": {"dtype": "F32", "shape": [2]}}),
    "offsets beyond the file": one_tensor(data_offsets=[0, 2**50], shape=[2**48]),
    "offsets backwards": one_tensor(data_offsets=[8, 0]),
    "a negative shape": one_tensor(shape=[-2]),
    "a shape of more than the data": one_tensor(shape=[2**31, 2**31]),
    "a shape that overflows": one_tensor(shape=[2**62, 2**62]),
    "an unknown dtype": one_tensor(dtype="F31"),
    "a dtype that torch lacks": one_tensor(dtype="F6_E2M3", shape=[16], data_offsets=[0, 12]),
    "a hole in the data": tensor_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
    "data nobody owns": tensor_file({}),
}


@pytest.mark.parametrize("content", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_39_a_hostile_header_is_one_clear_error_even_with_a_manifest_that_matches(
    run: Experiment, content: bytes
) -> None:
    newest = run.checkpoints[-1]
    (newest / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not as it was written" in str(verify_checkpoint(newest))
    forge(newest, "model.safetensors", content)
    assert verify_checkpoint(newest) is None
    with pytest.raises(CheckpointError, match=r"step_00000009 cannot be read: model\.safetensors"):
        read_checkpoint(newest)


def test_39_the_command_says_it_in_one_line(run: Experiment) -> None:
    forge(run.checkpoints[-1], "model.safetensors", HOSTILE_HEADERS["a length of a tebibyte"])
    ended = run.run()
    assert is_refused_in_one_line(ended), ended
    assert "step_00000009 cannot be read: model.safetensors" in ended.err


HOSTILE_MANIFESTS = {
    "empty": b"",
    "not JSON": b"{",
    "not text": b"\x80\x04\x95",
    "not an object": b"[]",
    "nothing in it": b"{}",
    "a million brackets": b"[" * 1_000_000,
    "an endless number": b"1" * 1_000_000,
    "another format": b'{"files": {}, "format": 99, "step": 9}',
    "no files": b'{"files": {}, "format": 1, "step": 9}',
    "files that are a list": b'{"files": ["state.json"], "format": 1, "step": 9}',
    "a file outside": b'{"files": {"../state.json": {"bytes": 1, "sha256": ""}}, "format": 1, "step": 9}',
    "a file that is a folder": b'{"files": {"..": {"bytes": 1, "sha256": ""}}, "format": 1, "step": 9}',
    "a step that is a text": b'{"files": {}, "format": 1, "step": "9"}',
}


@pytest.mark.parametrize("content", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_a_hostile_manifest_makes_it_no_checkpoint(run: Experiment, content: bytes) -> None:
    (run.checkpoints[-1] / "manifest.json").write_bytes(content)
    found, problems = newest_good_checkpoint(run.folder.checkpoints)
    assert found is not None and step_of(found) == 6
    assert len(problems) == 1 and "step_00000009" in problems[0]


HOSTILE_STATES = {
    "not JSON": b"{",
    "not text": b"\x80\x04\x95",
    "not an object": b"[1]",
    "a million brackets": b"[" * 1_000_000,
    "empty": b"{}",
    "no train": b'{"fingerprints": {}}',
    "an unknown field": b'{"train": {"evaluations": {}, "surprise": 1}, "optimizer": {}, "random": {}}',
    "evaluations of no step": b'{"train": {"evaluations": {"x": 1}}, "optimizer": {}, "random": {}}',
    "a list for train": b'{"train": [], "optimizer": {}, "random": {}}',
    "no random numbers": b'{"train": {"evaluations": {}}, "optimizer": {}, "random": {"numpy": [], "python": []}}',
    "an unknown weight": b'{"train": {"evaluations": {}}, "optimizer": {"surprise/step": 1}, "random": {}}',
    "fingerprints that are a list": b'{"train": {"evaluations": {}}, "fingerprints": []}',
}


@pytest.mark.parametrize("content", HOSTILE_STATES.values(), ids=HOSTILE_STATES.keys())
def test_a_forged_state_is_one_clear_error(run: Experiment, content: bytes) -> None:
    forge(run.checkpoints[-1], "state.json", content)
    ended = run.run(also=["allow_changed_inputs=true"])
    assert is_refused_in_one_line(ended), ended
    assert ("step", "") not in ended.operations


@pytest.mark.parametrize("file", ["optimizer.safetensors", "random.safetensors", "model.safetensors"])
def test_8_a_manifest_without_a_file_is_refused(run: Experiment, file: str) -> None:
    """Written so from the start: complete by its own account, yet not enough to go on from."""
    newest = run.checkpoints[-1]
    (newest / file).unlink()
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][file]
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    ended = run.run()
    assert is_refused_in_one_line(ended), ended
    assert file.removesuffix(".safetensors") in ended.err


def test_random_states_of_another_size_are_refused(run: Experiment) -> None:
    newest = run.checkpoints[-1]
    forge(newest, "random.safetensors", (newest / "model.safetensors").read_bytes())
    assert is_refused_in_one_line(run.run())


def test_files_that_the_manifest_does_not_name_are_not_read(run: Experiment) -> None:
    newest = run.checkpoints[-1]
    (newest / "surprise.safetensors").write_bytes(HOSTILE_HEADERS["not JSON"])
    assert sorted(read_checkpoint(newest).tensors) == ["model", "optimizer", "random", "routing"]


class Malicious:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def bombs(mark: Path) -> dict[str, bytes]:
    archive = mark.with_name("bomb")
    torch.save({"weights": Malicious(mark)}, archive)
    bare = pickle.dumps(Malicious(mark))
    return {"bare": bare, "archive": archive.read_bytes(), "after a header": tensor_file({}, data=bare)}


def test_35_the_bombs_are_live(tmp_path: Path) -> None:
    made = bombs(tmp_path / "mark")
    pickle.loads(made["bare"])  # noqa: S301 - what nothing in the package may do
    (tmp_path / "mark").rmdir()
    torch.load(io.BytesIO(made["archive"]), weights_only=False)
    (tmp_path / "mark").rmdir()


@pytest.mark.parametrize("kind", ["bare", "archive", "after a header"])
@pytest.mark.parametrize("file", FILES)
def test_35_a_pickle_in_the_place_of_a_file_is_never_executed(
    run: Experiment, tmp_path: Path, file: str, kind: str
) -> None:
    content, newest = bombs(tmp_path / "mark")[kind], run.checkpoints[-1]
    if file == "manifest.json":
        (newest / file).write_bytes(content)
        assert run.run().code == 0, "the next older one is used"
    else:
        forge(newest, file, content)
        assert is_refused_in_one_line(run.run())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "checkpoint.pkl", "folder"])
def test_35_36_a_pickle_given_by_name_is_refused_and_never_executed(run: Experiment, tmp_path: Path, name: str) -> None:
    given = tmp_path / name
    given.mkdir() if name == "folder" else None
    for kind, content in bombs(tmp_path / "mark").items():
        if name == "folder":
            for inside in ("pytorch_model.bin", "optimizer.pt", "random_states_0.pkl", ".metadata", "manifest.json"):
                (given / inside).write_bytes(content)
        else:
            given.write_bytes(content)
        ended = run.run(also=[f"resume={given}"])
        assert is_refused_in_one_line(ended), (kind, ended)
        assert not (tmp_path / "mark").exists()
        with pytest.raises(CheckpointError):
            resolve_checkpoint(given)
    assert len(list((run.output_dir / "runs").iterdir())) == 1, "a refused command must not leave an attempt behind"
    assert run.finish() == uninterrupted()


def test_36_the_refusal_says_what_can_be_given(run: Experiment, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    ended = run.run(also=[f"resume={tmp_path / 'model.pt'}"])
    assert "`resume` must be `auto`, `never`, or a checkpoint or run folder of this program" in ended.err
    assert "model.pt" in ended.err
