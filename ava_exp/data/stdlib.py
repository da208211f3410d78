"""The real text that is on every machine: the running Python's own standard library."""

from __future__ import annotations

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ava_exp.data.document import BadRow, Document, Quarantine
from ava_exp.data.fingerprint import file_stamp
from ava_exp.errors import DataError

LEFT_OUT_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
"""Tests (some distributions do not ship them) and what is not the standard library."""
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
"""Records of how this Python was built and its local customisation: they differ from machine to machine."""
TOPICS = "pydoc_data/topics.py"
DOCUMENTATION, SINGLE_MODULES = "documentation", "single modules"


class StdlibSource:
    """The standard library's Python sources, one document a file, and its documentation, one document a topic.

    Empty files (`__init__.py`) hold no text and are no documents. The source of a document is its top-level package.
    """

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        self._quarantine = Quarantine(limit=100, mend="This Python installation looks damaged.")

    @property
    def bad_rows(self) -> list[BadRow]:
        return self._quarantine.rows

    def describe(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    def stamp(self) -> str:
        return file_stamp(self._files().values(), self.describe())

    def documents(self) -> Iterator[Document]:
        """Yield every document, sources first, both parts sorted by name."""
        files = self._files()
        if not files:
            raise DataError(f"This Python has no standard library sources in {self.root}: use `data=files` instead.")
        for name, file in files.items():
            text = self._topics() if name == TOPICS else {name: self._read(name, file)}
            yield from (Document(key, value, _source(key)) for key, value in text.items() if value.strip())

    def _files(self) -> dict[str, Path]:
        files = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if _is_wanted(name)]
            for name in names:
                if name.endswith(".py") and _is_wanted(name):
                    file = Path(folder, name)
                    files[file.relative_to(self.root).as_posix()] = file
        return dict(sorted(files.items()))

    def _read(self, name: str, file: Path) -> str:
        try:
            with tokenize.open(file) as stream:  # honours the encoding that the file declares (PEP 263)
                return stream.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            self._quarantine.add(BadRow(name, None, str(error)))
            return ""  # no text, no document

    def _topics(self) -> dict[str, str]:
        from pydoc_data.topics import topics

        return {f"pydoc_data/topics/{name}": text for name, text in sorted(topics.items())}


def _source(name: str) -> str:
    package, slash, _ = name.partition("/")
    if not slash:
        return SINGLE_MODULES
    return DOCUMENTATION if package == "pydoc_data" else package


def _is_wanted(name: str) -> bool:
    return name not in LEFT_OUT_FOLDERS and not name.startswith(LEFT_OUT_PREFIXES)
