"""A cache on the disk that processes may fill at the same time: entries are folders, whole or absent."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ava_exp.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load_or_build(
    folder: Path, load: Callable[[Path], T], build: Callable[[Path], None], on_progress: Callable[[str], None]
) -> tuple[T, bool]:
    """Return what `load` reads from a cache entry, and whether it was there already.

    Where it is missing, `build` fills a new folder; one process does it while the others wait. Where `load` raises
    `DataError`, its text is logged and the entry is built again.
    """
    if (folder / _COMPLETE).exists():
        try:
            return load(folder), True
        except DataError:
            logger.debug("Looking again under the lock.")
    with _locked(folder, on_progress):
        if (folder / _COMPLETE).exists():
            try:
                return load(folder), True
            except DataError as error:
                logger.warning("Rebuilding a damaged cache entry: %s", error)
        with new_folder(folder) as temporary:
            build(temporary)
        return load(folder), False
