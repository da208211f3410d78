"""Hashes that say whether data changed: of its content, and, cheaply, of its files' sizes and times."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ava_exp.data.document import Document


class Fingerprint:
    """SHA-256 over the names and UTF-8 bytes of documents in order, filled while they stream past."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def follow(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents unchanged and take each into the fingerprint."""
        for document in documents:
            self.update(document)
            yield document

    def update(self, document: Document) -> None:
        for part in (document.name.encode(), document.text.encode()):
            # The length first: "ab" + "c" must not hash as "a" + "bc".
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def file_stamp(files: Iterable[Path], *settings: object) -> str:
    """Return a hash of settings and of every file's path, size, and times of modification and status change."""
    stamp = hashlib.sha256(repr(settings).encode())
    for file in files:
        status = file.stat()
        stamp.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode())
    return stamp.hexdigest()
