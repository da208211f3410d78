"""What is written to shards is read back, and what was changed since is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_exp.data.document import OTHER
from ava_exp.data.shards import MAX_SOURCES, ShardWriter, TokenDataset
from ava_exp.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13]]
FLAT = [5, 6, 7, 0, 8, 0, 0, 9, 10, 11, 12, 13, 0]


def written(folder: Path, documents: list[list[int]], vocab_size: int = 100, shard_tokens: int = 4) -> Path:
    writer = ShardWriter(folder, vocab_size=vocab_size, end_of_document_id=0, shard_tokens=shard_tokens)
    for document in documents:
        writer.add(np.array(document, dtype=np.uint32))
    writer.finish(split="train", source_fingerprint="s", tokenizer_fingerprint="t")
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokens_cross_the_borders_of_shards(tmp_path: Path) -> None:
    dataset = TokenDataset.open(written(tmp_path, DOCUMENTS))
    assert len(list(tmp_path.glob("tokens_*.bin"))) == 4
    assert dataset.num_tokens == len(FLAT)
    for start in range(len(FLAT)):
        for stop in range(start + 1, len(FLAT) + 1):
            assert dataset.tokens(start, stop).tolist() == FLAT[start:stop]


def test_every_position_knows_its_document(tmp_path: Path) -> None:
    dataset = TokenDataset.open(written(tmp_path, DOCUMENTS))
    assert dataset.num_documents == 4
    assert [dataset.document_of(position) for position in range(len(FLAT))] == [0] * 4 + [1] * 2 + [2] + [3] * 6


def test_every_token_knows_the_source_of_its_document(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=100, end_of_document_id=0, shard_tokens=4)
    for document, source in zip(DOCUMENTS, ("web", "books", "web", "books"), strict=True):
        writer.add(np.array(document, dtype=np.uint32), source)
    writer.finish(split="train", source_fingerprint="s", tokenizer_fingerprint="t")
    dataset = TokenDataset.open(tmp_path)
    assert dataset.sources == ["books", "web"], "the longest first"
    assert dataset.source_ids(0, len(FLAT)).tolist() == [1] * 4 + [0] * 2 + [1] + [0] * 6
    assert dataset.source_ids(5, 8).tolist() == [0, 1, 0]


def test_the_longest_sources_are_told_apart_and_the_rest_is_other(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=100, end_of_document_id=0)
    for number in range(MAX_SOURCES + 3):
        writer.add(np.ones(20 - number, dtype=np.uint32), OTHER if number == 1 else f"source {number}")
    writer.finish(split="train", source_fingerprint="s", tokenizer_fingerprint="t")
    dataset = TokenDataset.open(tmp_path)
    expected = [OTHER if number == 1 else f"source {number}" for number in range(MAX_SOURCES - 1)]
    assert dataset.sources == expected
    last = dataset.source_ids(dataset.num_tokens - 1, dataset.num_tokens)
    assert [dataset.sources[source] for source in last] == [OTHER]
    assert dataset.sources[dataset.source_ids(21 + 20, 22 + 20)[0]] == "source 2"


def test_a_source_that_is_not_in_the_manifest_is_found(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=100, end_of_document_id=0)
    for source in ("a", "b"):
        writer.add(np.ones(3, dtype=np.uint32), source)
    writer.finish(split="train", source_fingerprint="s", tokenizer_fingerprint="t")
    edit_manifest(tmp_path, sources=["a"])
    with pytest.raises(DataError, match="names a source that is not in"):
        TokenDataset.open(tmp_path)


@settings(deadline=None, max_examples=25)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**17 - 1), max_size=30), min_size=1, max_size=10),
    shard_tokens=st.integers(1, 50),
)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    folder = written(tmp_path_factory.mktemp("shards"), documents, vocab_size=2**17, shard_tokens=shard_tokens)
    dataset = TokenDataset.open(folder)
    assert dataset.tokens(0, dataset.num_tokens).tolist() == [
        token for document in documents for token in [*document, 0]
    ]


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_where_they_can(tmp_path: Path, vocab_size: int, bytes_per_token: int) -> None:
    folder = written(tmp_path, [[vocab_size - 1]], vocab_size)
    assert (folder / "tokens_00000.bin").stat().st_size == 2 * bytes_per_token
    assert TokenDataset.open(folder).tokens(0, 2).tolist() == [vocab_size - 1, 0]


def test_a_token_beyond_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 100, but its vocabulary has 100"):
        written(tmp_path, [[1, 100]])


def test_the_manifest_names_files_sizes_checksums_and_origin(tmp_path: Path) -> None:
    manifest = json.loads((written(tmp_path, DOCUMENTS) / "manifest.json").read_text())
    for record in [*manifest["shards"], manifest["documents"], manifest["document_sources"]]:
        content = (tmp_path / record["name"]).read_bytes()
        assert (record["num_bytes"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (manifest["source_fingerprint"], manifest["tokenizer_fingerprint"]) == ("s", "t")
    assert (manifest["num_tokens"], manifest["num_documents"], manifest["max_token_id"]) == (13, 4, 13)


@pytest.mark.parametrize("name", ["tokens_00001.bin", "documents.bin", "sources.bin"])
def test_a_flipped_bit_is_found_unless_verification_is_off(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, DOCUMENTS) / name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is damaged: its checksum differs"):
        TokenDataset.open(tmp_path)
    TokenDataset.open(tmp_path, verify=False)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (written(tmp_path, DOCUMENTS) / "tokens_00002.bin").unlink()
    with pytest.raises(DataError, match=r"tokens_00002\.bin is missing"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format 1; this version reads 2. Prepare the data again"),
        ({"dtype": "object"}, "damaged: it names"),
        ({"num_tokens": 12}, "contradict each other"),
        ({"num_documents": 5}, "contradict each other"),
        ({"shards": []}, "damaged: it names"),
        ({"shards": [{"name": "../secret.bin", "num_bytes": 26, "sha256": ""}]}, "damaged: it names"),
        ({"documents": {"name": "documents.bin"}}, "damaged: TypeError"),
        ({"document_sources": {"name": "../sources.bin", "num_bytes": 4, "sha256": ""}}, "damaged: it names"),
        ({"sources": []}, "damaged: its sources are"),
        ({"sources": [1]}, "damaged: its sources are"),
        ({"vocab_size": 13}, "token id 13, but its vocabulary has 13"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(written(tmp_path, DOCUMENTS), **changes)
    with pytest.raises(DataError, match=message):
        TokenDataset.open(tmp_path, verify=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (written(tmp_path, DOCUMENTS) / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        TokenDataset.open(tmp_path)


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no token shards: manifest\.json cannot be read"):
        TokenDataset.open(tmp_path)
