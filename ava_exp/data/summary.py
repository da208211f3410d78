"""What one pass over a source tells: its fingerprint, its size by split, and how well compressors do on it."""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ava_exp.data.document import BadRow, Source
from ava_exp.data.fingerprint import Fingerprint
from ava_exp.data.split import Split, split_of
from ava_exp.errors import DataError

SUMMARY_VERSION = 1
"""Counts up when sources are read in another way, so that older summaries are not used."""
BASELINE_BYTES = 2**25
"""Compressors are tried on the validation documents up to this size; xz takes about 8 s for it."""

SUMMARY_FILE = "summary.json"


@dataclass(slots=True, kw_only=True)
class SplitSize:
    """Documents of a split and their UTF-8 bytes."""

    num_documents: int = 0
    num_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Baselines:
    """What general compressors reach on the validation documents, one by one."""

    num_bytes: int = 0
    gzip_bytes: int = 0
    xz_bytes: int = 0

    @property
    def gzip_bits_per_byte(self) -> float:
        return 8 * self.gzip_bytes / self.num_bytes

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * self.xz_bytes / self.num_bytes

    def add(self, raw: bytes) -> None:
        """Compress one document, as `gzip -9` and `xz` do."""
        self.num_bytes += len(raw)
        self.gzip_bytes += len(gzip.compress(raw, compresslevel=9))
        self.xz_bytes += len(lzma.compress(raw))


@dataclass(slots=True, kw_only=True)
class Summary:
    """A source, read once."""

    fingerprint: str = ""
    train: SplitSize = field(default_factory=SplitSize)
    validation: SplitSize = field(default_factory=SplitSize)
    baselines: Baselines = field(default_factory=Baselines)
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.train.num_bytes + self.validation.num_bytes

    @classmethod
    def of(cls, source: Source, validation_fraction: float) -> Summary:
        """Read a source. Raises `DataError` if one of its splits would be empty."""
        summary, fingerprint = cls(), Fingerprint()
        for document in fingerprint.follow(source.documents()):
            raw = document.text.encode()
            split = split_of(document.name, validation_fraction)
            size = summary.train if split is Split.train else summary.validation
            size.num_documents += 1
            size.num_bytes += len(raw)
            if split is Split.validation and summary.baselines.num_bytes + len(raw) <= BASELINE_BYTES:
                summary.baselines.add(raw)
        summary.fingerprint = fingerprint.hexdigest()
        summary.bad_rows = source.bad_rows
        summary._check_splits(source, validation_fraction)
        return summary

    def save(self, folder: Path) -> None:
        (folder / SUMMARY_FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Summary:
        """Read a summary. Raises `DataError` if it is damaged."""
        path = folder / SUMMARY_FILE
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                fingerprint=raw["fingerprint"],
                train=SplitSize(**raw["train"]),
                validation=SplitSize(**raw["validation"]),
                baselines=Baselines(**raw["baselines"]),
                bad_rows=[BadRow(**row) for row in raw["bad_rows"]],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error!r}.") from error

    def _check_splits(self, source: Source, validation_fraction: float) -> None:
        counts = (self.train.num_documents, self.validation.num_documents)
        if sum(counts) == 0:
            raise DataError(f"There are no documents in {source.describe()}.")
        if 0 in counts:
            raise DataError(
                f"With `data.validation_fraction={validation_fraction}`, {counts[0]} documents of {source.describe()} "
                f"are for training and {counts[1]} for validation; both need one. Documents are split whole, by a "
                "hash of their names: give more of them (a long text in several files or rows), or change the fraction."
            )
