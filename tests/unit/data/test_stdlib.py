"""The embedded source is the standard library, without its tests, in a fixed order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.data.stdlib import StdlibSource
from ava_exp.errors import DataError


def fake_library(tmp_path: Path, files: dict[str, bytes]) -> StdlibSource:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = StdlibSource()
    source.root = tmp_path
    return source


def test_the_running_library_gives_about_twelve_megabytes_in_a_fixed_order() -> None:
    source = StdlibSource()
    documents = list(source.documents())
    names = [document.name for document in documents]
    assert {"asyncio/base_events.py", "argparse.py", "pydoc_data/topics/with"} <= set(names)
    assert len(names) == len(set(names))
    assert 8e6 < sum(len(document.text.encode()) for document in documents) < 20e6
    assert source.bad_rows == []
    assert documents == list(StdlibSource().documents())
    sources = [name for name in names if name.endswith(".py")]
    assert sources == sorted(sources)


def test_tests_installed_packages_and_build_records_are_left_out(tmp_path: Path) -> None:
    wanted = ["os.py", "json/decoder.py", "unittest/case.py"]
    unwanted = [
        "test/test_os.py",
        "json/tests/test_decode.py",
        "idlelib/idle_test/x.py",
        "site-packages/numpy.py",
        "dist-packages/apt.py",
        "_sysconfigdata__linux.py",
        "sitecustomize.py",
        "os.pyc",
        "json/__init__.py",
    ]
    contents = dict.fromkeys(wanted + unwanted, b"x = 1\n") | {"json/__init__.py": b""}
    source = fake_library(tmp_path, contents)
    assert [document.name for document in source.documents()] == sorted(wanted)


def test_topics_are_documents_of_their_own() -> None:
    documents = {document.name: document.text for document in StdlibSource().documents()}
    assert "pydoc_data/topics.py" not in documents
    assert documents["pydoc_data/topics/while"].startswith('The "while" statement')


def test_a_declared_encoding_is_honoured(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nname = 'Größe'\n"
    source = fake_library(tmp_path, {"a.py": text.encode("latin-1")})
    assert [document.text for document in source.documents()] == [text]


def test_an_undecodable_file_is_recorded_not_dropped(tmp_path: Path) -> None:
    source = fake_library(tmp_path, {"a.py": b"x = '\xff'\n", "b.py": b"x = 1\n"})
    assert [document.name for document in source.documents()] == ["b.py"]
    assert [row.file for row in source.bad_rows] == ["a.py"]


def test_a_python_without_sources_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data=files"):
        list(fake_library(tmp_path, {}).documents())


def test_the_stamp_changes_with_a_file(tmp_path: Path) -> None:
    source = fake_library(tmp_path, {"a.py": b"x = 1\n"})
    before = source.stamp()
    assert source.stamp() == before
    (tmp_path / "a.py").write_bytes(b"x = 12\n")
    assert source.stamp() != before


def test_the_source_of_a_document_is_its_package(tmp_path: Path) -> None:
    library = fake_library(tmp_path, {"os.py": b"x = 1", "xml/dom/minidom.py": b"x = 1"})
    assert [document.source for document in library.documents()] == ["single modules", "xml"]
    topic = next(document for document in StdlibSource().documents() if document.name.startswith("pydoc_data/"))
    assert topic.source == "documentation"
