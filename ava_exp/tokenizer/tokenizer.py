"""`Tokenizer`: what the rest of the platform asks of a tokenizer, whoever trained it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import pre_tokenizers

from ava_exp.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
"""Largest `tokenizer.json` that is read; a vocabulary of a million tokens takes about 100 MB."""
END_OF_DOCUMENT_TOKENS = ("<|end_of_document|>", "<|endoftext|>", "</s>", "<|eos|>")
"""Tokens known to end a document, in the order in which they are looked for."""

_BYTE_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())


class TokenizerMaker(Protocol):
    """Gives a tokenizer: trains one on text, or reads one."""

    def recipe(self) -> str | None:
        """Return everything beside the text that decides the result; None where the text decides nothing."""

    def make(self, texts: Iterable[str]) -> Tokenizer:
        """Return the tokenizer. Raises `DataError` if there is none."""


class Tokenizer:
    """Encodes text without loss: `decode(encode(text)) == text`.

    Text never yields a special token: one that is spelled out in a document is encoded as the characters it is.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Take a tokenizer of the `tokenizers` library. Raises `DataError` if it has no end-of-document token."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_of_document_id = _end_of_document_id(backend)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """One more than the largest id, so that every id is below it."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any token at its beginning or end."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of each text, on all processor cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token such as `<|user|>`, or None where there is none."""
        return self._backend.token_to_id(token)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return how many UTF-8 bytes of text each id stands for, shape (vocab_size,); special tokens stand for none.

        The sum over a text's tokens is the text's length, exactly so for byte-level tokenizers. Others may differ by
        what they put before a text.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        is_byte_level = _has_decoder(json.loads(self._backend.to_str())["decoder"], "ByteLevel")
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = _byte_length(token, is_byte_level)
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how text is encoded."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, the format that other libraries read too."""
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises `DataError` if it is missing, too large or not one."""
        return cls(_read(path))


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        raise DataError(f"The tokenizer {str(path)!r} cannot be read: {error}.") from error
    if len(raw) > MAX_FILE_BYTES:
        raise DataError(f"{path} is too large for a tokenizer: the limit is {MAX_FILE_BYTES:,} bytes.")
    try:
        return tokenizers.Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises bare `Exception`s
        raise DataError(f"The tokenizer {path} is not a `tokenizer.json`: {error}.") from error


def _end_of_document_id(backend: tokenizers.Tokenizer) -> int:
    for token in END_OF_DOCUMENT_TOKENS:
        if (index := backend.token_to_id(token)) is not None:
            return index
    raise DataError(
        "The tokenizer has no token that ends a document: it needs one of "
        + ", ".join(f"`{token}`" for token in END_OF_DOCUMENT_TOKENS)
        + "."
    )


def _has_decoder(decoder: dict[str, Any] | None, kind: str) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == kind or any(_has_decoder(part, kind) for part in decoder.get("decoders", []))


def _byte_length(token: str, is_byte_level: bool) -> int:
    if is_byte_level and _BYTE_ALPHABET.issuperset(token):
        return len(token)  # one character of the alphabet stands for one byte
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1  # a byte that has no token of its own
    return len(token.replace("\u2581", " ").encode())  # SentencePiece writes a space so
