"""Paths, folders and patterns lead to text files, each once, and to nothing outside their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.data.paths import find_text_files
from ava_exp.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("data/b.txt", "data/a.jsonl", "data/deep/c.TXT", "data/readme.md", "data/.git/x.txt", "outside/o.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    return tmp_path


def names(*paths: Path | str) -> list[str]:
    return [file.name for file in find_text_files([str(path) for path in paths])]


def test_a_folder_gives_its_text_files_sorted_and_says_what_it_left_out(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert names(root / "data") == ["data/a.jsonl", "data/b.txt", "data/deep/c.TXT"]
    assert "left out 1 other files, such as readme.md" in caplog.text


def test_names_do_not_depend_on_where_the_folder_lies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = names(root / "data")
    monkeypatch.chdir(root / "data")
    assert names(".") == names("../data") == absolute


def test_patterns_and_files(root: Path) -> None:
    assert names(root / "data" / "b.txt") == ["b.txt"]
    assert names(root / "data" / "*.txt") == ["data/b.txt"]
    assert names(root / "d*" / "de*") == [f"{root.name}/data/deep/c.TXT"]
    assert names(root / "data" / "**" / "*.*") == ["data/a.jsonl", "data/b.txt", "data/deep/c.TXT"]


def test_a_file_that_is_meant_twice_is_read_once(root: Path) -> None:
    assert names(root / "data" / "b.txt", root / "data") == ["b.txt", "data/a.jsonl", "data/deep/c.TXT"]


def test_a_link_inside_the_folder_adds_nothing(root: Path) -> None:
    (root / "data" / "z.txt").symlink_to(root / "data" / "b.txt")
    (root / "data" / "loop").symlink_to(root / "data")
    assert names(root / "data") == ["data/a.jsonl", "data/b.txt", "data/deep/c.TXT"]


def test_a_named_link_is_followed(root: Path) -> None:
    (root / "link.txt").symlink_to(root / "outside" / "o.txt")
    assert names(root / "link.txt") == ["link.txt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/b.tx", r"data/b\.tx does not exist: did you mean `b\.txt`"),
        ("nowhere/b.txt", "there is no folder"),
        ("data/readme.md", r"its name must end in \.txt, \.txt\.gz, \.jsonl or \.jsonl\.gz"),
        ("data/*.csv", "holds no file whose name ends in"),
        ("empty", "holds no file whose name ends in"),
    ],
)
def test_what_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    (root / "empty").mkdir()
    monkeypatch.chdir(root)
    with pytest.raises(DataError, match=message):
        names(path)


@pytest.mark.parametrize("paths", [[], [""], [" "]])
def test_no_path_is_refused_rather_than_read_as_the_current_folder(paths: list[str]) -> None:
    with pytest.raises(DataError, match=r"data\.paths"):
        find_text_files(paths)
