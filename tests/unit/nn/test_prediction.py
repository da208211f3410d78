"""Prediction heads: against plain loops, as part of the decoder, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ava_exp.models.decoder as decoder_module
import ava_exp.nn.recompute as recomputation
from ava_exp.config.architecture import Architecture
from ava_exp.config.machine import Precision
from ava_exp.config.model import Activation, DenseConfig, ModelConfig, MoEConfig, Norm, SparsityConfig
from ava_exp.config.prediction import MultiTokenConfig, NextTokenConfig, PredictionConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import Recompute
from ava_exp.data.loader import IGNORED
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.arithmetic import (
    count_parameters,
    forward_flops_per_token,
    prediction_flops_per_token,
    training_flops,
    training_flops_per_token,
)
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.memory import estimate_memory
from ava_exp.nn.output import ModelOutput
from ava_exp.nn.prediction import PredictionHead

VOCABULARY, LENGTH = 60, 11
THREE = MultiTokenConfig(confidence_threshold_train=0.0)
MODELS: dict[str, tuple[dict[str, Any], SparsityConfig]] = {
    "dense": ({}, DenseConfig()),
    "untied": ({"tie_embeddings": False}, DenseConfig()),
    "gelu": ({"activation": Activation.gelu, "norm": Norm.layer, "bias": True}, DenseConfig()),
    "moe": ({}, MoEConfig(router=TopKRouterConfig(), num_experts=4)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def architecture(name: str = "dense", prediction: PredictionConfig = THREE, **changes: Any) -> Architecture:
    settings, sparsity = MODELS[name]
    values = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return Architecture(ModelConfig(**values | settings | changes), sparsity=sparsity, prediction=prediction)


def build(name: str = "dense", prediction: PredictionConfig = THREE, **kwargs: Any) -> Decoder:
    changes = {"initializer_range": 0.3} | kwargs.pop("changes", {})
    return build_model(architecture(name, prediction, **changes), **{"dtype": torch.float64} | kwargs)


def some_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def plain_head(head: PredictionHead, state: Tensor, embedding: Tensor) -> Tensor:
    """One head for one position, with SwiGLU and RMSNorm."""
    weights = {name: value.detach() for name, value in head.named_parameters()}
    joined = torch.cat([state, rms(embedding, weights["embedding_norm.weight"])])
    x = weights["projection.weight"] @ joined
    gate, value = (weights["feed_forward.up.weight"] @ rms(x, weights["feed_forward_norm.weight"])).chunk(2)
    x = x + weights["feed_forward.down.weight"] @ (gate * torch.sigmoid(gate) * value)
    return rms(x, weights["output_norm.weight"])


@pytest.mark.parametrize("width", [None, 40])
def test_the_chain_equals_plain_loops(width: int | None) -> None:
    model, ids = build(prediction=MultiTokenConfig(head_width=width)).eval(), some_ids()
    output = model(ids)
    states = output.future
    assert [state.shape for state in states] == [(2, LENGTH - j, 16) for j in (1, 2, 3)]
    for row in range(2):
        for t in range(LENGTH):
            state = output.hidden[row, t]
            for j in range(1, min(3, LENGTH - 1 - t) + 1):
                state = plain_head(model.prediction_heads[j - 1], state, model.embedding.weight[ids[row, t + j]])  # type: ignore[arg-type]
                torch.testing.assert_close(states[j - 1][row, t], state)


@every_model
def test_no_heads_are_no_prediction_of_several_tokens_bit_for_bit(name: str) -> None:
    none, plain = build(name, MultiTokenConfig(num_prediction_heads=0)), build(name, NextTokenConfig())
    assert none.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(none(some_ids()).logits, plain(some_ids()).logits)
    assert none(some_ids()).future == []
    sparsity = MODELS[name][1]
    terms = build_losses(sparsity, prediction=MultiTokenConfig(num_prediction_heads=0))
    assert [term.name for term in terms] == [term.name for term in build_losses(sparsity)]
    without, with_none = (
        architecture(name, prediction) for prediction in (NextTokenConfig(), MultiTokenConfig(num_prediction_heads=0))
    )
    assert count_parameters(without) == count_parameters(with_none)
    assert training_flops(without, 8) == training_flops(with_none, 8)
    sizes: dict[str, Any] = {"precision": Precision.fp32, "batch_size": 2, "sequence_length": 8}
    assert estimate_memory(without, **sizes) == estimate_memory(with_none, **sizes)


@every_model
def test_heads_leave_the_start_and_the_logits_of_the_rest_alone(name: str) -> None:
    with_heads, plain = build(name), build(name, NextTokenConfig())
    own = with_heads.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(with_heads(some_ids()).logits, plain(some_ids()).logits)


def test_the_heads_start_as_the_rest_does() -> None:
    model = build_model(architecture(hidden_size=128, num_layers=8), dtype=torch.float32)
    weights = dict(model.prediction_heads[1].named_parameters())
    assert weights["projection.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["feed_forward.down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert weights["output_norm.weight"].eq(1).all()
    first = model.prediction_heads[0].get_parameter("projection.weight")
    assert not torch.equal(first, weights["projection.weight"])


@every_model
def test_a_token_moves_only_the_states_that_have_read_it(name: str) -> None:
    model, ids, place = build(name).eval(), some_ids(), 6
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    for j, (before, after) in enumerate(zip(model(ids).future, model(changed).future, strict=True), start=1):
        # Experts add up products in an order that depends on which tokens share them.
        torch.testing.assert_close(before[:, : place - j], after[:, : place - j], rtol=1e-12, atol=1e-12)
        assert (before[:, place - j :] != after[:, place - j :]).any(dim=-1).all()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_may_be_shorter_than_the_chain(length: int) -> None:
    model, ids = build(), some_ids(2, length)
    output = model(ids)
    assert [state.shape[1] for state in output.future] == [max(0, length - j) for j in (1, 2, 3)]
    context = StepContext(num_tokens=2 * length)
    sum(term(output, ids, context) for term in build_losses(DenseConfig(), prediction=THREE)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradcheck_of_a_head() -> None:
    head = build().prediction_heads[0]
    state, embedding = (torch.randn(3, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(head, (state, embedding))


def mtp_gradients(model: Decoder, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    output, context = model(ids), StepContext(num_tokens=int((labels != IGNORED).sum()))
    terms = build_losses(DenseConfig(), prediction=THREE)
    terms[0](output, labels, context)
    terms[1](output, labels, context).backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["dense", "untied"])
def test_gradients_reach_trunk_and_embedding_through_the_chain(name: str) -> None:
    """Against autograd through whole logits, and the chain written down once more."""
    ids, model = some_ids(), build(name).train()
    labels = ids.roll(-1, dims=1)
    labels[0, 4] = IGNORED
    ours = mtp_gradients(model, ids, labels)
    model.zero_grad()
    output, losses = model(ids), []
    state, weight = output.hidden, model.embedding.weight if model.head is None else model.head.weight
    is_open = labels != IGNORED
    for j, head in enumerate(model.prediction_heads, start=1):
        state = head(state[:, : LENGTH - j], model.embedding(ids[:, j:]))
        is_open = is_open[:, : LENGTH - j] & (labels[:, j:] != IGNORED)
        target = labels[:, j:].masked_fill(~is_open, IGNORED)
        losses.append(F.cross_entropy((state @ weight.T).flatten(0, 1), target.flatten(), reduction="sum"))
    (sum(losses) / 3 / (2 * LENGTH - 1)).backward()
    wanted = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert ours.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(ours, wanted)
    assert all(value.any() for value in ours.values())


@every_model
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_gives_the_same_gradients_bit_for_bit(
    name: str, recompute: Recompute, dtype: torch.dtype
) -> None:
    found = []
    for setting in (Recompute.none, recompute):
        model = build(name, dtype=dtype).train()
        model.recompute = setting
        found.append(mtp_gradients(model, some_ids(), some_ids().roll(-1, dims=1)))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= len(dict(model.prediction_heads.named_parameters()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(value.isfinite().all() for value in found[1].values())


def test_offloading_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding: what comes back has other strides than the slices of the text that went."""
    monkeypatch.setattr(recomputation, "SMALLEST_OFFLOADED_BYTES", 1)
    found, own = [], recomputation.offload
    contexts: list[object] = []
    monkeypatch.setattr(decoder_module, "offload", lambda kept: contexts.append(kept) or own(kept))
    for offloads in (False, True):
        model = build().train()
        model.offload_activations = offloads
        found.append(mtp_gradients(model, some_ids(), some_ids().roll(-1, dims=1)))
    assert len(contexts) == 2, "the blocks and the chain"
    torch.testing.assert_close(found[0], found[1])


def test_bf16_stays_near_fp32() -> None:
    exact, rounded = (
        build(dtype=dtype, changes={"initializer_range": 0.1})(some_ids()) for dtype in (torch.float32, torch.bfloat16)
    )
    for wide, narrow in zip(exact.future, rounded.future, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - wide).norm() < 0.05 * wide.norm()


def test_heads_are_saved_and_loaded() -> None:
    saved, other = build(seed=1), build(seed=2)
    other.load_state_dict(saved.state_dict())
    for ours, theirs in zip(saved(some_ids()).future, other(some_ids()).future, strict=True):
        assert torch.equal(ours, theirs)


@every_model
@pytest.mark.parametrize("width", [None, 40])
def test_closed_form_parameters(name: str, width: int | None) -> None:
    prediction = MultiTokenConfig(num_prediction_heads=2, head_width=width)
    model = build(name, prediction, device="meta")
    breakdown = count_parameters(architecture(name, prediction))
    (part,) = (part for part in breakdown.parts if part.name == "prediction heads")
    assert part.total == sum(p.numel() for p in model.prediction_heads.parameters())
    assert breakdown.total == sum(p.numel() for p in model.parameters())
    plain = count_parameters(architecture(name, NextTokenConfig()))
    assert (breakdown.active, breakdown.multiplied) == (plain.active, plain.multiplied)


@pytest.mark.parametrize("name", ["dense", "gelu"])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_closed_form_flops(name: str, threshold: float) -> None:
    prediction = MultiTokenConfig(confidence_threshold_train=threshold)
    whole = architecture(name, prediction)
    output = build(name, prediction)(some_ids())
    with FlopCounterMode(display=False) as counter:
        for state in output.future:
            if threshold == 0:
                F.linear(state, output.head)
    assert counter.get_total_flops() == pytest.approx(prediction_flops_per_token(whole, LENGTH) * 2 * LENGTH)
    plain = architecture(name, NextTokenConfig())
    assert forward_flops_per_token(whole, LENGTH) == forward_flops_per_token(plain, LENGTH)
    more = training_flops_per_token(whole, LENGTH) - training_flops_per_token(plain, LENGTH)
    assert more == pytest.approx(3 * counter.get_total_flops() / 2 / LENGTH)
    assert training_flops(whole, LENGTH).per_token == training_flops_per_token(whole, LENGTH)


def test_the_losses_keep_their_gradients() -> None:
    """What waits for the backward pass, besides the logits of one slice."""
    sizes: dict[str, Any] = {"precision": Precision.fp32, "batch_size": 2, "sequence_length": LENGTH}
    both = (NextTokenConfig(), THREE)
    plain, with_heads = (estimate_memory(architecture(prediction=each), **sizes).logits for each in both)
    output, labels = build(dtype=torch.float32).train()(some_ids()), some_ids().roll(-1, dims=1)
    kept: dict[int, Tensor] = {}
    context = StepContext(num_tokens=2 * LENGTH)
    terms = build_losses(DenseConfig(), prediction=THREE)
    terms[0](output, labels, context)
    states = output.future
    output = ModelOutput(output.hidden, output.head, chain=lambda: states)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        terms[1](output, labels, context)
    found = sum(tensor.numel() for tensor in kept.values() if tensor.is_floating_point())
    assert (with_heads - plain) / 4 == pytest.approx(found, rel=0.06), "it counts whole sequences"


def kept_bytes(model: Decoder, ids: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass with its chain, and of the states that wait for the loss."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), model.cos, model.sin)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for state in model(ids).future:
            keep(state)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["dense", "gelu"])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_activations_are_what_autograd_keeps(name: str, recompute: Recompute) -> None:
    found = []
    for prediction in (NextTokenConfig(), MultiTokenConfig(head_width=96)):
        changes = {"hidden_size": 64, "max_position_embeddings": 128}
        model = build(name, prediction, changes=changes, dtype=torch.float32).train()
        model.recompute = recompute
        estimate = estimate_memory(
            architecture(name, prediction, **changes),
            precision=Precision.fp32,
            batch_size=4,
            sequence_length=128,
            recompute=recompute,
        )
        found.append((estimate.activations, kept_bytes(model, some_ids(4, 128))))
    estimated, kept = (with_heads - plain for plain, with_heads in zip(*found, strict=True))
    if recompute is Recompute.none:
        assert estimated == pytest.approx(kept, rel=0.05)
    else:  # what selective recomputation stores itself, and the head that is computed again, autograd does not see
        assert 0 < kept <= estimated
