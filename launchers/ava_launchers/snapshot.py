"""A copy of everything that a command is made of: the code, the options, the launchers."""

from __future__ import annotations

import shutil
from pathlib import Path

import ava_exp
import ava_launchers
from ava_exp.config.folders import data_folder

OPTIONS = ("conf", "sweeps")
LAUNCHERS = ("ava_launchers", "hydra_plugins")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def take_snapshot(target: Path) -> None:
    """Copy the running code and its options below `target`, which is all that Python's path then needs.

    A checkout is copied as it is, changes that were not committed and `conf/local` included.
    """
    package = Path(ava_exp.__file__).resolve().parent
    shutil.copytree(package, target / package.name, ignore=IGNORED)
    for name in OPTIONS:
        folder = data_folder(name)
        if not folder.resolve().is_relative_to(package):  # in a wheel they are a part of the package
            shutil.copytree(folder, target / name, ignore=IGNORED)
    for name in LAUNCHERS:
        folder = Path(ava_launchers.__file__).resolve().parents[1] / name
        if folder.is_dir():
            shutil.copytree(folder, target / name, ignore=IGNORED)
