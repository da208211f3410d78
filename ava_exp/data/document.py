"""What a data source yields, and what is remembered of the rows it could not read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ava_exp.errors import DataError

logger = logging.getLogger(__name__)

OTHER = "other"
"""The label of documents that have none of their own."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that belongs together. Its name decides its split, so it stays the same wherever the data lies.

    `source` is a label that it shares with others of its kind, by which statistics are told apart.
    """

    name: str
    text: str
    source: str = OTHER


@dataclass(frozen=True, slots=True)
class BadRow:
    """Where something could not be read, and why; `line` is None where the whole file is meant."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {self.reason}"


class Quarantine:
    """Collects bad rows, each once however often the source is read, and raises when there are more than `limit`."""

    def __init__(self, limit: int, mend: str = "") -> None:
        self.limit = limit
        self.mend = mend
        self._rows: dict[BadRow, None] = {}

    @property
    def rows(self) -> list[BadRow]:
        """The bad rows met so far, in order."""
        return list(self._rows)

    def add(self, row: BadRow) -> None:
        """Record and log a bad row. Raises `DataError` when it is one too many."""
        if row in self._rows:
            return
        if len(self._rows) >= self.limit:
            many = f" (more than {self.limit} bad rows, this is the first too many)" if self.limit else ""
            raise DataError(f"{row}{many}. {self.mend}".rstrip())
        self._rows[row] = None
        logger.warning("Left out: %s.", row)


class Source(Protocol):
    """Where documents come from. Reading twice gives the same documents in the same order."""

    @property
    def bad_rows(self) -> list[BadRow]:
        """What the passes so far left out."""

    def documents(self) -> Iterator[Document]:
        """Yield every document in a fixed order. Raises `DataError` naming the file that cannot be used."""

    def describe(self) -> str:
        """Return one line that tells a reader what the source is."""

    def stamp(self) -> str:
        """Return a hash that changes when the files do, without reading them."""
