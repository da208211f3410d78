"""Faults in data: each is named, refused or handled, and none passes in silence."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ava_exp.config.data import BPEConfig, FilesConfig, OnBadRow
from ava_exp.data.prepare import PreparedData, prepare_data
from ava_exp.data.shards import ShardWriter, TokenDataset
from ava_exp.errors import DataError

NUM_FILES = 30


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a folder of small texts, enough for both splits."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(NUM_FILES):
        (folder / f"{index:02d}.txt").write_text(f"text number {index}\n" * 5)
    return folder


def prepare(corpus: Path, skip: int | None = None) -> PreparedData:
    data = FilesConfig(
        paths=[str(corpus)],
        validation_fraction=0.3,
        on_bad_row=OnBadRow.error if skip is None else OnBadRow.skip,
        max_bad_rows=skip or 0,
    )
    return prepare_data(data, BPEConfig(vocab_size=280), corpus.parent / "cache", on_progress=lambda _: None)


def overwrite(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_6_a_truncated_shard_is_named_and_refused_at_open(corpus: Path) -> None:
    folder = prepare(corpus).train.folder
    shard = folder / "tokens_00000.bin"
    whole = shard.stat().st_size
    overwrite(shard, lambda content: content.pop())
    with pytest.raises(DataError, match=rf"tokens_00000\.bin has {whole - 1:,} bytes instead of {whole:,}"):
        TokenDataset.open(folder, verify=False)


def test_6_a_truncated_shard_of_the_cache_is_named_and_made_again(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(corpus)
    overwrite(first.train.folder / "tokens_00000.bin", lambda content: content.pop())
    again = prepare(corpus)
    assert "tokens_00000.bin has" in caplog.text
    assert not again.from_cache
    assert again.train.manifest == first.train.manifest


def test_7_a_flipped_bit_of_a_shard_is_named(corpus: Path) -> None:
    folder = prepare(corpus).validation.folder
    overwrite(folder / "tokens_00000.bin", lambda content: content.__setitem__(9, content[9] ^ 1))
    with pytest.raises(DataError, match=r"validation/tokens_00000\.bin is damaged"):
        TokenDataset.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus: (corpus / "07.txt").write_text("text number 8\n" * 5),  # as long as before
        lambda corpus: (corpus / "07.txt").unlink(),
        lambda corpus: (corpus / "07.txt").rename(corpus / "renamed.txt"),
        lambda corpus: (corpus / "new.txt").write_text("new"),
    ],
)
def test_20_the_fingerprint_changes_with_any_document(corpus: Path, change: Callable[[Path], object]) -> None:
    before = prepare(corpus)
    change(corpus)
    after = prepare(corpus)
    assert after.fingerprint != before.fingerprint
    assert after.train.manifest.source_fingerprint == after.fingerprint
    assert not after.from_cache


def test_20_the_fingerprint_does_not_change_with_times_or_place(corpus: Path, tmp_path: Path) -> None:
    before = prepare(corpus)
    moved = tmp_path / "elsewhere" / "corpus"
    moved.parent.mkdir()
    corpus.rename(moved)
    (moved / "07.txt").touch()
    assert prepare(moved).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("row", "reason"),
    [("{", "not JSON"), ('{"text": 1}', "must be a text, but is of type int"), ('{"id": 1}', "no field `text`")],
    ids=["27_malformed", "30_type_drift", "30_missing_field"],
)
def test_27_30_a_bad_row_is_named_or_counted_up_to_a_limit(corpus: Path, row: str, reason: str) -> None:
    good = "".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(5))
    (corpus / "rows.jsonl").write_text(good + row + "\n" + good + row + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 6: .*{reason}"):
        prepare(corpus)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 12: .*more than 1 bad rows"):
        prepare(corpus, skip=1)
    prepared = prepare(corpus, skip=2)
    assert [row.line for row in prepared.statistics.bad_rows] == [6, 12]
    assert prepared.statistics.train.num_documents + prepared.statistics.validation.num_documents == NUM_FILES + 10


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_28_an_empty_file_is_named(corpus: Path, name: str, content: str) -> None:
    (corpus / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: there is no text in it"):
        prepare(corpus)


def test_28_no_documents_at_all_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        prepare(tmp_path / "corpus")
    (tmp_path / "corpus" / "bad.jsonl").write_text("x\n")
    with pytest.raises(DataError, match="There are no documents"):
        prepare(tmp_path / "corpus", skip=5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Größe".encode("latin-1"), r"byte 2 \(0xf6\) is not UTF-8"),
        ("Größe".encode("utf-16-le"), "byte 4|character 1 is NUL"),
        ("plain".encode("utf-16-be"), "character 0 is NUL"),
        (b"\xff\xfeG", "byte 2 is not UTF-16"),
        (b"a\0b", "character 1 is NUL"),
    ],
    ids=["latin-1", "utf-16 without a mark", "utf-16-be without a mark", "half a character", "NUL"],
)
def test_29_the_first_file_that_is_not_text_is_named(corpus: Path, content: bytes, reason: str) -> None:
    (corpus / "29.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"29\.txt: ({reason})"):
        prepare(corpus)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_29_a_byte_order_mark_is_understood(corpus: Path, encoding: str) -> None:
    before = prepare(corpus)
    text = (corpus / "07.txt").read_text()
    (corpus / "07.txt").write_bytes(text.encode(encoding))
    assert prepare(corpus).fingerprint == before.fingerprint


def test_31_a_token_beyond_the_vocabulary_is_refused_when_the_data_set_is_opened(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=1000, end_of_document_id=0)
    writer.add(np.array([1, 999], dtype=np.uint32))
    writer.finish(split="train", source_fingerprint="", tokenizer_fingerprint="")
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text()) | {"vocab_size": 999}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="token id 999, but its vocabulary has 999 tokens"):
        TokenDataset.open(tmp_path, verify=False)
    path.write_text(json.dumps(manifest | {"max_token_id": 5}))  # a manifest that says otherwise
    with pytest.raises(DataError, match="token id 999, but its vocabulary has 999 tokens"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt"])
def test_34_a_link_out_of_the_folder_is_refused(corpus: Path, kind: str, pattern: str) -> None:
    outside = corpus.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    targets = {"file": outside / "secret.txt", "folder": outside, "dangling": outside / "nothing.txt"}
    (corpus / "link.txt").symlink_to(targets[kind])
    with pytest.raises(DataError, match=r"link\.txt.* leads out of .*corpus, to .*outside"):
        prepare(corpus / pattern)


def test_34_a_pattern_does_not_climb_out_of_its_folder(corpus: Path) -> None:
    (corpus / "sub").mkdir()
    (corpus.parent / "secret.txt").write_text("secret")
    with pytest.raises(DataError, match=r"secret\.txt.* leads out of"):
        prepare(corpus / "*" / ".." / ".." / "*.txt")


def test_34_a_nul_in_a_path_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"`data.paths` must be paths, without NUL"):
        prepare(corpus / "a\0b")


def test_34_a_manifest_cannot_lead_to_other_files(corpus: Path) -> None:
    folder = prepare(corpus).train.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../validation/tokens_00000.bin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json is damaged: it names"):
        TokenDataset.open(folder)


@pytest.mark.parametrize(
    ("name", "line"),
    [("bomb.txt.gz", b" " * 2**20), ("bomb.jsonl.gz", b" " * 2**20), ("bomb.jsonl.gz", b" " * (2**20 - 1) + b"\n")],
    ids=["a text", "one line", "many lines"],
)
def test_38_a_decompression_bomb_is_stopped_at_the_limit(tmp_path: Path, name: str, line: bytes) -> None:
    with gzip.open(tmp_path / name, "wb") as stream:
        for _ in range(128):
            stream.write(line)  # 128 MiB of nothing, 1,000 times smaller compressed
    source = FilesConfig(paths=[str(tmp_path / name)]).build()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}: it decompresses to more than 16,777,216 bytes, the limit"):
            list(source.documents())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
