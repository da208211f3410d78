"""Runs beside each other: what came of each, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ava_exp.config.identity import flatten
from ava_exp.errors import EXIT_OK, UserError
from ava_exp.runs.catalogue import Entry, find_entry
from ava_exp.runs.table import in_columns

FIGURES = ("tokens", "seconds", "tokens_per_s")
ABSENT = "-"


def compare(output_dir: Path, names: Sequence[str]) -> int:
    """Print results and differing settings of several runs, a column for each. Raises UserError for fewer than two."""
    if len(names) < 2:
        raise UserError("`compare` needs two runs or more.")
    entries = [find_entry(output_dir, name) for name in names]
    rows = [["", *(entry.name for entry in entries)], *_results(entries)]
    print("\n".join(in_columns(rows)))
    settings = _differences([_settings(entry) for entry in entries])
    print("\nsettings that differ:" if settings else "\nno setting differs")
    print("\n".join(in_columns(settings)), end="\n" if settings else "")
    return EXIT_OK


def _results(entries: Sequence[Entry]) -> list[list[str]]:
    summaries = [(entry.folder.read_json("summary.json") if entry.folder else None) or {} for entry in entries]
    finals = [summary.get("final") or {} for summary in summaries]
    rows = [
        ["status", *(entry.status for entry in entries)],
        ["step", *(entry.steps() or ABSENT for entry in entries)],
        ["loss", *(entry.loss() or ABSENT for entry in entries)],
    ]
    rows += [[f"validation {key}", *(_number(final.get(key)) for final in finals)] for key in _keys(finals)]
    rows += [[key, *(_number(summary.get(key)) for summary in summaries)] for key in FIGURES if any(summaries)]
    return rows


def _settings(entry: Entry) -> dict[str, Any]:
    if entry.folder is None or not entry.folder.config.is_file():
        return {}
    return flatten(yaml.safe_load(entry.folder.config.read_text(encoding="utf-8")))


def _differences(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [[key, *(str(values.get(key, ABSENT)) for values in settings)] for key in _keys(settings)]
    return [row for row in rows if len(set(row[1:])) > 1]


def _keys(mappings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys that any of the mappings has, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _number(value: Any) -> str:
    return ABSENT if value is None else f"{value:.6g}"
