"""Finds the text files that a user's paths, folders and patterns mean, and nothing outside them."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ava_exp.errors import DataError, did_you_mean, must_be

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file and its name in the data set: the folder it was found in and its path below that."""

    name: str
    path: Path


def find_text_files(paths: list[str]) -> list[TextFile]:
    """Return the text files that `paths` mean, each once: paths in the order given, files sorted below each.

    A file that is named itself must have one of `SUFFIXES`; other files in folders and patterns are left out with a
    warning, hidden ones without. Raises `DataError` where nothing is found, or where a link leads out of its folder.
    """
    found: dict[Path, TextFile] = {}
    for path in paths:
        for file in _expand(path):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise DataError("`data.paths` must name at least one file, folder or pattern.")
    return list(found.values())


def is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _expand(text: str) -> list[TextFile]:
    if not text.strip() or "\0" in text:
        raise DataError(must_be("data.paths", "paths, without NUL characters", text))
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return _text_files(path, _walk(path), text)
    if path.is_file():
        if not is_text_file(path):
            raise DataError(f"{text} is not a text file that can be read: its name must end in {_listing()}.")
        return [TextFile(path.name, path)]
    if glob.has_magic(text):
        return _text_files(_fixed_part(path), _matches(path), text)
    raise DataError(f"{text} does not exist{_similar(path)}")


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a pattern begins with, up to its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield what a pattern matches, and what is in the folders that it matches."""
    for match in map(Path, glob.glob(str(pattern), recursive=True)):
        if match.is_dir() and not match.is_symlink():
            yield from _walk(match)
        else:
            yield match


def _walk(root: Path) -> Iterator[Path]:
    """Yield files and linked folders under `root`, without hidden ones and without following links."""
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names + [name for name in subfolders if Path(folder, name).is_symlink()]:
            if not name.startswith("."):
                yield Path(folder, name)


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _text_files(root: Path, found: Iterable[Path], text: str) -> list[TextFile]:
    candidates = sorted(set(found))
    inside = root.resolve()
    for path in candidates:
        if not path.resolve().is_relative_to(inside):
            raise DataError(
                f"{path} leads out of {root}, to {path.resolve()}. Name that file or folder in `data.paths` itself."
            )
    wanted = [path for path in candidates if is_text_file(path) and path.is_file()]
    if not wanted:
        raise DataError(f"{text} holds no file whose name ends in {_listing()}.")
    if others := sorted(set(candidates) - set(wanted)):
        logger.warning("%s: left out %d other files, such as %s.", text, len(others), others[0].name)
    return [TextFile(f"{inside.name}/{path.relative_to(root).as_posix()}", path) for path in wanted]


def _listing() -> str:
    return ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or is_text_file(entry)]
    return f": {did_you_mean(path.name, names)}" if names else "."
