"""Rules about files, folders and the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine_rules import BYTES_PER_PARAMETER
from ava_exp.config.validate import Severity, validate


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def faults(*overrides: str) -> list[tuple[Severity, str]]:
    return [(fault.severity, fault.key) for fault in validate(compose(["~local", *overrides]))]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    assert faults() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output_dir", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_place_of_the_output_folder_is_critical(output_dir: str) -> None:
    Path("file").write_text("")
    found = faults(f"output_dir={output_dir}")
    assert found == [(Severity.critical, "output_dir"), (Severity.critical, "cache_dir")]


def test_a_dangling_link_in_the_place_of_the_output_folder_is_critical() -> None:
    Path("outputs").symlink_to("nowhere")
    assert (Severity.critical, "output_dir") in faults()


def test_planning_writes_nothing_and_needs_no_folder() -> None:
    Path("outputs").write_text("")
    assert faults("stage=plan") == []


def test_missing_and_empty_data_are_errors() -> None:
    Path("empty.txt").write_text("")
    Path("empty").mkdir()
    Path("full.txt").write_text("text")
    error = [(Severity.error, "data.paths")]
    assert faults("data=files", "data.paths=[]") == error
    assert faults("data=files", "data.paths=[missing.txt]") == error
    assert faults("data=files", "data.paths=['*.nothing']") == error
    assert faults("data=files", "data.paths=[empty.txt, empty]") == error * 2
    assert faults("data=files", "data.paths=['*.txt', full.txt]") == []


def test_a_missing_tokenizer_and_a_missing_checkpoint_are_errors() -> None:
    assert faults("tokenizer=file", "tokenizer.path=missing.json") == [(Severity.error, "tokenizer.path")]
    assert faults("resume=missing") == [(Severity.error, "resume")]
    Path("step_3").mkdir()
    assert faults("resume=step_3") == []
    assert faults("resume=never") == []


def test_little_room_on_the_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**15, 0, free))  # type: ignore[attr-defined]

    least = 2 * 4096 * 256 * BYTES_PER_PARAMETER  # the embedding alone, twice
    with_free(least)
    assert faults() == [(Severity.warning, "output_dir")]
    assert faults("stage=plan") == []
    with_free(10**12)
    assert faults() == []
