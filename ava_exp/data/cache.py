"""A cache on the disk that processes may fill at the same time: its entries are folders, whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ava_exp.disk import sync
from ava_exp.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cache_key(*parts: object) -> str:
    """Return the name of the entry that is made from `parts`, which are values of JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def load_or_build(
    entry: Path, load: Callable[[Path], T], build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[T, bool]:
    """Return what `load` reads from an entry, and whether it was there before.

    Where it is missing, `build` fills a new folder; one process does so while others wait. Where `load` raises
    `DataError`, its text is logged and the entry is built again.
    """
    with _locked(entry, on_progress):
        if entry.exists():
            try:
                return load(entry), True
            except DataError as error:
                logger.warning("A cache entry is damaged and is made again. %s", error)
        with new_folder(entry) as temporary:
            build(temporary)
        return load(entry), False


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` once it is filled and on the disk.

    One process at a time may do so. Raises `DataError` if it cannot be written; `folder` is then as it was.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        _synchronize(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DataError(f"{folder} cannot be written: {error.strerror}. Choose another `cache_dir`.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _locked(entry: Path, on_progress: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_progress(f"cache: waiting for another process that prepares {entry}")
            lock.acquire()
    except OSError as error:
        raise DataError(f"{entry.parent} cannot be written: {error.strerror}. Choose another `cache_dir`.") from error
    try:
        yield
    finally:
        lock.release()


def _synchronize(folder: Path) -> None:
    """Bring a folder's files, its subfolders and itself to the disk."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))
