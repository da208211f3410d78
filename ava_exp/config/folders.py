"""Where `conf/` and `sweeps/` are, and which groups and options they hold. Standard library only."""

from __future__ import annotations

from pathlib import Path

SWEEP_GROUP = "sweep"
"""The group whose options are the files of `sweeps/`."""


def data_folder(name: str) -> Path:
    """Return the folder `conf` or `sweeps`: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


def group_folder(group: str) -> Path:
    """Return the folder that holds the options of `group`."""
    return data_folder("sweeps") if group == SWEEP_GROUP else data_folder("conf") / group


def group_names() -> list[str]:
    """Return the names of all groups, sorted."""
    return sorted([SWEEP_GROUP, *(path.name for path in data_folder("conf").iterdir() if path.is_dir())])


def option_names(group: str) -> list[str]:
    """Return the options of a group, sorted."""
    return sorted(path.stem for path in group_folder(group).glob("*.yaml"))
