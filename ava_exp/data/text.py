"""Bytes of text files: decompressed within bounds, and decoded or refused with the reason."""

from __future__ import annotations

import codecs
import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

from ava_exp.errors import DataError

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Longest document, and longest line of a `.jsonl` file, that is read into memory."""
MAX_EXPANSION = 100
"""A compressed file may become so many times larger: text reaches about 20, a decompression bomb 1,000."""
MIN_EXPANSION_BYTES = 16 * 2**20
"""Whatever its ratio, a compressed file may become this large."""

_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextError(ValueError):
    """What should be text is none; the message is the reason."""


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises `TextError` for bytes that are not text, and `DataError` for a file that is too large or damaged.
    """
    with _opened(path) as stream:
        return checked(_decoded(_whole(stream, path)))


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset in the file, UTF-8 bytes) of every line of a file."""
    with _opened(path) as stream:
        head = stream.read(len(codecs.BOM_UTF32_LE))
        stream.seek(0)
        if _wide_encoding(head):
            yield from _wide_lines(stream, path)
        else:
            yield from _utf8_lines(stream, path)


def decode_line(raw: bytes, offset: int) -> str:
    """Return the text of one UTF-8 line that begins at byte `offset`. Raises `TextError`."""
    return checked(_decoded_utf8(raw, offset))


def checked(text: str) -> str:
    """Return the text. Raises `TextError` if it is blank or holds what no text has."""
    if not text.strip():
        raise TextError("there is no text in it")
    if (position := text.find("\0")) >= 0:
        raise TextError(f"character {position} is NUL: not a text, or UTF-16 without a byte order mark")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"character {error.start} is half of a surrogate pair") from error
    return text


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _whole(stream: BufferedIOBase, path: Path) -> bytes:
    limit = min(MAX_DOCUMENT_BYTES, _expansion_limit(path))
    raw = bytearray()
    while piece := stream.read(2**20):  # asking for the limit at once would allocate it
        raw += piece
        if len(raw) > limit:
            raise _too_large(path, "it", limit)
    return bytes(raw)


def _utf8_lines(stream: BufferedIOBase, path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset, number, limit = 0, 0, _expansion_limit(path)
    while raw := stream.readline(min(MAX_DOCUMENT_BYTES, limit - offset) + 1):
        number += 1
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise _too_large(path, f"line {number}", MAX_DOCUMENT_BYTES)
        if offset + len(raw) > limit:
            raise _too_large(path, "it", limit)
        yield number, offset, raw
        offset += len(raw)


def _wide_lines(stream: BufferedIOBase, path: Path) -> Iterator[tuple[int, int, bytes]]:
    try:
        text = _decoded(_whole(stream, path))
    except TextError as error:
        raise DataError(f"{path}: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, 0, line.encode()


def _decoded(raw: bytes) -> str:
    encoding = _wide_encoding(raw)
    if not encoding:
        return _decoded_utf8(raw, 0)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"byte {error.start} is not {encoding.upper()}, as its mark says") from error


def _decoded_utf8(raw: bytes, offset: int) -> str:
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    try:
        return raw[mark:].decode()
    except UnicodeDecodeError as error:
        place, byte = offset + mark + error.start, error.object[error.start]
        raise TextError(f"byte {place} (0x{byte:02x}) is not UTF-8; convert the file to UTF-8") from error


def _wide_encoding(head: bytes) -> str:
    return next((name for mark, name in _WIDE_MARKS if head.startswith(mark)), "")


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    try:
        with gzip.open(path) if is_compressed(path) else path.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be decompressed: {error}. It is truncated or damaged.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _expansion_limit(path: Path) -> int:
    """Return how many bytes a file may hold in all: bounded where it is compressed."""
    return max(MAX_EXPANSION * path.stat().st_size, MIN_EXPANSION_BYTES) if is_compressed(path) else sys.maxsize


def _too_large(path: Path, what: str, limit: int) -> DataError:
    how = "decompresses to more than" if is_compressed(path) else "is longer than"
    return DataError(f"{path}: {what} {how} {limit:,} bytes, the limit. Split it into smaller parts.")
