"""An existing tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ava_exp.errors import DataError
from ava_exp.tokenizer.tokenizer import Tokenizer

PROBE = "def f(x):\n    return  x + 1\t# Größe, 東京, 🙂\n"


class FileTokenizer:
    """Reads a `tokenizer.json`, or the one in a folder, and refuses a tokenizer that changes text."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def recipe(self) -> None:
        """Return None: no text is learned from."""

    def make(self, texts: Iterable[str] = ()) -> Tokenizer:
        """Read the tokenizer; `texts` are not looked at. Raises `DataError` if it cannot be used."""
        path = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        tokenizer = Tokenizer.load(path)
        if (back := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
            raise DataError(f"The tokenizer {path} changes text: {PROBE!r} comes back as {back!r}. Use a lossless one.")
        return tokenizer
