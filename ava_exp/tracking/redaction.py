"""Keeps secrets out of everything that is written: logs, metadata, configuration, trackers."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[redacted]"

_WORD = r"(?:password|passwd|secret|credentials?|authorization|(?:api|access|secret|private)_?key|(?:access|auth)token)"
_PIECES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "per")
_TOKEN = r"(?<![a-z])" + "".join(f"(?<!{piece}_)" for piece in _PIECES) + "token"
"""A token is a secret, except where it is a piece of text: `eos_token`, `bytes_per_token`, `tokens`."""

_SECRET_KEY = re.compile(rf".*?(?:{_WORD}|{_TOKEN})", re.IGNORECASE)
_VALUE = r"(?P<value>(?!\[redacted\]|null\b|None\b)(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"']+))"
_ASSIGNMENT = re.compile(
    rf"(?P<key>(?:{_WORD}[\"']?\s*[=:]|{_TOKEN}(?:\s*=|[\"']\s*:)|(?<=_)token\s*:|^[ \t-]*token\s*:)[ \t]*){_VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s/]+@", re.IGNORECASE)
_HEADER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_KNOWN_SHAPE = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-)[\w-]{16,}")


def is_secret(key: str) -> bool:
    """Tell whether a key's value must not be seen: `hub.token`, `API_KEY`, but not `tokens` nor `eos_token`."""
    return _SECRET_KEY.fullmatch(key) is not None


def redact_text(text: str) -> str:
    """Hide passwords in URLs, authorization headers, well-known access tokens and `password=…` in free text."""
    text = _URL.sub(rf"\1:{HIDDEN}@", text)
    text = _HEADER.sub(rf"\1 {HIDDEN}", text)
    text = _KNOWN_SHAPE.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNMENT.sub(_hide_value, text)


def _hide_value(match: re.Match[str]) -> str:
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    return f"{match['key']}{quote}{HIDDEN}{quote}"


def redact(value: Any) -> Any:
    """Return a copy without secrets: what stands under keys that look like secrets, numbers excepted, and in texts."""
    if isinstance(value, dict):
        return {key: _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _redact_item(key: str, value: Any) -> Any:
    if not is_secret(key):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_item(key, item) for item in value]
    return HIDDEN if value and isinstance(value, str | dict) else value
