"""Files that are replaced whole, and JSON that stays standard when a number is not finite."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from ava_exp.disk import sync
from ava_exp.errors import RunFolderError


def write_atomically(path: Path, text: str) -> None:
    """Replace `path`: after a crash it holds the old text or the new one, never a part.

    Raises:
        RunFolderError: The place cannot be written to; the old text is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """Return the one sentence for a place that cannot be written to."""
    reason = error.strerror or type(error).__name__
    return RunFolderError(f"{path} cannot be written ({reason}); free the place or choose another with output_dir=….")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return standard JSON; not-finite numbers become the strings that `float()` reads back, paths become text."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _NAMES.get(value, "NaN")
    return value


_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def restore_numbers(value: Any) -> Any:
    """Turn the strings that `to_json` wrote for not-finite numbers back into floats."""
    if isinstance(value, dict):
        return {key: restore_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
