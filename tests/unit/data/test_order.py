"""The order of samples is a permutation, another one for every key, and the same for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_exp.data.order import permute


def order(length: int, *key: int) -> list[int]:
    return [int(image) for image in permute(np.arange(length), length, key)]


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**63), 2**63), st.integers(0, 2**40))
def test_every_length_and_key_gives_a_bijection(length: int, seed: int, epoch: int) -> None:
    assert sorted(order(length, seed, epoch)) == list(range(length))


@settings(deadline=None)
@given(st.integers(1, 2**62), st.data())
def test_any_index_of_any_length_stays_inside(length: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=5)))
    images = permute(indices, length, (7,))
    assert ((images >= 0) & (images < length)).all()
    assert len(set(images.tolist())) == len(set(indices.tolist()))


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(order(100, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_an_index_alone_goes_where_it_goes_among_all() -> None:
    whole = order(1000, 3, 1)
    assert [permute(np.array([[index]]), 1000, (3, 1)).item() for index in range(1000)] == whole


def test_every_place_is_equally_likely() -> None:
    """Over 4,000 keys each of the 10 items visits each of the 10 places 400 times, give or take five deviations."""
    counts = np.zeros((10, 10))
    for seed in range(4000):
        counts[np.arange(10), permute(np.arange(10), 10, (seed, 0))] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_neighbours_are_torn_apart() -> None:
    steps = np.diff(permute(np.arange(10_000), 10_000, (0, 0)))
    assert abs(np.abs(steps).mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(10_000), permute(np.arange(10_000), 10_000, (0, 0)))[0, 1]) < 0.05


def test_the_order_never_changes_between_versions() -> None:
    """A changed order would break the exact continuation of runs that were started before."""
    assert order(10, 0, 0) == [1, 5, 8, 7, 4, 6, 0, 2, 9, 3]
    assert permute(np.arange(3), 2**40, (1, 2)).tolist() == [602820323892, 181097964195, 821217365938]
