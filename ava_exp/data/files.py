"""Local text files as a data source."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ava_exp.config.data import OnBadRow
from ava_exp.data.document import BadRow, Document, Quarantine
from ava_exp.data.fingerprint import file_stamp
from ava_exp.data.paths import TextFile, find_text_files
from ava_exp.data.text import TextError, checked, decode_line, read_lines, read_text


class FilesSource:
    """`.txt` files, one document each, and `.jsonl` files, one document a line in `text_field`; both also as `.gz`.

    UTF-8, or UTF-16 and UTF-32 with a byte order mark. A row or text file that cannot be read is an error that names
    the place and the reason; with `on_bad_row=skip` it is logged and kept in `bad_rows`, up to `max_bad_rows`.
    A document's source is the folder that its text file was found in, or the file itself: of rows, or named itself.
    """

    def __init__(self, paths: list[str], text_field: str, on_bad_row: OnBadRow, max_bad_rows: int) -> None:
        self.paths = paths
        self.text_field = text_field
        skips = on_bad_row is OnBadRow.skip
        mend = "Mend the data, or raise `data.max_bad_rows`." if skips else "`data.on_bad_row=skip` leaves it out."
        self._quarantine = Quarantine(limit=max_bad_rows if skips else 0, mend=mend)

    @property
    def bad_rows(self) -> list[BadRow]:
        return self._quarantine.rows

    def describe(self) -> str:
        more = f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else ""
        return f"files {', '.join(self.paths[:3])}{more}"

    def stamp(self) -> str:
        files = find_text_files(self.paths)
        names = [file.name for file in files]
        return file_stamp((file.path for file in files), names, self.text_field, self._quarantine.limit)

    def documents(self) -> Iterator[Document]:
        """Yield every document. Raises `DataError` at what cannot be read."""
        for file in find_text_files(self.paths):
            is_rows = file.path.name.lower().endswith((".jsonl", ".jsonl.gz"))
            yield from self._rows(file) if is_rows else self._whole(file)

    def _whole(self, file: TextFile) -> Iterator[Document]:
        try:
            text = read_text(file.path)
        except TextError as error:
            self._quarantine.add(BadRow(str(file.path), None, str(error)))
            return
        yield Document(file.name, text, source=file.name.rpartition("/")[0] or file.name)

    def _rows(self, file: TextFile) -> Iterator[Document]:
        is_empty = True
        for number, offset, raw in read_lines(file.path):
            if not raw.strip():
                continue  # a blank line, such as the last one
            is_empty = False
            try:
                text = _field(decode_line(raw, offset), self.text_field)
            except TextError as error:
                self._quarantine.add(BadRow(str(file.path), number, str(error)))
                continue
            yield Document(f"{file.name}:{number}", text, source=file.name)
        if is_empty:
            self._quarantine.add(BadRow(str(file.path), None, "there is no text in it"))


def _field(line: str, name: str) -> str:
    """Return a field of a JSON object. Raises `TextError` where it is not there or is no text."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise TextError(f"not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise TextError(f"a row must be a JSON object, but is of type {type(row).__name__}")
    if name not in row:
        raise TextError(f"there is no field `{name}`; the row has {', '.join(map(repr, row)) or 'none'}")
    text = row[name]
    if not isinstance(text, str):
        raise TextError(f"the field `{name}` must be a text, but is of type {type(text).__name__}")
    return checked(text)
