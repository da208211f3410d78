"""Local text files become documents, and what cannot be read is named."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from ava_exp.config.data import OnBadRow
from ava_exp.data.document import Document
from ava_exp.data.files import FilesSource
from ava_exp.errors import DataError


def source_of(*paths: Path, skip: int | None = None, text_field: str = "text") -> FilesSource:
    """Return a source that raises at a bad row, or skips up to `skip` of them."""
    on_bad_row = OnBadRow.error if skip is None else OnBadRow.skip
    return FilesSource([str(path) for path in paths], text_field, on_bad_row, 100 if skip is None else skip)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*texts: object) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_text_file_is_one_document_and_a_row_is_another(tmp_path: Path) -> None:
    write(tmp_path / "corpus/a.txt", "one\r\ntwo\n")
    write(tmp_path / "corpus/b/c.jsonl", rows("three", "four\n"))
    assert list(source_of(tmp_path / "corpus").documents()) == [
        Document("corpus/a.txt", "one\r\ntwo\n", source="corpus"),
        Document("corpus/b/c.jsonl:1", "three", source="corpus/b/c.jsonl"),
        Document("corpus/b/c.jsonl:2", "four\n", source="corpus/b/c.jsonl"),
    ]


def test_a_text_that_is_named_itself_is_a_source_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    assert [document.source for document in source_of(tmp_path / "a.txt").documents()] == ["a.txt"]


def test_compressed_files_read_as_their_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt.gz", gzip.compress(b"one"))
    second = write(tmp_path / "b.jsonl.gz", gzip.compress(rows("two", "three").encode()))
    assert [document.text for document in source_of(first, second).documents()] == ["one", "two", "three"]


def test_another_field_can_be_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "one", "text": 3}\n')
    assert [document.text for document in source_of(path, text_field="body").documents()] == ["one"]


def test_blank_lines_are_no_rows_but_keep_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + rows("one") + " \r\n" + rows("two") + "\n")
    assert [document.name for document in source_of(path).documents()] == ["a.jsonl:2", "a.jsonl:4"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_decoded_without_their_mark(tmp_path: Path, encoding: str) -> None:
    text = "Größe 東京 🙂\u2028x"
    whole = write(tmp_path / "a.txt", text.encode(encoding))
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    lines = write(tmp_path / "b.jsonl", (line * 2).encode(encoding))
    assert [document.text for document in source_of(whole, lines).documents()] == [text] * 3


def test_big_endian_utf16_is_decoded_by_its_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xfe\xff" + "Größe".encode("utf-16-be"))
    assert [document.text for document in source_of(path).documents()] == ["Größe"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON: .* at column"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON that can be read"),
        ('["text"]', "must be a JSON object, but is of type list"),
        ('{"txt": "a", "id": 1}', "no field `text`; the row has 'txt', 'id'"),
        ('{"text": 3}', "field `text` must be a text, but is of type int"),
        ('{"text": null}', "is of type NoneType"),
        ('{"text": ""}', "there is no text"),
        ('{"text": "a\\u0000b"}', "character 1 is NUL"),
        ('{"text": "a\\ud800"}', "character 1 is half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", rows("one") + line + "\n" + rows("two"))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{reason}.*on_bad_row=skip"):
        list(source_of(path).documents())
    source = source_of(path, skip=1)
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert [(row.file, row.line) for row in source.bad_rows] == [(str(path), 2)]


def test_a_byte_that_is_not_utf8_is_named_by_its_offset_in_the_file(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.txt", b"\xef\xbb\xbfGr\xf6\xdfe")
    with pytest.raises(DataError, match=r"a\.txt: byte 5 \(0xf6\) is not UTF-8"):
        list(source_of(whole).documents())
    first = rows("one")
    lines = write(tmp_path / "b.jsonl", first.encode() + b'{"text": "\xf6"}\n')
    with pytest.raises(DataError, match=rf"b\.jsonl, line 2: byte {len(first) + 10} \(0xf6\)"):
        list(source_of(lines).documents())


def test_bad_rows_are_logged_once_however_often_the_source_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", "x\n" + rows("one") + "y\n")
    source = source_of(path, skip=2)
    for _ in range(3):
        assert len(list(source.documents())) == 1
    assert len(source.bad_rows) == len(caplog.records) == 2


def test_one_bad_row_too_many_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x\n" * 3 + rows("one"))
    assert len(list(source_of(path, skip=3).documents())) == 1
    with pytest.raises(DataError, match=r"line 3: .*more than 2 bad rows.*max_bad_rows"):
        list(source_of(path, skip=2).documents())


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"text " * 1000)
    for name, content in (("cut.txt.gz", whole[:-10]), ("not.jsonl.gz", b"text")):
        with pytest.raises(DataError, match=f"{name} cannot be decompressed"):
            list(source_of(write(tmp_path / name, content)).documents())


def test_a_text_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ava_exp.data.text.MAX_DOCUMENT_BYTES", 20)
    fitting = write(tmp_path / "fit.txt", "x" * 20)
    assert len(list(source_of(fitting).documents())) == 1
    whole = write(tmp_path / "a.txt", "x" * 21)
    with pytest.raises(DataError, match=r"a\.txt: it is longer than 20 bytes"):
        list(source_of(whole).documents())
    lines = write(tmp_path / "b.jsonl", rows("short") + rows("x" * 20))
    with pytest.raises(DataError, match=r"b\.jsonl: line 2 is longer than 20 bytes"):
        list(source_of(lines).documents())


def test_the_stamp_changes_with_files_and_with_what_is_read_from_them(tmp_path: Path) -> None:
    path = write(tmp_path / "data/a.jsonl", rows("one"))
    stamps = [source_of(tmp_path / "data").stamp(), source_of(tmp_path / "data", text_field="body").stamp()]
    write(tmp_path / "data/b.txt", "two")
    stamps.append(source_of(tmp_path / "data").stamp())
    write(path, rows("on"))
    stamps.append(source_of(tmp_path / "data").stamp())
    assert len(set(stamps)) == 4
    assert source_of(tmp_path / "data").stamp() == stamps[-1]


def test_the_stamp_sees_a_file_whose_size_and_time_were_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    before, status = source_of(path).stamp(), path.stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    write(path, "two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert source_of(path).stamp() != before
