"""The Mixture of Depths of a configuration: which layers, what is refused, and experiments of equal FLOPs."""

from __future__ import annotations

from typing import Any

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.faults import Severity
from ava_exp.config.mod import DepthLayers, DepthPart, LearnedModConfig, NoModConfig, StaticModConfig
from ava_exp.config.validate import validate
from ava_exp.models.arithmetic import forward_flops_per_token


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"layers": DepthLayers.later}, [3, 4, 5]),
        ({"layers": DepthLayers.alternating}, [1, 3, 5]),
        ({"start_layer": 2}, [2, 3, 4, 5]),
        ({"start_layer": 1, "end_layer": 3}, [1, 2, 3]),
        ({"start_layer": 1, "end_layer": 3, "layers": DepthLayers.later}, [2, 3]),
        ({"start_layer": 1, "layers": DepthLayers.alternating}, [2, 4]),
    ],
)
def test_layers_that_tokens_may_skip(settings: dict[str, Any], layers: list[int]) -> None:
    assert StaticModConfig(**settings).skippable_layers(6) == layers
    assert NoModConfig().skippable_layers(6) == []


def test_one_word_is_enough() -> None:
    assert isinstance(compose(["mod=learned"]).mod, LearnedModConfig)
    assert compose(["mod=static", "mod.part=feed_forward"]).mod == StaticModConfig(part=DepthPart.feed_forward)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mod.capacity_factor=0"], "`mod.capacity_factor` must be above 0 and at most 1, but is 0.0 instead."),
        (["mod.capacity_factor=1.5"], "`mod.capacity_factor` must be above 0 and at most 1"),
        (["mod.capacity_factor=0.001"], "`mod.capacity_factor` must be at least 1 / `data.sequence_length` (256)"),
        (["mod.start_layer=4"], "`mod.start_layer` must be below `model.num_layers` (4), but is 4"),
        (["mod.end_layer=4"], "`mod.end_layer` must be `mod.start_layer` (0) to 3, the last layer, but is 4"),
        (["mod.start_layer=2", "mod.end_layer=1"], "`mod.end_layer` must be `mod.start_layer` (2) to 3"),
        (["mod.layers=alternating", "mod.start_layer=3"], "`mod.layers` must be `all` or `later`"),
        (["mod.annealing_ratio=1.1"], "`mod.annealing_ratio` must be between 0 and 1"),
        (["training.compile=true"], "`training.compile` must be false with a Mixture of Depths, but is True instead."),
        (["mod.predictor_hidden_size=0"], "`mod.predictor_hidden_size` must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(overrides: list[str], message: str) -> None:
    found = [str(fault) for fault in validate(compose(["mod=learned", *overrides]))]
    assert any(message in fault for fault in found), found


def test_experts_that_would_be_nearly_empty_are_warned_of() -> None:
    few = ["mod=learned", "mod.capacity_factor=0.02", "training.batch_size=2"]
    (fault,) = (fault for fault in validate(compose(few)) if fault.key == "mod.capacity_factor")
    assert fault.severity is Severity.warning
    assert "layers process 12 tokens, which leaves an expert 3:" in str(fault)
    for enough in ([*few[:2], "training.batch_size=32"], [*few, "sparsity=dense"]):
        assert not [fault for fault in validate(compose(enough)) if fault.key.startswith("mod")]


@pytest.mark.parametrize(("experiment", "partner"), [("mod", "dense"), ("hybrid", "topk"), ("hybrid", "dense")])
def test_experiments_have_the_flops_of_their_partners(experiment: str, partner: str) -> None:
    ours, theirs = (compose([f"experiment=equal_flops_{name}"]) for name in (experiment, partner))
    length = ours.data.sequence_length
    flops = [forward_flops_per_token(config.architecture, length) for config in (ours, theirs)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
