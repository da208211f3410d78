"""Packed weights compute what the weights do, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ava_exp.config.model import Activation, DispatchBackend, SharedProjection
from ava_exp.nn.activation import draw_activation
from ava_exp.nn.moe.experts import Experts
from ava_exp.nn.packed import PackedProduct, can_be_packed, packed
from tests.unit.nn.test_experts import DIM, NUM_EXPERTS, ROUTINGS, VARIANTS, build, route, some

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1,), (3, 1), (16, 4), (2, 300), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_weight(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(40, 24, bias=bias).to(dtype)
    x = some(*rows, 40).to(dtype)
    with torch.inference_mode():
        expected = linear(x)
        with packed(linear) as is_packed:
            assert is_packed and isinstance(linear.forward, PackedProduct)
            y = linear(x)
    assert y.shape == expected.shape and y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_slice_of_a_position_is_multiplied_as_it_is() -> None:
    linear, x = nn.Linear(40, 24), some(3, 5, 40)
    with torch.inference_mode(), packed(linear):
        torch.testing.assert_close(linear(x[:, -1]), x[:, -1] @ linear.weight.t() + linear.bias)


def test_nothing_is_left_of_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail() -> None:
        with packed(model), packed(model):  # a stream may be open while another text is written
            assert model.state_dict().keys() == before.keys()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all("forward" not in module.__dict__ for module in model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    experts = build(DispatchBackend.auto)
    with packed(experts):
        assert experts._packed is not None
    assert experts._packed is None


def test_gradients_are_those_of_the_weight() -> None:
    linear, x = nn.Linear(40, 24), some(3, 40)
    with packed(linear):
        linear(x).sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, x.sum(dim=0).expand(24, -1))


def test_what_cannot_be_packed_computes_as_ever() -> None:
    linear = nn.Linear(4, 4).double()
    x = some(3, 4).double()
    expected = linear(x)
    with packed(linear) as is_packed:
        assert not is_packed and torch.equal(linear(x), expected)
    assert not can_be_packed(nn.Linear(4, 4, device="meta"))
    assert not can_be_packed(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half()))
    compiled = nn.Linear(4, 4)
    compiled.compile()
    assert not can_be_packed(compiled)
    with packed(nn.Linear(4, 4), wanted=False) as is_packed:
        assert not is_packed


def reference(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.no_grad():
        return experts._one_by_one(x, ids, weights, draw_activation(experts.activation, experts.mixture))


@pytest.mark.parametrize(("activation", "share", "norm"), VARIANTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_are_those_of_the_loop(
    routing: str, activation: Activation, share: SharedProjection, norm: bool
) -> None:
    experts = build(DispatchBackend.auto, activation, share, norm).eval()
    ids, weights, ragged = route(routing)
    x = some(ids.shape[0], DIM)
    for rows in (slice(None), slice(0, 1), slice(3, 4), slice(5, 8)):
        with torch.inference_mode(), packed(experts):
            y = experts(x[rows], ids[rows], weights[rows], ragged)
        torch.testing.assert_close(y, reference(experts, x[rows], ids[rows], weights[rows]), rtol=1e-4, atol=1e-4)


def test_experts_in_bf16() -> None:
    experts = build(DispatchBackend.auto).eval().bfloat16()
    ids, weights, _ = route("two")
    x = some(ids.shape[0], DIM).bfloat16()
    for rows in (slice(None), slice(0, 1)):
        with torch.inference_mode(), packed(experts):
            y = experts(x[rows], ids[rows], weights[rows])
        expected = reference(experts.float(), x[rows].float(), ids[rows], weights[rows])
        experts.bfloat16()
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=0.3)


def test_closed_experts_are_not_packed() -> None:
    experts = build(DispatchBackend.auto, num_experts=NUM_EXPERTS + 2).eval()
    experts.num_experts, experts.num_closed = NUM_EXPERTS, 2
    ids, weights, _ = route("two")
    x = some(ids.shape[0], DIM)
    with torch.inference_mode(), packed(experts):
        assert experts._packed is not None and len(experts._packed[0]) == NUM_EXPERTS
        y = experts(x, ids, weights)
    torch.testing.assert_close(y, reference(experts, x, ids, weights), rtol=1e-4, atol=1e-4)
