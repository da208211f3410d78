"""Errors that a user can mend, exit codes, and the sentences they are told in. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75
"""A signal stopped the run after its state was saved; the same command goes on (`EX_TEMPFAIL` of sysexits.h)."""
EXIT_OTHER_RANK = 76
"""Another rank of the run failed, and this one ended because of it (`EX_PROTOCOL` of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C before there was anything to save."""


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, without a traceback, exit code 2."""


class ConfigError(UserError):
    """The configuration cannot be composed or is inconsistent."""


class DataError(UserError):
    """A data source, a tokenizer or a token shard cannot be used as it is."""


class CheckpointError(UserError):
    """No checkpoint can be used, or the one that was asked for cannot."""


class RunFolderError(UserError):
    """A run folder is in use, unwritable or inconsistent."""


class OtherRankError(Exception):
    """Another rank failed, which is told in one line: what happened here is its consequence. Exit code 76."""


def must_be(name: str, expected: str, actual: Any, mend: str = "") -> str:
    """Return the one sentence every value error uses: what must be, what is, and how to mend it."""
    sentence = f"`{name}` must be {expected}, but is {actual!r} instead."
    return f"{sentence} {mend}" if mend else sentence


def nearest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Return at most `count` options that look like `word`, best first."""
    return difflib.get_close_matches(word, list(options), n=count, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return 'did you mean `a` or `b`?', or the whole list when nothing is near."""
    options = sorted(options)
    close = nearest(word, options)
    if close:
        return "did you mean " + " or ".join(f"`{name}`" for name in close) + "?"
    return "it can be " + ", ".join(f"`{name}`" for name in options) + "."
