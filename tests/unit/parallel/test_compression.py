"""What is lost of gradients that travel as products of narrow matrices, and what is made up for."""

from __future__ import annotations

import pytest
import torch

from ava_exp.config.compose import compose
from ava_exp.config.distributed import DistributedConfig, GradientCompression
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.validate import report, validate
from ava_exp.errors import ConfigError
from ava_exp.parallel.compression import Distance, LowRankSums
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.start import join_ranks

DIVIDED = ("hardware.num_devices=2", "distributed.expert_parallel=2")
SHAPES = {"matrix": (24, 32), "stack": (3, 24, 32), "small": (4, 4), "vector": (100,)}


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_what_is_small_or_no_matrix_stays_as_it_is() -> None:
    sums, gradients, distance = LowRankSums(weights(), 2, Ranks()), drawn(0), Distance()
    num_bytes = sums.add_up(gradients, 1.0, distance)
    assert num_bytes == 4 * (4 * 2 * (24 + 32) + 16 + 100)
    for name in ("small", "vector"):
        assert torch.equal(gradients[name], drawn(0)[name])
    for name in ("matrix", "stack"):
        assert torch.equal(torch.linalg.matrix_rank(gradients[name]), torch.full(SHAPES[name][:-2], 2))
    assert 0.5 < distance.relative < 1, "noise has no narrow form"


def test_what_is_narrow_comes_out_whole() -> None:
    sums = LowRankSums(weights(), 2, Ranks())
    narrow = {name: value for name, value in drawn(0).items() if name not in ("matrix", "stack")}
    for name in ("matrix", "stack"):
        narrow[name] = drawn(1)[name][..., :2] @ drawn(2)[name][..., :2, :]
    gradients = {name: value.clone() for name, value in narrow.items()}
    distance = Distance()
    sums.add_up(gradients, 1.0, distance)
    assert distance.relative < 1e-5
    for name, value in narrow.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_what_is_lost_comes_later(scale: float) -> None:
    """All that was given in equal steps has nearly arrived after many, however gradients are scaled."""
    sums, arrived = LowRankSums(weights(), 4, Ranks()), torch.zeros(SHAPES["matrix"])
    for _ in range(60):
        gradients = {name: scale * value for name, value in drawn(0).items()}
        sums.add_up(gradients, scale)
        arrived += gradients["matrix"] / scale
    assert (arrived / 60 - drawn(0)["matrix"]).norm() < 0.1 * drawn(0)["matrix"].norm()


def test_a_gradient_that_is_none_leaves_no_trace() -> None:
    sums = LowRankSums(weights(), 2, Ranks())
    sums.add_up(drawn(0), 1.0)
    before = {name: tensor.clone() for name, tensor in sums.state().items()}
    broken = drawn(1)
    broken["stack"][1, 2, 3] = torch.nan
    sums.add_up(broken, 1.0)
    assert not broken["stack"].isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sums.state().items())


def test_zero_is_no_end() -> None:
    """An expert without tokens has no gradient for a while."""
    sums, zeros = LowRankSums(weights(), 2, Ranks()), weights()
    sums.add_up(zeros, 1.0)
    assert all(not gradient.any() for gradient in zeros.values())
    gradients, distance = drawn(0), Distance()
    sums.add_up(gradients, 1.0, distance)
    sums.add_up(gradients := drawn(0), 1.0)
    assert distance.relative < 1 and gradients["matrix"].any()


def test_it_goes_on_from_what_it_kept() -> None:
    one, other = LowRankSums(weights(), 2, Ranks()), LowRankSums(weights(), 2, Ranks())
    one.add_up(drawn(0), 1.0)
    other.load_state(one.state())
    first, second = drawn(1), drawn(1)
    one.add_up(first, 1.0)
    other.add_up(second, 1.0)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    other.load_state({"error/matrix": torch.zeros(3, 3)})  # of another model: it starts anew
    assert other.errors["matrix"].shape == SHAPES["matrix"]


def test_what_compresses_nothing_is_refused() -> None:
    told = report(validate(compose(["~local", "distributed=fsdp2", "distributed.gradient_compression=bf16"])))
    assert "`distributed.gradient_compression` must be `none` with `distributed=fsdp2`, but is 'bf16' instead." in told
    told = report(validate(compose(["~local", *DIVIDED, "distributed.gradient_compression=bf16"])))
    assert "must be `none` with `distributed.expert_parallel`, but is 'bf16' instead." in told
    alone = DistributedConfig(gradient_compression=GradientCompression.powersgd)
    with pytest.raises(ConfigError, match=r"must be `none` alone, but is .powersgd. instead\. Ask for more ranks"):
        join_ranks(alone, HardwareConfig(name="cpu", device=DeviceType.cpu))
