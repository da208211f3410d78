"""Every preset: it is as large as its closed form says, up to the largest, without a byte allocated."""

from __future__ import annotations

import functools
import math

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.folders import option_names
from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import ParameterBreakdown, count_parameters
from ava_exp.models.decoder import build_model

LEARNING_RATES = {
    125e6: 6e-4,
    350e6: 3e-4,
    760e6: 2.5e-4,
    1.3e9: 2e-4,
    2.7e9: 1.6e-4,
    6.7e9: 1.2e-4,
    13e9: 1e-4,
    175e9: 0.6e-4,
}
"""By parameters: [brown2020gpt3] table 2.1."""
WITHOUT_A_RATE_OF_THEIR_SOURCE = [
    name for name in option_names("model") if name not in ("quick", "tiny", "small", "base", "large")
]


@functools.cache
def preset(name: str) -> RunConfig:
    return compose(["~local", f"model={name}"])


def sizes(name: str) -> ParameterBreakdown:
    config = preset(name)
    return count_parameters(config.architecture)


@pytest.mark.parametrize("name", option_names("model"))
def test_the_built_preset_has_its_closed_form(name: str) -> None:
    config = preset(name)
    model = build_model(config.architecture, device="meta")
    assert config.model.preset == name
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes(name).total


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("debug_200m", 1.9e9, 0.22e9),
        ("b1", 1.83e9, 0.58e9),
        ("b7", 36.4e9, 10.4e9),
        ("b300", 3.34e12, 932e9),
        ("cpu_small", 50e6, 24e6),
        ("cpu_medium", 200e6, 75e6),
        ("gpu_base", 500e6, 170e6),
        ("gpu_large", 1.5e9, 450e6),
    ],
)
def test_sizes(name: str, total: float, active: float) -> None:
    assert sizes(name).total == pytest.approx(total, rel=0.05)
    assert sizes(name).active == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize("name", WITHOUT_A_RATE_OF_THEIR_SOURCE)
def test_the_learning_rate_is_that_of_the_nearest_size(name: str) -> None:
    active = sizes(name).active
    nearest = min(LEARNING_RATES, key=lambda size: abs(math.log(size / active)))
    assert preset(name).model.learning_rate == LEARNING_RATES[nearest]


@pytest.mark.parametrize("name", [name for name in WITHOUT_A_RATE_OF_THEIR_SOURCE if name.startswith(("b", "debug"))])
def test_the_width_is_eight_thirds_in_steps_of_256(name: str) -> None:
    model = preset(name).model
    assert model.intermediate_size == round(8 / 3 * model.hidden_size / 256) * 256
