"""Run folders: where things lie, how a run is found again, and what is refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ava_exp.errors import RunFolderError
from ava_exp.tracking.folder import RunFolder, new_attempt, newest_attempt


def test_attempts_are_numbered_and_the_newest_is_found(tmp_path: Path) -> None:
    assert newest_attempt(tmp_path, "quick-1a2b") is None
    roots = [new_attempt(tmp_path, "quick-1a2b").root for _ in range(11)]
    assert [root.name for root in roots[:3]] == ["quick-1a2b", "quick-1a2b-2", "quick-1a2b-3"]
    assert newest_attempt(tmp_path, "quick-1a2b") == RunFolder(tmp_path / "runs" / "quick-1a2b-11")


def test_a_run_whose_name_continues_another_is_not_its_attempt(tmp_path: Path) -> None:
    new_attempt(tmp_path, "quick-1a2b-large")
    new_attempt(tmp_path, "quick-1a2b-01")
    assert newest_attempt(tmp_path, "quick-1a2b") is None


def test_simultaneous_attempts_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(lambda _: new_attempt(tmp_path, "run").root, range(24)))
    assert len(set(roots)) == 24


def test_an_attempt_has_its_subfolders(tmp_path: Path) -> None:
    folder = new_attempt(tmp_path, "run")
    assert folder.checkpoints.is_dir() and folder.figures.is_dir() and folder.logs.is_dir()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "a/b", "..", "", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="`name` must be usable as the name of a folder"):
        new_attempt(tmp_path, name)


def test_a_link_in_the_place_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="is a link"):
        newest_attempt(tmp_path, "run")


def test_json_is_replaced_whole_and_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).create()
    assert folder.read_json("status.json") is None
    folder.write_json("status.json", {"status": "running", "path": tmp_path, "loss": float("nan")})
    folder.write_json("status.json", {"status": "finished"})
    assert folder.read_json("status.json") == {"status": "finished"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["status.json"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"sta')
    with pytest.raises(RunFolderError, match=r"status\.json cannot be read"):
        RunFolder(tmp_path).read_json("status.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).create()
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(RunFolderError, match=r"summary\.json cannot be written"):
        folder.write_json("summary.json", {})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_latest_is_a_relative_link_that_follows_the_runs(tmp_path: Path) -> None:
    first, second = new_attempt(tmp_path, "run"), new_attempt(tmp_path, "run")
    first.point_latest(tmp_path)
    second.point_latest(tmp_path)
    assert os.readlink(tmp_path / "latest") == "runs/run-2"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "latest").resolve() == (moved / "runs" / "run-2").resolve()


def test_latest_survives_many_writers(tmp_path: Path) -> None:
    folders = [new_attempt(tmp_path, "run") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda folder: folder.point_latest(tmp_path), folders * 10))
    assert (tmp_path / "latest").resolve() in {folder.root.resolve() for folder in folders}
    assert [path.name for path in tmp_path.iterdir()] != [] and not list(tmp_path.glob(".latest*"))


def test_a_folder_called_latest_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest" / "precious").mkdir(parents=True)
    new_attempt(tmp_path, "run").point_latest(tmp_path)
    assert "was not updated" in caplog.text
    assert (tmp_path / "latest" / "precious").is_dir()
