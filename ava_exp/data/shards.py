"""Token shards: a split's tokens in files that are mapped into memory, with the borders of its documents.

A folder holds `tokens_00000.bin`, … (little-endian uint16, or uint32 above 65,536 tokens of vocabulary),
`documents.bin` (int64: where each document begins, and at last the number of tokens), `sources.bin` (uint8: which of
the manifest's `sources` each document is from) and `manifest.json`.
"""

from __future__ import annotations

import array
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ava_exp.data.document import OTHER
from ava_exp.errors import DataError

FORMAT_VERSION = 2
SHARD_TOKENS = 2**26
"""Tokens of a shard: 128 MiB of uint16."""
VERIFIED_BYTES = 2**30
"""Up to this size, checksums are verified at every open; that takes less than a second."""

MANIFEST = "manifest.json"
DOCUMENTS = "documents.bin"
SOURCES = "sources.bin"
MAX_SOURCES = 12
"""Sources that are told apart: those with most tokens, and `OTHER` for all the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a file must be like."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder of shards holds, and what it was made from."""

    format_version: int
    split: str
    dtype: str
    vocab_size: int
    end_of_document_id: int
    max_token_id: int
    num_tokens: int
    num_documents: int
    source_fingerprint: str
    tokenizer_fingerprint: str
    shards: list[FileRecord]
    documents: FileRecord
    sources: list[str]
    document_sources: FileRecord

    @property
    def files(self) -> list[FileRecord]:
        """Every file beside the manifest."""
        return [*self.shards, self.documents, self.document_sources]

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest. Raises `DataError` if there is none that can be read."""
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{folder} has token shards of format {version}; this version reads {FORMAT_VERSION}. "
                    "Prepare the data again."
                )
            shards = [FileRecord(**record) for record in raw["shards"]]
            borders, sources = (FileRecord(**raw[name]) for name in ("documents", "document_sources"))
            manifest = cls(**raw | {"shards": shards, "documents": borders, "document_sources": sources})
        except OSError as error:
            raise DataError(f"{folder} has no token shards: {MANIFEST} cannot be read: {error.strerror}.") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{folder / MANIFEST} is damaged: {error!r}.") from error
        return manifest


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        self._stream: IO[bytes] = path.open("wb")

    def write(self, raw: bytes) -> None:
        self._stream.write(raw)
        self._hash.update(raw)
        self.num_bytes += len(raw)

    def close(self) -> FileRecord:
        self._stream.close()
        return FileRecord(name=self.path.name, num_bytes=self.num_bytes, sha256=self._hash.hexdigest())


class ShardWriter:
    """Writes one split's documents into a folder; the manifest comes last."""

    def __init__(
        self, folder: Path, *, vocab_size: int, end_of_document_id: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.vocab_size = vocab_size
        self.end_of_document_id = end_of_document_id
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._shard_bytes = shard_tokens * self._dtype.itemsize
        self._starts = array.array("q")
        self._labels: dict[str, int] = {}
        self._document_labels = array.array("q")
        self._num_tokens = 0
        self._max_token_id = end_of_document_id
        self._shards: list[FileRecord] = []
        self._file: _File | None = None

    def add(self, tokens: npt.NDArray[np.uint32], source: str = OTHER) -> None:
        """Append a document's tokens and its end. Raises `DataError` for ids beyond the vocabulary."""
        document = np.append(tokens, np.uint32(self.end_of_document_id))
        self._max_token_id = max(self._max_token_id, int(document.max()))
        if self._max_token_id >= self.vocab_size:
            raise DataError(_beyond_vocabulary(str(self.folder), self._max_token_id, self.vocab_size))
        self._starts.append(self._num_tokens)
        self._document_labels.append(self._labels.setdefault(source, len(self._labels)))
        self._num_tokens += len(document)
        self._write(document.astype(self._dtype).tobytes())

    def finish(self, *, split: str, source_fingerprint: str, tokenizer_fingerprint: str) -> Manifest:
        """Close the files and write the manifest."""
        self._close_shard()
        self._starts.append(self._num_tokens)
        borders = _File(self.folder / DOCUMENTS)
        borders.write(np.frombuffer(self._starts, dtype=np.int64).astype("<i8").tobytes())
        sources, source_of_label = self._sources()
        document_sources = _File(self.folder / SOURCES)
        document_sources.write(source_of_label[np.frombuffer(self._document_labels, dtype=np.int64)].tobytes())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            split=split,
            dtype=f"uint{8 * self._dtype.itemsize}",
            vocab_size=self.vocab_size,
            end_of_document_id=self.end_of_document_id,
            max_token_id=self._max_token_id,
            num_tokens=self._num_tokens,
            num_documents=len(self._starts) - 1,
            source_fingerprint=source_fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            shards=self._shards,
            documents=borders.close(),
            sources=sources,
            document_sources=document_sources.close(),
        )
        manifest.save(self.folder)
        return manifest

    def _sources(self) -> tuple[list[str], npt.NDArray[np.uint8]]:
        """Return the labels to keep, those with most tokens first, and which of them stands for each label."""
        lengths = np.diff(np.frombuffer(self._starts, dtype=np.int64))
        labels = np.frombuffer(self._document_labels, dtype=np.int64)
        num_tokens = np.bincount(labels, weights=lengths, minlength=len(self._labels))
        ranked = sorted(self._labels, key=lambda label: (-num_tokens[self._labels[label]], label))
        kept = ranked if len(ranked) <= MAX_SOURCES else [*ranked[: MAX_SOURCES - 1], OTHER]
        kept = list(dict.fromkeys(kept))  # documents may be labelled `OTHER` themselves
        place = {label: kept.index(label) if label in kept else kept.index(OTHER) for label in self._labels}
        return kept, np.array(list(place.values()), dtype=np.uint8)

    def _write(self, raw: bytes) -> None:
        while raw:
            if self._file is None:
                self._file = _File(self.folder / _shard_name(len(self._shards)))
            room = self._shard_bytes - self._file.num_bytes
            self._file.write(raw[:room])
            raw = raw[room:]
            if self._file.num_bytes == self._shard_bytes:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._file is not None:
            self._shards.append(self._file.close())
            self._file = None


class TokenDataset:
    """One split's tokens, as if they were one array, on the disk."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shards: list[npt.NDArray[Any]],
        starts: npt.NDArray[np.int64],
        sources: npt.NDArray[np.uint8],
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._shard_ends = np.cumsum([len(shard) for shard in shards])
        self._starts = starts
        self._sources = sources

    @classmethod
    def open(cls, folder: Path, verify: bool | None = None) -> TokenDataset:
        """Map a folder's shards.

        Sizes are always checked, contents (checksums, token ids, document borders) if `verify`; None verifies up to
        `VERIFIED_BYTES`. Raises `DataError` naming the file that is missing, truncated or damaged.
        """
        manifest = Manifest.load(folder)
        _check_manifest(folder, manifest)
        records = manifest.files
        for record in records:
            _check_size(folder, record)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        shards = [_mapped(folder / record.name, dtype) for record in manifest.shards]
        starts = _mapped(folder / DOCUMENTS, np.dtype("<i8"))
        sources = _mapped(folder / SOURCES, np.dtype("u1"))
        if verify is None:
            verify = sum(record.num_bytes for record in records) <= VERIFIED_BYTES
        if verify:
            _verify(folder, manifest, shards, starts, sources)
        return cls(folder, manifest, shards, starts, sources)

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return at least one token, `start` to `stop` (excluded), in the dtype they are stored in."""
        assert 0 <= start < stop <= self.num_tokens, f"{start}:{stop} is outside {self.num_tokens} tokens"
        first = int(np.searchsorted(self._shard_ends, start, side="right"))
        pieces = []
        for shard, end in zip(self._shards[first:], self._shard_ends[first:], strict=True):
            begin = int(end) - len(shard)
            pieces.append(shard[max(start - begin, 0) : stop - begin])
            if stop <= end:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_of(self, position: int) -> int:
        """Return the index of the document that the token at `position` belongs to."""
        assert 0 <= position < self.num_tokens, f"{position} is outside {self.num_tokens} tokens"
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    @property
    def sources(self) -> list[str]:
        """The labels of this split's documents, those with most tokens first."""
        return self.manifest.sources

    def source_ids(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return which of `sources` each token from `start` to `stop` (excluded) is from."""
        assert 0 <= start < stop <= self.num_tokens, f"{start}:{stop} is outside {self.num_tokens} tokens"
        positions = np.arange(start, stop)
        return np.asarray(self._sources[np.searchsorted(self._starts, positions, side="right") - 1])


def _shard_name(index: int) -> str:
    return f"tokens_{index:05d}.bin"


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # as a plain array: slices of memmaps are slower


def _check_manifest(folder: Path, manifest: Manifest) -> None:
    """Refuse what this module does not write: a manifest from elsewhere must not lead to other files."""
    names = [record.name for record in manifest.files]
    expected = [*(_shard_name(index) for index in range(len(manifest.shards))), DOCUMENTS, SOURCES]
    if names != expected or not manifest.shards or manifest.dtype not in ("uint16", "uint32"):
        raise DataError(f"{folder / MANIFEST} is damaged: it names {names} of dtype {manifest.dtype}.")
    num_documents = manifest.num_documents
    sizes = (sum(record.num_bytes for record in manifest.shards), *(file.num_bytes for file in manifest.files[-2:]))
    if sizes != (manifest.num_tokens * np.dtype(manifest.dtype).itemsize, (num_documents + 1) * 8, num_documents):
        raise DataError(f"{folder / MANIFEST} is damaged: its sizes and counts contradict each other.")
    if not 0 < len(manifest.sources) <= MAX_SOURCES or not all(isinstance(name, str) for name in manifest.sources):
        raise DataError(f"{folder / MANIFEST} is damaged: its sources are {manifest.sources!r}.")
    if manifest.max_token_id >= manifest.vocab_size:
        raise DataError(_beyond_vocabulary(str(folder), manifest.max_token_id, manifest.vocab_size))


def _check_size(folder: Path, record: FileRecord) -> None:
    path = folder / record.name
    if not path.is_file():
        raise DataError(f"{path} is missing. Prepare the data again.")
    if (size := path.stat().st_size) != record.num_bytes:
        raise DataError(f"{path} has {size:,} bytes instead of {record.num_bytes:,}. Prepare the data again.")


def _verify(
    folder: Path,
    manifest: Manifest,
    shards: list[npt.NDArray[Any]],
    starts: npt.NDArray[np.int64],
    sources: npt.NDArray[np.uint8],
) -> None:
    for record, content in zip(manifest.files, [*shards, starts, sources], strict=True):
        if hashlib.sha256(content.data).hexdigest() != record.sha256:
            raise DataError(f"{folder / record.name} is damaged: its checksum differs. Prepare the data again.")
    largest = max(int(shard.max()) for shard in shards)
    if largest >= manifest.vocab_size:
        raise DataError(_beyond_vocabulary(str(folder), largest, manifest.vocab_size))
    if starts[0] != 0 or starts[-1] != manifest.num_tokens or bool((np.diff(starts) <= 0).any()):
        raise DataError(f"{folder / DOCUMENTS} is damaged: documents do not follow each other to the last token.")
    if int(sources.max()) >= len(manifest.sources):
        raise DataError(f"{folder / SOURCES} is damaged: it names a source that is not in {MANIFEST}.")


def _beyond_vocabulary(place: str, token_id: int, vocab_size: int) -> str:
    return f"{place} has the token id {token_id}, but its vocabulary has {vocab_size} tokens. Prepare the data again."
