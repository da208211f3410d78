"""The order of samples as a pure function: a keyed permutation that needs no memory and no state.

A Feistel network is a bijection whatever its round function; on a domain slightly too large, walking along its cycle
until an index falls inside gives a bijection of exactly the length asked for [black2002ciphers] method 2.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8

UInt64s = npt.NDArray[np.uint64]


def permute(indices: npt.NDArray[np.int64], length: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return where a permutation of `range(length)` sends each index; another `key` is another permutation.

    `indices` have any shape. The cost is about two evaluations of the network an index, whatever the length.
    """
    assert length > 0 and bool(((indices >= 0) & (indices < length)).all()), f"indices must be within {length}"
    half_bits = max(1, -(-(length - 1).bit_length() // 2))  # the domain has 2 ** (2 * half_bits) >= length values
    round_keys = _round_keys(key)
    result = _feistel(indices.astype(np.uint64), half_bits, round_keys)
    while (outside := result >= length).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> UInt64s:
    digest = hashlib.sha512(",".join(str(int(part)) for part in key).encode()).digest()
    return np.frombuffer(digest, dtype="<u8", count=NUM_ROUNDS)


def _feistel(values: UInt64s, half_bits: int, round_keys: UInt64s) -> UInt64s:
    shift = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: UInt64s) -> UInt64s:
    """Scramble 64 bits (the finaliser of SplitMix64); products wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
