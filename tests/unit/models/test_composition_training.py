"""Every attention with every kind of experts and of depth: gradients, recomputation, saving and loading."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.folders import option_names
from ava_exp.config.mod import LearnedModConfig
from ava_exp.config.model import ModelConfig
from ava_exp.config.training import Recompute
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.decoder import Decoder, build_model
from tests.unit.models.test_compositions import VOCABULARY, composed
from tests.unit.nn.routing_cases import teach

SPARSITIES = {
    "dense": ["sparsity=dense"],
    **{router: ["sparsity=moe", f"router={router}"] for router in ("topk", "deepseek", "sinkhorn", "expert_choice")},
    "ava_moe": ["sparsity=ava_moe"],
}
GRID = list(itertools.product(option_names("attention"), SPARSITIES, option_names("mod")))
SCHEMES = (Recompute.none, Recompute.selective, Recompute.full)


def architecture_of(attention: str, sparsity: str, mod: str) -> Architecture:
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return Architecture(
        model,
        composed(f"attention={attention}").attention,
        composed(*SPARSITIES[sparsity]).sparsity,
        composed(f"mod={mod}").mod,
        composed("prediction=multi_token").prediction,
    )


def build(architecture: Architecture, dtype: torch.dtype = torch.float64) -> Decoder:
    model = build_model(architecture, seed=1, dtype=dtype).train()
    for layer in model.moe_layers():
        teach(layer.router)
    return model


def some_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def objective(model: Decoder, architecture: Architecture) -> Tensor:
    """The weighted sum of all terms, with the same random numbers at every call."""
    ids = some_ids()
    torch.manual_seed(7)
    output = model(ids[:, :-1])
    context = StepContext(num_tokens=ids[:, 1:].numel(), input_ids=ids[:, :-1])
    context.chosen_counts = [routing.chosen_counts for routing in output.routings]
    terms = build_losses(
        architecture.sparsity,
        attention=architecture.attention,
        mod=architecture.mod,
        prediction=architecture.prediction,
    )
    return torch.stack([term.weight_at(0.5) * term(output, ids[:, 1:], context) for term in terms]).sum()


def gradients(model: Decoder, architecture: Architecture) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    objective(model, architecture).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def without_gradient(architecture: Architecture, model: Decoder) -> Iterator[str]:
    """Yield the parameters that this batch need not reach: experts that no token chose."""
    yield from (name for name, _ in model.named_parameters() if ".experts." in name or "residual" in name)


@pytest.mark.parametrize(("attention", "sparsity", "mod"), GRID)
def test_every_parameter_learns_and_recomputing_changes_nothing(attention: str, sparsity: str, mod: str) -> None:
    architecture = architecture_of(attention, sparsity, mod)
    model = build(architecture)
    exempt = set(without_gradient(architecture, model))
    expected: dict[str, Tensor | None] = {}
    for scheme in SCHEMES:
        model.recompute = scheme
        found = gradients(model, architecture)
        for name, gradient in found.items():
            assert gradient is not None, f"{name} has no gradient"
            assert gradient.isfinite().all(), name
            assert name in exempt or gradient.any(), f"{name} does not learn"
            if scheme is not Recompute.none:
                torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)
        expected = expected or found


@pytest.mark.parametrize(("attention", "sparsity", "mod"), GRID)
def test_weights_are_saved_and_loaded(attention: str, sparsity: str, mod: str) -> None:
    architecture, ids = architecture_of(attention, sparsity, mod), some_ids()
    model, other = build(architecture).eval(), build_model(architecture, seed=2, dtype=torch.float64).eval()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, other(ids).logits)
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(("attention", "sparsity", "mod"), GRID)
def test_bf16_is_near_fp32(attention: str, sparsity: str, mod: str) -> None:
    """The same weights, rounded: what differs is the arithmetic, and where that changes a choice, the token's path."""
    architecture = architecture_of(attention, sparsity, mod)
    rounded = build(architecture, torch.bfloat16)
    exact = build(architecture, torch.float32)
    exact.load_state_dict(rounded.state_dict())
    loss, reference = objective(rounded, architecture), objective(exact, architecture)
    assert loss.dtype == torch.float32
    tolerance = 0.2 if isinstance(architecture.mod, LearnedModConfig) else 0.1
    assert loss.item() == pytest.approx(reference.item(), rel=tolerance)
