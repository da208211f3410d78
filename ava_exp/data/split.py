"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from enum import Enum


class Split(Enum):
    """The two parts of every data set."""

    train = "train"
    validation = "validation"


def split_of(name: str, validation_fraction: float) -> Split:
    """Return a document's split, decided by the hash of its name alone.

    Adding or removing other documents moves none, and the two splits share none.
    """
    uniform = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return Split.validation if uniform < validation_fraction else Split.train
