"""Writing, verifying, choosing and removing checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ava_exp.errors import CheckpointError
from ava_exp.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    newest_good_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    resolve_checkpoint,
    step_of,
    sweep_leftovers,
    verify_checkpoint,
    write_checkpoint,
)


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"a": torch.full((3,), float(step)), "b": torch.arange(4, dtype=torch.bfloat16)}}
    return Snapshot(step=step, tensors=tensors, state={"train": {"step": step, "ratio": 0.1 + 0.2}})


@pytest.mark.parametrize("write_bytes", [1, 7, 2**20])
def test_a_file_is_written_in_parts_as_the_library_writes_it_whole(
    tmp_path: Path, write_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats of every width, a scalar, an empty tensor, and one that is not contiguous."""
    monkeypatch.setattr("ava_exp.training.checkpoint.WRITE_BYTES", write_bytes)
    tensors = {
        "byte": torch.arange(5, dtype=torch.uint8),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "long": torch.tensor([-(2**62), 3]),
        "scalar": torch.tensor(4.5),
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.5, -2.0]).half(),
        "brain": torch.tensor([0.1]).bfloat16(),
        "truth": torch.tensor([True, False]),
        "int": torch.tensor([7], dtype=torch.int32),
        "double": torch.tensor([0.1], dtype=torch.float64),
    }
    folder = write_checkpoint(tmp_path, Snapshot(step=1, tensors={"model": tensors}))
    read = read_checkpoint(folder).tensors["model"]
    whole = safetensors.torch.load(safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()}))
    for name, tensor in whole.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert read.keys() == whole.keys()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot(7))
    read = read_checkpoint(folder)
    assert folder.name == "step_00000007"
    assert read.state == snapshot(7).state
    assert torch.equal(read.tensors["model"]["a"], torch.full((3,), 7.0))
    assert read.tensors["model"]["b"].dtype == torch.bfloat16


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot(1))
    for path in folder.iterdir():
        original = path.read_bytes()
        for position in range(0, len(original), 7):
            changed = bytearray(original)
            changed[position] ^= 0x04
            path.write_bytes(bytes(changed))
            if path.name != "manifest.json" or json_differs(original, bytes(changed)):
                assert verify_checkpoint(folder) is not None, (path.name, position)
        path.write_bytes(original)
    assert verify_checkpoint(folder) is None


def json_differs(a: bytes, b: bytes) -> bool:
    """A flip in the manifest's white space means nothing; one in `step` is not what protects the files."""
    try:
        one, other = json.loads(a), json.loads(b)
    except ValueError:
        return True
    return bool(one["files"] != other.get("files"))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_makes_it_no_checkpoint(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, snapshot(1))
    (folder / name).unlink()
    assert name in str(verify_checkpoint(folder))


def test_the_newest_good_one_is_chosen_and_the_bad_ones_are_named(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, snapshot(step)) for step in (1, 2, 3)]
    (folders[2] / "model.safetensors").write_bytes(b"short")
    found, problems = newest_good_checkpoint(tmp_path)
    assert found == folders[1]
    assert len(problems) == 1
    assert "step_00000003" in problems[0]
    for folder in folders[:2]:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used.*resume=never"):
        newest_good_checkpoint(tmp_path)


def test_no_checkpoints_is_not_an_error(tmp_path: Path) -> None:
    assert newest_good_checkpoint(tmp_path / "nothing") == (None, [])


def test_a_bad_one_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot(5))
    (folder / "state.json").write_text("{}")
    write_checkpoint(tmp_path, snapshot(5))
    assert verify_checkpoint(folder) is None
    assert (tmp_path / "step_00000005.bad" / "state.json").read_text() == "{}"


def test_best_and_latest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, snapshot(step))
    removed = prune_checkpoints(tmp_path, {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 6: 9.0}, num_best=2)
    assert removed == [1, 4, 5]
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [2, 3, 6]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(1))
    for name in ("step_00000002.tmp", "step_00000000.old"):
        (tmp_path / name).mkdir()
    sweep_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_paths_a_user_may_give(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoints", snapshot(3))
    assert {resolve_checkpoint(path) for path in (folder, tmp_path, tmp_path / "checkpoints")} == {folder}
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"\x80\x04.")
    for path in (pickled, tmp_path / "nowhere", tmp_path / "checkpoints" / ".." / "empty"):
        with pytest.raises(CheckpointError, match="`resume` must be"):
            resolve_checkpoint(path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, snapshot(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in str(verify_checkpoint(folder))
