"""One update in every precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ava_exp.config.training import AdamWConfig
from ava_exp.optim.groups import parameter_groups
from ava_exp.optim.update import LossScale, Updater


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def updater(model: nn.Module, lr: float = 0.1, decay: float = 0.0, **kwargs: object) -> Updater:
    settings = {"master_weights": False, **kwargs}
    return Updater(model, lambda g: AdamWConfig(learning_rate=lr).build(groups=g), weight_decay=decay, **settings)  # type: ignore[arg-type]


def backward(model: Net, factor: float = 1.0) -> None:
    x = model.norm(model.embedding(torch.arange(5)))
    (model.linear(x).float().square().sum() * factor).backward()


def test_matrices_decay_and_nothing_else() -> None:
    decaying, others = parameter_groups(net(), 0.5)
    assert decaying["names"] == ["linear.weight"]
    assert decaying["weight_decay"] == 0.5
    assert others["names"] == ["embedding.weight", "norm.weight", "norm.bias", "linear.bias"]
    assert others["weight_decay"] == 0.0


def test_fp32_update_equals_plain_adamw_with_clipping() -> None:
    ours, theirs = net(), net()
    wrapped = updater(ours, decay=0.1)
    groups = [{k: v for k, v in g.items() if k != "names"} for g in parameter_groups(theirs, 0.1)]
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(3):
        backward(ours)
        norm, applied = wrapped.apply(0.1, max_norm=0.5)
        backward(theirs)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        assert applied
        assert norm == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_masters_remember_updates_too_small_for_bf16() -> None:
    model = net(torch.bfloat16)
    wrapped = updater(model, master_weights=True)
    start = model.linear.weight.detach().clone()
    for _ in range(40):
        backward(model)
        wrapped.collect_gradients()
        assert model.linear.weight.grad is None
        wrapped.apply(1e-4, max_norm=1e9)
    master = wrapped.weights["linear.weight"]
    assert master.dtype == torch.float32
    assert torch.equal(model.linear.weight, master.bfloat16())
    assert (master - start.float()).abs().max() > 3e-3  # forty steps of 1e-4, most of them below bf16's spacing


def test_micro_batches_accumulate_in_fp32_on_the_masters() -> None:
    model = net(torch.bfloat16)
    wrapped = updater(model, master_weights=True)
    total = torch.zeros(3, 4)
    for factor in (1.0, 1e-3, 1e-3):
        backward(model, factor)
        assert model.linear.weight.grad is not None
        total += model.linear.weight.grad.float()
        wrapped.collect_gradients()
    assert torch.equal(wrapped.weights["linear.weight"].grad, total)


def test_wide_states_round_the_weights_and_keep_moments_in_fp32() -> None:
    model = net(torch.float16)
    wrapped = updater(model, wide_states=True)
    backward(model)
    wrapped.collect_gradients()
    wrapped.apply(1e-3, 1.0)
    tensors, _ = wrapped.optimizer_state()
    assert tensors["linear.weight/exp_avg_sq"].dtype == torch.float32
    assert torch.equal(wrapped.weights["linear.weight"], model.linear.weight.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_no_weight(bad: float) -> None:
    model = net()
    wrapped = updater(model)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    model.linear.weight.grad[0, 0] = bad  # type: ignore[index]
    _, applied = wrapped.apply(0.1, 1.0)
    assert not applied
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.linear.weight.grad is None


def test_loss_scale_is_undone_before_clipping() -> None:
    plain, scaled = net(), net()
    one, other = updater(plain), updater(scaled, loss_scale=LossScale(scale=1024.0, dynamic=True))
    backward(plain)
    backward(scaled, 1024.0)
    assert other.apply(0.1, 0.5)[0] == pytest.approx(one.apply(0.1, 0.5)[0], rel=1e-5)
    torch.testing.assert_close(plain.linear.weight, scaled.linear.weight)


def test_loss_scale_shrinks_on_overflow_and_grows_after_the_window() -> None:
    scale = LossScale(scale=8.0, scale_window=2, min_scale=1.0, dynamic=True)
    seen = []
    for finite in (False, True, True, True, False, False, False, False):
        scale.observe(finite)
        seen.append(scale.scale)
    assert seen == [4, 4, 8, 8, 4, 2, 1, 1]


def test_optimizer_state_round_trips_into_a_fresh_optimizer() -> None:
    first, second = net(), net()
    one = updater(first)
    for _ in range(2):
        backward(first)
        one.apply(0.1, 1.0)
    other = updater(second)
    second.load_state_dict(first.state_dict())
    tensors, numbers = one.optimizer_state()
    other.load_optimizer_state({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    for wrapped, model in ((one, first), (other, second)):
        backward(model)
        wrapped.apply(0.05, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
