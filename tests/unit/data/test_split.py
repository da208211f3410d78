"""Fingerprints see every change; the split is a function of the name alone."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ava_exp.data.document import Document
from ava_exp.data.fingerprint import Fingerprint
from ava_exp.data.split import Split, split_of

NAMES = [f"package/module_{index}.py" for index in range(4000)]
HELD_OUT_OF_60 = [2, 7, 16, 23, 24, 27, 42, 43, 51, 54]


def fingerprint(*documents: Document) -> str:
    result = Fingerprint()
    assert list(result.follow(documents)) == list(documents)
    return result.hexdigest()


def test_every_change_of_the_documents_changes_the_fingerprint() -> None:
    first, second = Document("a", "bc"), Document("d", "e")
    variants = [
        (first, second),
        (second, first),
        (first,),
        (Document("ab", "c"), second),
        (Document("a", "bC"), second),
        (Document("A", "bc"), second),
        (Document("a", "bcde"),),
    ]
    fingerprints = [fingerprint(*documents) for documents in variants]
    assert len(set(fingerprints)) == len(variants)
    assert fingerprints[0] == fingerprint(first, second)


def test_about_the_fraction_is_held_out() -> None:
    held_out = sum(split_of(name, 0.15) is Split.validation for name in NAMES)
    assert abs(held_out / len(NAMES) - 0.15) < 0.02


def test_the_split_never_changes_between_versions() -> None:
    """A changed hash would move documents that a trained model has seen into validation."""
    held_out = [index for index, name in enumerate(NAMES[:60]) if split_of(name, 0.15) is Split.validation]
    assert held_out == HELD_OUT_OF_60


@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_documents(name: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    if split_of(name, small) is Split.validation:
        assert split_of(name, large) is Split.validation


def test_the_ends_are_all_or_nothing() -> None:
    for name, (fraction, split) in itertools.product(NAMES[:200], ((0.0, Split.train), (1.0, Split.validation))):
        assert split_of(name, fraction) is split
