"""Which tokens a token may depend on: with every router and overflow, while training, at inference, and decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ava_exp.config.model import (
    DispatchBackend,
    Overflow,
)
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.routing import Routing
from tests.unit.nn.routing_cases import (
    CASES,
    NOT_CAUSAL_WHILE_TRAINING,
    NUM_EXPERTS,
    ROUTERS,
    build_decoder,
    build_layer,
    case_id,
    some_ids,
    some_input,
)

CAUSAL_CASES = [(name, overflow) for name, overflow in CASES if name not in NOT_CAUSAL_WHILE_TRAINING]


def visits_of(routing: Routing) -> Tensor:
    """Return (N, E): what a token's visits weigh."""
    weights = torch.zeros(routing.affinities.shape[0], NUM_EXPERTS + 1, dtype=routing.weights.dtype)
    return weights.scatter_add(1, routing.expert_ids % (NUM_EXPERTS + 1), routing.weights)[:, :NUM_EXPERTS]


def changed_after(x: Tensor, sequence: int, position: int) -> Tensor:
    changed = x.clone()
    changed[sequence, position:] = some_input(1, x.shape[1] - position, seed=77)[0] * 2
    return changed


def moved(layer: MoELayer, sequence: int, position: int) -> Tensor:
    """Return which tokens (B, T) a change of one sequence from a position on moves."""
    x = some_input(3, 10)
    before, first = layer(x)
    after, second = layer(changed_after(x, sequence, position))
    visits_moved = (visits_of(first) != visits_of(second)).any(dim=1).view(3, 10)
    return visits_moved | ((before - after).abs().amax(dim=-1) > 1e-10)


@pytest.mark.parametrize("position", [1, 5, 9])
@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize(("name", "overflow"), CAUSAL_CASES, ids=case_id)
def test_no_token_depends_on_a_later_one(name: str, overflow: Overflow | None, sequence: int, position: int) -> None:
    """Nor on one at the same position of a sequence that comes after its own."""
    tokens = moved(build_layer(name, overflow), sequence, position)
    assert not tokens[:, :position].any()
    assert not tokens[:sequence, position].any()
    assert tokens[sequence, position:].all() or overflow, "a token that is dropped both times does not move"


@pytest.mark.parametrize("overflow", list(Overflow), ids=case_id)
def test_a_capacity_makes_tokens_depend_on_earlier_ones_of_other_sequences(overflow: Overflow) -> None:
    """The named exception: experts fill up with the tokens of the whole micro-batch."""
    tokens = moved(build_layer("topk", overflow), sequence=0, position=1)
    assert tokens[1:, 1:].any()
    assert not moved(build_layer("topk"), sequence=0, position=1)[1:].any()


@pytest.mark.parametrize("name", sorted(NOT_CAUSAL_WHILE_TRAINING))
def test_what_balances_the_batch_sees_the_future_while_training_and_not_at_inference(name: str) -> None:
    layer = build_layer(name)
    assert moved(layer, sequence=1, position=5)[:, :5].any()
    tokens = moved(layer.eval(), sequence=1, position=5)
    assert not tokens[:, :5].any() and not tokens[[0, 2]].any()


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize("name", ROUTERS)
def test_decoding_step_by_step_equals_the_full_forward(name: str, dispatch: DispatchBackend) -> None:
    decoder, ids = build_decoder(name, dispatch=dispatch), some_ids()
    cache = decoder.new_cache(batch_size=2, capacity=ids.shape[1])
    steps = [decoder(ids[:, position : position + 1], cache).logits for position in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), decoder(ids).logits, rtol=1e-5, atol=1e-5)


def test_decoding_with_a_capacity_is_an_exception() -> None:
    """Asked for a capacity at evaluation, a token by itself has another one than as part of a text."""
    decoder, ids = build_decoder("topk", Overflow.drop), some_ids()
    for layer in decoder.moe_layers():
        assert layer.capacity is not None
        layer.capacity.at_evaluation = True
    cache = decoder.new_cache(batch_size=2, capacity=ids.shape[1])
    steps = [decoder(ids[:, position : position + 1], cache).logits for position in range(ids.shape[1])]
    assert not torch.allclose(torch.cat(steps, dim=1), decoder(ids).logits, rtol=1e-3, atol=1e-3)
