"""Every kind of attention against loops over positions: outputs, gradients, causality, documents, and identities."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import ava_exp.nn.attention.band as band_module
from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.band import Band
from ava_exp.nn.attention.grouped import GroupedAttention
from ava_exp.nn.attention.mixture_of_heads import MixtureOfHeads
from tests.unit.nn import attention_reference as cases
from tests.unit.nn.attention_reference import BACKENDS, CASES, GROUPED, LEVELS, MIXTURE, build, context, reference, run


@pytest.fixture(autouse=True, params=["small chunks", "large chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small chunks, the short texts of these tests are cut into bands, too."""
    if request.param == "small chunks":
        monkeypatch.setattr(band_module, "SMALLEST_CHUNK", 2)


@pytest.mark.parametrize(
    ("backend", "num_kv_heads"),
    [(BACKENDS[0], 1), (BACKENDS[1], 4), (BACKENDS[2], 2), (BACKENDS[3], 1), (BACKENDS[0], 4)],
)
@pytest.mark.parametrize("case", CASES)
def test_it_equals_loops_over_positions(case: str, num_kv_heads: int, backend: AttentionBackend) -> None:
    layer, x = build(dataclasses.replace(CASES[case], backend=backend), num_kv_heads), cases.some_input()
    torch.testing.assert_close(run(layer, x), reference(layer, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_loops_at_any_length(case: str, length: int) -> None:
    layer, x = build(CASES[case]), cases.some_input(length=length)
    torch.testing.assert_close(run(layer, x), reference(layer, x), rtol=1e-9, atol=1e-10)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8 + [2] * 8, [0] * 12 + [1] + [2] * 8])


@pytest.mark.parametrize("backend", [AttentionBackend.plain, AttentionBackend.sdpa, AttentionBackend.flex])
@pytest.mark.parametrize("case", CASES)
def test_documents_equal_loops_over_positions(case: str, backend: AttentionBackend) -> None:
    layer, x = build(dataclasses.replace(CASES[case], backend=backend)), cases.some_input()
    with torch.no_grad():
        y = run(layer, x, context(21, documents=DOCUMENTS))
        torch.testing.assert_close(y, reference(layer, x, DOCUMENTS), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_what_they_are_alone(case: str) -> None:
    """Rotary positions are relative; blocks are not: documents begin where a block of the coarsest level does."""
    layer, x = build(CASES[case]), cases.some_input(length=24)
    documents = torch.tensor([[0] * 8 + [1] * 16] * 2)
    packed = run(layer, x, context(24, documents=documents))
    torch.testing.assert_close(packed[:, :8], run(layer, x[:, :8]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 8:], run(layer, x[:, 8:]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_changing_an_input_moves_nothing_before_it(case: str) -> None:
    layer, x = build(CASES[case]), cases.some_input()
    before = run(layer, x)
    for t in range(0, 21, 3):
        changed = x.clone()
        changed[:, t] += 1
        after = run(layer, changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).any()


@pytest.mark.parametrize("documents", [None, DOCUMENTS[:1, :11]], ids=["one", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, documents: Tensor | None) -> None:
    layer, x = build(CASES[case]), cases.some_input(batch=1, length=11).requires_grad_()
    parameters = [parameter.requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *_: run(layer, x, context(11, documents=documents)), (x, *parameters), fast_mode=True
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loops(case: str) -> None:
    layer, x = build(CASES[case]), cases.some_input()
    wanted = torch.randn(2, 21, cases.DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    of_layer, of_loops = (
        torch.autograd.grad((y * wanted).sum(), list(layer.parameters())) for y in (run(layer, x), reference(layer, x))
    )
    for ours, theirs in zip(of_layer, of_loops, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_bf16_stays_near(case: str) -> None:
    layer, x = build(CASES[case], dtype=torch.bfloat16), cases.some_input()
    y = run(layer, x.bfloat16())
    assert y.dtype is torch.bfloat16
    if not isinstance(layer, MixtureOfHeads):  # which chooses other heads where two are nearly equal
        of_rounded = run(build(CASES[case], dtype=torch.bfloat16).double(), x.bfloat16().double())
        assert (y.double() - of_rounded).norm() < 0.02 * of_rounded.norm()


def like(layer: GroupedAttention, other: GroupedAttention) -> GroupedAttention:
    layer.load_state_dict(other.state_dict(), strict=False)
    return layer


@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.sdpa])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_level_is_grouped_attention_bit_for_bit(backend: AttentionBackend, dtype: torch.dtype) -> None:
    grouped, x = build(GROUPED(backend=backend), dtype=dtype), cases.some_input(dtype=dtype)
    one = like(build(LEVELS(num_levels=1, backend=backend), dtype=dtype), grouped)
    assert torch.equal(run(one, x), run(grouped, x))
    assert {*one.state_dict()} == {*grouped.state_dict()}


@pytest.mark.parametrize("num_shared_heads", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.sdpa])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_heads_with_equal_weights_are_grouped_attention_bit_for_bit(
    num_shared_heads: int, backend: AttentionBackend, dtype: torch.dtype
) -> None:
    grouped, x = build(GROUPED(backend=backend), dtype=dtype), cases.some_input(dtype=dtype)
    config = MIXTURE(num_shared_heads=num_shared_heads, heads_per_token=4 - num_shared_heads, backend=backend)
    mixture = like(build(config, dtype=dtype), grouped)
    assert isinstance(mixture, MixtureOfHeads)
    torch.nn.init.zeros_(mixture.head_router.weight)
    assert torch.equal(run(mixture, x), run(grouped, x))


@pytest.mark.parametrize("window", [21, 22, 10**6])
def test_a_window_as_long_as_the_text_is_none_bit_for_bit(window: int) -> None:
    x = cases.some_input()
    assert torch.equal(run(build(GROUPED(sliding_window=window)), x), run(build(GROUPED()), x))


def test_gathered_heads_are_computed_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build(MIXTURE(num_shared_heads=2, heads_per_token=1)), cases.some_input(length=40)
    assert isinstance(layer, MixtureOfHeads)
    gathered: list[int] = []
    masked = layer.attend.masked
    monkeypatch.setattr(layer.attend, "masked", lambda q, *more: gathered.append(q.shape[2]) or masked(q, *more))
    _, chosen, _ = layer.route(x)
    y, busiest = run(layer, x), int(chosen.sum(dim=1).max())
    assert gathered == [busiest, 40] and busiest <= 30
    monkeypatch.setattr("ava_exp.nn.attention.mixture_of_heads.MOST_GATHERED", 0.0)
    gathered.clear()
    torch.testing.assert_close(run(layer, x), y)
    assert gathered == [40]


def test_a_band_is_made_where_it_saves_scores() -> None:
    band_module.SMALLEST_CHUNK, before = 32, band_module.SMALLEST_CHUNK
    try:
        assert Band.of(127, 32) is None
        assert Band.of(128, 32) is not None
        band = Band.of(1000, 128)
        assert band is not None and (band.chunk, band.num_before, band.num_chunks) == (64, 2, 16)
        assert Band.of(383, 128) is None and Band.of(384, 128) is not None
    finally:
        band_module.SMALLEST_CHUNK = before


def test_weights_of_heads_have_a_mean_of_one_over_all_of_a_kind() -> None:
    layer, x = build(MIXTURE(num_shared_heads=2, heads_per_token=1)), cases.some_input()
    assert isinstance(layer, MixtureOfHeads)
    layer.head_router.weight.data[-2:] = 0
    weights, chosen, routing = layer.route(x)
    torch.testing.assert_close(weights[..., :2].sum(dim=-1), torch.full((2, 21), 2.0, dtype=torch.float64))
    expected = (2 * routing.probabilities).where(chosen.flatten(0, 1), 0)
    torch.testing.assert_close(weights[..., 2:].flatten(0, 1), expected)
    assert torch.equal(weights[..., 2:] > 0, chosen)
    assert torch.equal(routing.counts, chosen.sum(dim=(0, 1))) and routing.num_tokens == 42
    assert routing.probabilities.shape == (42, 2)


def test_the_choice_of_a_single_head_is_learned() -> None:
    layer, x = build(MIXTURE(num_shared_heads=1, heads_per_token=1)), cases.some_input()
    assert isinstance(layer, MixtureOfHeads)
    (gradient,) = torch.autograd.grad(run(layer, x).square().sum(), layer.head_router.weight)
    assert (gradient[1:4].norm(dim=1) > 1e-3).all()


def test_padding_is_not_observed() -> None:
    layer, x = build(MIXTURE()), cases.some_input()
    assert isinstance(layer, MixtureOfHeads)
    _, chosen, routing = layer.route(x, torch.tensor([3, 0]))
    assert routing.num_tokens == 3 and torch.equal(routing.counts, chosen[0, :3].sum(dim=0))
