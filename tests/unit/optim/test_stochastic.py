"""Stochastic rounding: its expectation, what it keeps of small updates, and that it can be repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ava_exp.config.training import AdamWConfig
from ava_exp.optim.stochastic import round_stochastically
from ava_exp.optim.update import Updater


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bf16 values below and above, by magnitude."""
    low = (values.view(torch.int32) & -65536).view(torch.float32)
    return low, ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.1e-5, -77.7, 1e-40])
def test_it_goes_to_the_two_neighbours_and_its_mean_is_the_value(value: float) -> None:
    torch.manual_seed(0)
    values = torch.full((40_001,), value)
    rounded = round_stochastically(values).float()
    low, high = neighbours(values[:1])
    assert set(rounded.unique().tolist()) == {low.item(), high.item()}
    spacing = (high - low).abs().item()
    assert abs(rounded.double().mean().item() - value) < 4 * 0.5 * spacing / 40_001**0.5 + 1e-9 * abs(value)


def test_what_bf16_can_hold_is_not_changed() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, float("inf"), float("-inf")]).bfloat16().float()
    assert torch.equal(round_stochastically(values).float(), values)


def test_every_position_draws_its_own_bits() -> None:
    torch.manual_seed(0)
    ups = round_stochastically(torch.full((4, 20_000), 1 + 2**-8)) > 1
    assert (ups.float().mean(dim=1) - 0.5).abs().max() < 0.02
    correlations = torch.corrcoef(ups.float()) - torch.eye(4)
    assert correlations.abs().max() < 0.04


def updater(model: nn.Module, **kwargs: bool) -> Updater:
    return Updater(
        model,
        lambda groups: AdamWConfig(learning_rate=1e-4).build(groups=groups),
        weight_decay=0.0,
        master_weights=False,
        **kwargs,
    )


def train(model: nn.Linear, wrapped: Updater, steps: int) -> None:
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        wrapped.apply(1e-4, max_norm=1e9)


def ones() -> nn.Linear:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    return model


def test_updates_that_bf16_loses_add_up() -> None:
    """Forty steps of 1e-4 from 1, where bf16 has values 4e-3 apart below."""
    torch.manual_seed(0)
    plain, chance = ones(), ones()
    train(plain, updater(plain), 40)
    train(chance, updater(chance, stochastic_rounding=True), 40)
    assert (plain.weight == 1).all()
    assert chance.weight.float().mean().item() == pytest.approx(1 - 40e-4, abs=2e-4)


def test_moments_decay_on_average_where_rounding_to_nearest_would_hold_them() -> None:
    model = ones()
    config = AdamWConfig(learning_rate=1e-4, betas=[0.9, 0.999])
    wrapped = Updater(
        model,
        lambda groups: config.build(groups=groups),
        weight_decay=0.0,
        master_weights=False,
        stochastic_rounding=True,
    )
    train(model, wrapped, 1)
    start = wrapped.optimizer_state()[0]["weight/exp_avg_sq"].float().mean()
    for _ in range(200):
        model.weight.grad = torch.zeros_like(model.weight)
        wrapped.apply(0.0, max_norm=1.0)
    after = wrapped.optimizer_state()[0]["weight/exp_avg_sq"]
    assert after.dtype == torch.bfloat16
    assert (after.float().mean() / start).item() == pytest.approx(0.999**200, rel=0.01)


def test_weights_and_states_stay_in_bf16_and_nothing_wide_is_left() -> None:
    model = ones()
    wrapped = updater(model, stochastic_rounding=True)
    train(model, wrapped, 2)
    assert model.weight.dtype == torch.bfloat16 and model.weight.grad is None
    tensors, _ = wrapped.optimizer_state()
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim} == {torch.bfloat16}
    assert wrapped.stand_ins is not None
    assert all(p.numel() == 0 and p.grad is None for p in wrapped.stand_ins.parameters.values())


@pytest.mark.parametrize("portion_values", [1, 10**9])
def test_restored_states_and_generator_repeat_the_same_updates(
    portion_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ava_exp.optim.stochastic.PORTION_VALUES", portion_values)
    torch.manual_seed(3)
    first = ones()
    one = updater(first, stochastic_rounding=True)
    train(first, one, 3)
    second = ones()
    second.load_state_dict(first.state_dict())
    other = updater(second, stochastic_rounding=True)
    tensors, numbers = one.optimizer_state()
    other.load_optimizer_state({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    generator = torch.get_rng_state()
    train(first, one, 3)
    torch.set_rng_state(generator)
    train(second, other, 3)
    assert torch.equal(first.weight, second.weight)
    states = zip(one.optimizer_state()[0].values(), other.optimizer_state()[0].values(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in states)


def test_a_step_that_is_refused_leaves_no_gradient() -> None:
    model = ones()
    wrapped = updater(model, stochastic_rounding=True)
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    assert not wrapped.apply(1e-4, 1.0)[1]
    assert model.weight.grad is None and (model.weight == 1).all()
