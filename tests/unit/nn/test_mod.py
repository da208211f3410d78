"""Tokens skip layers: what is computed, against plain loops; identities; gradients; what is kept and restored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ava_exp.config.mod import DepthLayers, DepthPart, LearnedModConfig, StaticModConfig, num_chosen
from ava_exp.config.training import Recompute
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.nn.mod.fixed import RandomDepth, StaticDepth
from ava_exp.nn.mod.learned import inverse_root_mean_square
from tests.unit.nn.mod_cases import (
    CASES,
    MODS,
    Case,
    architecture_of,
    build,
    build_without,
    mod_of,
    reference,
    some_ids,
    stirred,
)

BLOCK, ALL = DepthPart.block, DepthLayers.all
SIMPLE: list[Case] = [(mod, part, "topk", ALL) for mod in MODS for part in DepthPart]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_plain_loops(case: Case) -> None:
    model, ids = build(case).train(), some_ids(2, 9)
    output = model(ids)
    wanted = reference(model, ids, output)
    torch.testing.assert_close(output.logits, wanted, rtol=1e-6, atol=1e-6)
    skipped = [depth.usage for depth in output.depths]
    assert len(skipped) == len(mod_of(case).skippable_layers(4)) and all(0 < usage < 1 for usage in skipped)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] != "capacity"], ids=str)
def test_inference_equals_plain_loops(case: Case) -> None:
    model, ids = build(case).eval(), some_ids(3, 12)
    output = model(ids)
    torch.testing.assert_close(output.logits, reference(model, ids, output), rtol=1e-6, atol=1e-6)


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_gradients_equal_those_of_plain_loops(case: Case) -> None:
    model, ids = build(case).train(), some_ids(2, 7)
    weights = torch.randn(2, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = model(ids)
    ours = gradients(model, (output.logits * weights).sum())
    wanted = gradients(model, (reference(model, ids, output) * weights).sum())
    assert ours.keys() >= wanted.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted.get(name, torch.zeros_like(gradient)), rtol=1e-5, atol=1e-7)
    if "learned" in case[0]:
        assert all(ours[f"blocks.{n}.mod.router.score.weight"].any() for n in mod_of(case).skippable_layers(4))


@pytest.mark.parametrize("case", SIMPLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_capacity_of_1_and_logits_of_0_are_the_model_without_it_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    model, plain, ids = build(case, dtype, capacity_factor=1.0), build_without(case, dtype), some_ids()
    for name, parameter in model.named_parameters():
        if ".mod." in name:
            parameter.data.fill_(1e4 if name.endswith("predictor.score.bias") else 0.0)
    for mode in (True, False):
        ours, theirs = model.train(mode)(ids), plain.train(mode)(ids)
        assert torch.equal(ours.logits, theirs.logits)
        one, other = (gradients(m, out.logits.float().square().sum()) for m, out in ((model, ours), (plain, theirs)))
        for name, gradient in other.items():
            if dtype is torch.float64:
                torch.testing.assert_close(one[name], gradient, rtol=1e-9, atol=1e-9)
            elif dtype is torch.float32:
                torch.testing.assert_close(one[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_a_capacity_that_falls_from_1_changes_the_model_little_by_little() -> None:
    """A token less changes other tokens only through what they see of it: with gates near 1 there is no jump."""
    case: Case = ("learned", BLOCK, "dense", ALL)
    model, ids = build_model(architecture_of(case, capacity_factor=1.0), dtype=torch.float64).train(), some_ids(4, 40)
    with torch.no_grad():
        whole = model(ids).hidden
        distances = []
        for capacity in (0.95, 0.7, 0.3):
            model.mod_capacity = capacity
            distances.append((model(ids).hidden - whole).norm().item())
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[2]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_as_many_tokens_of_every_sequence_as_the_capacity_says(case: Case) -> None:
    model, mod = build(case).train(), mod_of(case)
    for length in (1, 5, 20):
        for place, depth in enumerate(model(some_ids(3, length)).depths):
            number = mod.num_processed(length, place)  # type: ignore[attr-defined]
            rows = torch.div(depth.token_ids, length, rounding_mode="floor")
            assert torch.bincount(rows, minlength=3).tolist() == [number] * 3
            assert depth.num_tokens == 3 * length and depth.token_ids.unique().numel() == 3 * number
            assert depth.num_pairs == (3 * number * (number + 1) // 2 if case[1] is BLOCK else 0)


def test_the_number_of_tokens_is_rounded_up_and_never_0() -> None:
    assert [num_chosen(c, 100) for c in (0.07, 0.071, 1.0, 1e-6)] == [7, 8, 100, 1]


def test_a_static_pattern_has_its_share_of_any_text_and_moves_from_layer_to_layer() -> None:
    for capacity in (0.5, 0.25, 0.3, 1.0):
        config = StaticModConfig(capacity_factor=capacity)
        masks = [StaticDepth(capacity, 8, place).chosen(torch.arange(200)) for place in range(4)]
        for place, mask in enumerate(masks):
            assert int(mask[:60].sum()) == config.num_processed(60, place)
            assert all(abs(int(mask[s : s + 40].sum()) - 40 * capacity) < 1 + 1e-3 for s in range(150))
        assert capacity == 1.0 or not torch.equal(masks[0], masks[1])
    assert sum(StaticDepth(0.25, 8, place).chosen(torch.arange(200)) for place in range(4)).eq(1).all()  # type: ignore[attr-defined]


def test_random_layers_draw_anew_while_training_and_never_at_inference() -> None:
    case: Case = ("random", BLOCK, "dense", ALL)
    model, ids = build(case), some_ids()
    torch.manual_seed(3)
    first, second = (model.train()(ids).depths[0].token_ids for _ in range(2))
    torch.manual_seed(3)
    again = model(ids).depths[0].token_ids
    assert torch.equal(first, again) and not torch.equal(first, second)
    one, other = (model.eval()(ids).depths for _ in range(2))
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True))
    shares = [RandomDepth(0.3, 8, place).chosen(torch.arange(20_000)).float().mean().item() for place in range(4)]
    assert shares == pytest.approx([0.3] * 4, abs=0.02)


def test_the_predictor_learns_from_its_own_loss_which_teaches_nothing_else() -> None:
    case: Case = ("learned_network", BLOCK, "topk", ALL)
    model, ids = build(case).train(), some_ids()
    output = model(ids)
    (term,) = (term for term in build_losses(architecture_of(case).sparsity, mod=mod_of(case)) if "mod" in term.name)
    assert term.weight_at(0.5) == LearnedModConfig().predictor_weight
    labels = ids.clone()
    labels[0, :5] = -100
    loss = term(output, labels, StepContext(num_tokens=100))
    by_hand = []
    for layer, depth in enumerate(output.depths):
        chosen = torch.zeros(60, dtype=torch.float64)
        chosen[depth.token_ids] = 1
        by_hand.append(depth.losses["mod_predictor_loss"].item())
        assert 0 <= int(depth.num_predicted) <= 60, layer  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(sum(by_hand) / 4 * 55 / 100)
    reached = {name for name, gradient in gradients(model, loss).items() if gradient.any()}
    assert reached == {name for name, _ in model.named_parameters() if ".mod.predictor." in name}
    trunk = gradients(model, model(ids).logits.square().sum())
    assert not {name for name in trunk if "predictor" in name}


def test_the_predictor_s_loss_is_the_cross_entropy_of_what_was_chosen() -> None:
    case: Case = ("learned", BLOCK, "dense", ALL)
    model, ids = build(case).train(), some_ids()
    depth, router = model(ids).depths[0], model.mod_layers()[0]
    x = model.embedding(ids)
    p = router.predictor(x, inverse_root_mean_square(x)).sigmoid().flatten()  # type: ignore[operator]
    wanted = sum(
        -math.log(q if place in depth.token_ids.tolist() else 1 - q) for place, q in enumerate(p.tolist())
    ) / len(p)
    assert depth.losses["mod_predictor_loss"].item() == pytest.approx(wanted)
    hits = sum((q > 0.5) == (place in depth.token_ids.tolist()) for place, q in enumerate(p.tolist()))
    assert int(depth.num_predicted) == hits  # type: ignore[arg-type]


def one_pass(case: Case, **settings: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    architecture = architecture_of(case)
    architecture.model.dropout = 0.2
    model = stirred(build_model(architecture)).train()
    for name, value in settings.items():
        setattr(model, name, value)
    torch.manual_seed(5)
    ids = some_ids(2, 16)
    output = model(ids)
    context = StepContext(num_tokens=32, chosen_counts=[routing.chosen_counts for routing in output.routings])
    terms = build_losses(architecture.sparsity, mod=architecture.mod)
    loss = torch.stack([term(output, ids, context) for term in terms]).sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, found, [depth.token_ids for depth in output.depths]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_chooses_the_same_tokens(case: Case, recompute: Recompute) -> None:
    loss, wanted, chosen = one_pass(case)
    again, found, chosen_again = one_pass(case, recompute=recompute)
    assert torch.equal(loss, again) and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(torch.equal(a, b) for a, b in zip(chosen, chosen_again, strict=True))


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_a_saved_model_is_the_same_model(case: Case) -> None:
    model, ids = build(case).eval(), some_ids()
    other = build_model(architecture_of(case), seed=9, dtype=torch.float64).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_bf16_computes_nearly_the_same(case: Case) -> None:
    """Where rounding moves no token across a threshold; where it does, what matters is that all goes on."""
    ids = some_ids()
    exact, rounded = (build_model(architecture_of(case), dtype=d).train() for d in (torch.float32, torch.bfloat16))
    torch.manual_seed(1)
    wanted = exact(ids).logits
    torch.manual_seed(1)
    found = rounded(ids)
    assert found.logits.dtype is torch.bfloat16
    found.logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in rounded.parameters() if p.grad is not None)
    if "learned" not in case[0]:
        assert (found.logits.float() - wanted).norm() < 0.05 * wanted.norm()
    assert rounded.eval()(ids).logits.isfinite().all()


def test_adding_it_leaves_every_other_weight_as_it_was() -> None:
    case: Case = ("learned", BLOCK, "topk", ALL)
    ours, theirs = build(case), build_without(case)
    own, plain = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {name.split(".mod.")[0] + ".mod." for name in own.keys() - plain.keys()} == {
        f"blocks.{n}.mod." for n in range(4)
    }
    assert all(torch.equal(own[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize("part", list(DepthPart))
def test_documents_of_a_text_stay_apart(part: DepthPart) -> None:
    case: Case = ("static", part, "dense", ALL)
    model, ids = build(case).train(), some_ids(2, 16)
    documents = (torch.arange(16) >= 7).long().expand(2, -1)
    other = ids.clone()
    other[:, :7] = other[:, :7].flip(1)
    one, two = (model(text, documents_BT=documents).logits for text in (ids, other))
    assert torch.equal(one[:, 7:], two[:, 7:]) and not torch.equal(one[:, :7], two[:, :7])
    together = (model(text).logits for text in (ids, other))
    assert not torch.equal(*(logits[:, 7:] for logits in together))
