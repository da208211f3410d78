"""A cache entry is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.data.cache import load_or_build, new_folder
from ava_exp.errors import DataError


def load(folder: Path) -> str:
    text = (folder / "value").read_text()
    if text == "bad":
        raise DataError(f"{folder / 'value'} is damaged.")
    return text


def build(folder: Path) -> None:
    (folder / "value").write_text("good")


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    entry = tmp_path / "kind" / "key"
    assert load_or_build(entry, load, build, print) == ("good", False)
    assert load_or_build(entry, load, build, print) == ("good", True)


def test_a_damaged_entry_is_named_and_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "value").write_text("bad")
    assert load_or_build(tmp_path / "key", load, build, print) == ("good", False)
    assert f"{tmp_path / 'key' / 'value'} is damaged" in caplog.text


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    with new_folder(folder) as temporary:
        (temporary / "value").write_text("old")

    def fail_half_way() -> None:
        with new_folder(folder) as temporary:
            (temporary / "value").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert load(folder) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_remains_of_a_killed_process_are_not_taken_over(tmp_path: Path) -> None:
    remains = tmp_path / "key.tmp"
    remains.mkdir()
    (remains / "partial").write_text("")
    with new_folder(tmp_path / "key") as temporary:
        build(temporary)
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["value"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache cannot be written: Not a directory.*cache_dir"):
        load_or_build(tmp_path / "file" / "cache" / "key", load, build, print)
