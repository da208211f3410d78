"""Scaled rotary positions against transformers' own functions and direct formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ava_exp.config.model import ModelConfig, RopeScaling
from ava_exp.nn.rope import RotaryScaling, apply_rope, rope_tables

SCALED = [kind for kind in RopeScaling if kind is not RopeScaling.none]


def scaling(kind: RopeScaling, factor: float, original: int = 64, **changes: Any) -> RotaryScaling:
    return RotaryScaling(kind=kind, factor=factor, original_length=original, **changes)


def theirs(kind: RopeScaling, factor: float, original: int, head_dim: int, **changes: Any) -> tuple[Tensor, float]:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=math.ceil(original * factor),
        rope_parameters={
            "rope_type": kind.value,
            "rope_theta": 10_000.0,
            "factor": factor,
            "original_max_position_embeddings": original,
            **changes,
        },
    )
    return ROPE_INIT_FUNCTIONS[kind.value](config, torch.device("cpu"))


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize(("factor", "original"), [(2.0, 32), (8.0, 512), (7.3, 2048)])
@pytest.mark.parametrize(
    ("kind", "ours", "named"),
    [
        (RopeScaling.linear, {}, {}),
        (RopeScaling.yarn, {}, {}),
        (
            RopeScaling.yarn,
            {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
            {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        ),
    ],
)
def test_linear_and_yarn_equal_transformers(
    kind: RopeScaling, ours: dict[str, Any], named: dict[str, Any], factor: float, original: int, head_dim: int
) -> None:
    frequencies, attention_factor = theirs(kind, factor, original, head_dim, **named)
    angles = torch.arange(100.0).outer(frequencies)
    cos, sin = rope_tables(100, head_dim, 10_000.0, scaling=scaling(kind, factor, original, **ours))
    torch.testing.assert_close(cos, angles.cos() * attention_factor, rtol=0, atol=2e-5)
    torch.testing.assert_close(sin, angles.sin() * attention_factor, rtol=0, atol=2e-5)
    assert (attention_factor != 1) is (kind is RopeScaling.yarn)


def test_ntk_changes_the_base_so_that_the_slowest_pair_is_interpolated_and_the_fastest_is_not() -> None:
    head_dim, factor, theta = 16, 4.0, 10_000.0
    base = theta * factor ** (16 / 14)
    angles = [[position * base ** (-2 * pair / 16) for pair in range(8)] for position in range(50)]
    cos, sin = rope_tables(50, head_dim, theta, scaling=scaling(RopeScaling.ntk, factor))
    torch.testing.assert_close(cos, torch.tensor(angles).cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, torch.tensor(angles).sin(), rtol=0, atol=1e-5)
    linear, _ = rope_tables(50, head_dim, theta, scaling=scaling(RopeScaling.linear, factor))
    plain, _ = rope_tables(50, head_dim, theta)
    torch.testing.assert_close(cos[:, -1], linear[:, -1], rtol=0, atol=1e-5)
    assert torch.equal(cos[:, 0], plain[:, 0])


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    factor, original = 8.0, 512
    given = scaling(RopeScaling.yarn, factor, original, attention_factor=1.0)
    cos, _ = rope_tables(4096, 128, 10_000.0, scaling=given)
    plain, _ = rope_tables(4096, 128, 10_000.0)
    turns = original * 10_000.0 ** -(torch.arange(0, 128, 2) / 128) / (2 * math.pi)
    kept, interpolated = turns > 45, turns < 0.7  # the ends of the ramp are rounded to whole pairs
    assert kept.sum() > 4 and interpolated.sum() > 4
    torch.testing.assert_close(cos[:, kept], plain[:, kept], rtol=0, atol=1e-3)
    torch.testing.assert_close(cos[::8, interpolated], plain[: 4096 // 8, interpolated], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", RopeScaling)
def test_a_factor_of_one_changes_no_bit(kind: RopeScaling) -> None:
    plain = rope_tables(300, 32, 10_000.0)
    scaled = rope_tables(300, 32, 10_000.0, scaling=scaling(kind, 1.0))
    assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True))


def test_without_scaling_the_tables_are_those_of_the_formula_bit_for_bit() -> None:
    frequencies = 500.0 ** -(torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    angles = torch.arange(70, dtype=torch.float32).outer(frequencies)
    tables = rope_tables(70, 32, 500.0)
    assert torch.equal(tables[0], angles.cos()) and torch.equal(tables[1], angles.sin())


def test_texts_shorter_than_a_turn_of_the_fastest_pair_are_interpolated_but_for_that_pair() -> None:
    cos, _ = rope_tables(40, 8, 10_000.0, scaling=scaling(RopeScaling.yarn, 4.0, original=4, attention_factor=1.0))
    linear, _ = rope_tables(40, 8, 10_000.0, scaling=scaling(RopeScaling.linear, 4.0))
    torch.testing.assert_close(cos[:, 1:], linear[:, 1:])


def test_the_attention_factor_scales_queries_and_keys_and_their_gradients() -> None:
    tables = rope_tables(5, 8, 10_000.0, scaling=scaling(RopeScaling.yarn, 8.0, attention_factor=1.2))
    assert torch.allclose(tables[0] ** 2 + tables[1] ** 2, torch.tensor(1.44))
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = (table.double() for table in tables)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), (x,))


def model(**values: Any) -> ModelConfig:
    return ModelConfig(hidden_size=64, num_layers=1, num_heads=2, **values)


def test_the_factor_follows_from_the_lengths_and_the_original_length_from_the_factor() -> None:
    yarn = RopeScaling.yarn
    given_lengths = model(rope_scaling=yarn, max_position_embeddings=4096, original_max_position_embeddings=512)
    assert given_lengths.rope_scaling_factor == 8.0
    given_factor = model(rope_scaling=yarn, max_position_embeddings=4096, rope_scaling_factor=8.0)
    assert given_factor.original_max_position_embeddings == 512
    assert given_factor == given_lengths
    assert model(max_position_embeddings=4096).rope_scaling_factor is None
    assert {kind.name for kind in SCALED} == {"linear", "ntk", "yarn"}
