"""Decoders with every kind of attention: causality, decoding, closed forms, recomputation, training, files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import (
    AttentionBackend,
    GroupedAttentionConfig,
    MixtureOfHeadsConfig,
    MultiLevelAttentionConfig,
)
from ava_exp.config.compose import compose
from ava_exp.config.model import DenseConfig, DispatchBackend, ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import Recompute
from ava_exp.data.loader import Batch, number_documents
from ava_exp.evaluation.language import evaluate_language
from ava_exp.losses.balance import load_balancing_loss
from ava_exp.losses.terms import CrossEntropy, HeadBalanceLoss, StepContext, build_losses
from ava_exp.models.arithmetic import count_parameters, forward_flops_per_token
from ava_exp.models.attention import attention_parameters, kept_attention_bytes, scores_per_token
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.surgery import measure
from ava_exp.nn.output import ModelOutput
from ava_exp.optim.update import Updater
from ava_exp.training.step import train_step

GROUPED, LEVELS, MIXTURE = GroupedAttentionConfig, MultiLevelAttentionConfig, MixtureOfHeadsConfig
KINDS = {
    "window": GROUPED(sliding_window=6, attention_dropout=0.1),
    "levels": LEVELS(qk_norm=True, attention_dropout=0.1),
    "levels with windows": LEVELS(sliding_window=8, progressive_sparsity=0.5),
    "one level": LEVELS(num_levels=1),
    "heads": MIXTURE(num_shared_heads=1, heads_per_token=1, attention_dropout=0.1),
    "heads without shared ones": MIXTURE(num_shared_heads=0, heads_per_token=2),
}
SPARSITIES = {
    "dense": DenseConfig(),
    "moe": MoEConfig(router=TopKRouterConfig(), num_experts=4, dispatch=DispatchBackend.loop),
}
EACH = pytest.mark.parametrize(("kind", "sparsity"), [(kind, sparsity) for kind in KINDS for sparsity in SPARSITIES])


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**sizes | {"intermediate_size": 40, "max_position_embeddings": 64, "bias": True} | changes)


def architecture(kind: str, sparsity: str = "dense", **changes: Any) -> Architecture:
    return Architecture(
        config(bias=sparsity == "dense"), dataclasses.replace(KINDS[kind], **changes), SPARSITIES[sparsity]
    )


def build(kind: str, sparsity: str = "dense", **changes: Any) -> Decoder:
    model = build_model(architecture(kind, sparsity), **changes)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not parameter.is_meta:
            scale = 20 if name.endswith(("fusion.weight", "head_router.weight")) else 4
            parameter.data *= scale  # so that what is fused, chosen and read differs
    return model.eval()


def some_ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


@EACH
def test_changing_a_token_moves_no_earlier_logit(kind: str, sparsity: str) -> None:
    model, ids = build(kind, sparsity), some_ids()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 96
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-5, atol=1e-5)
    assert (before[:, 12] != after[:, 12]).any(dim=-1).all()


@EACH
def test_decoding_with_a_cache_equals_the_full_forward(kind: str, sparsity: str) -> None:
    model, ids = build(kind, sparsity), some_ids()
    cache = model.new_cache(batch_size=2, capacity=20)
    parts = [model(ids[:, start:stop], cache).logits for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20))]
    whole = model(ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    cache.truncate(9)
    torch.testing.assert_close(model(ids[:, 9:], cache).logits, whole[:, 9:], rtol=1e-4, atol=1e-4)


@EACH
def test_padded_prompts_and_what_follows(kind: str, sparsity: str) -> None:
    model, ids, counts = build(kind, sparsity), some_ids(3), torch.tensor([9, 2, 5])
    cache = model.new_cache(batch_size=3, capacity=20)
    model(ids[:, :9], cache, counts_B=counts)
    next_ids = ids.gather(1, counts[:, None])
    logits = model(next_ids, cache).logits[:, 0]
    whole = model(ids).logits
    torch.testing.assert_close(logits, whole[torch.arange(3), counts], rtol=1e-4, atol=1e-4)


@EACH
def test_closed_form_parameters(kind: str, sparsity: str) -> None:
    model = build(kind, sparsity, device="meta")
    assert count_parameters(architecture(kind, sparsity)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 16])
def test_closed_form_flops(kind: str, length: int) -> None:
    """Scores are counted as attention is defined; torch's counter sees those of squares, which are masked."""
    of = architecture(kind, backend=AttentionBackend.plain)
    model = build_model(of).eval()
    with FlopCounterMode(display=False) as counter:
        logits = model(some_ids(2, length)).logits
    assert logits.shape == (2, length, 96)
    levels = of.attention.num_levels if isinstance(of.attention, LEVELS) else 1
    squares = sum((length // 2**level) ** 2 for level in range(levels)) * 4 / length
    assert of.model.head_dim is not None
    beyond = 4 * 3 * of.model.head_dim * (squares - scores_per_token(of.model, of.attention, length))
    expected = forward_flops_per_token(of, length) + beyond
    if isinstance(of.attention, MIXTURE) and length > 1:
        assert counter.get_total_flops() < expected * 2 * length, "heads that are not chosen are left out"
    else:
        assert counter.get_total_flops() == pytest.approx(expected * 2 * length, abs=1)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (GROUPED(sliding_window=3), [min(t + 1, 3) for t in range(13)]),
        (LEVELS(num_levels=3), [t + 1 for t in range(13)] + [j + 1 for j in range(6)] + [j + 1 for j in range(3)]),
        (
            LEVELS(num_levels=2, sliding_window=4, progressive_sparsity=0.5),
            [min(t + 1, 4) for t in range(13)] + [min(j + 1, 2) for j in range(6)],
        ),
    ],
)
def test_scores_are_counted_one_by_one(attention: GroupedAttentionConfig, expected: list[int]) -> None:
    assert scores_per_token(config(), attention, 13) == pytest.approx(4 * sum(expected) / 13)


def test_three_levels_cost_21_sixteenths_of_the_scores_and_chosen_heads_their_share() -> None:
    model = config()
    plain = scores_per_token(model, GROUPED(), 2**16)
    assert scores_per_token(model, LEVELS(), 2**16) / plain == pytest.approx(21 / 16, rel=1e-4)
    assert scores_per_token(model, MIXTURE(num_shared_heads=1, heads_per_token=2), 2**16) / plain == 3 / 4


@EACH
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_changes_no_gradient(kind: str, sparsity: str, recompute: Recompute) -> None:
    def gradients(setting: Recompute) -> tuple[list[Tensor], ModelOutput]:
        model = build(kind, sparsity).train()
        model.recompute = setting
        torch.manual_seed(3)
        output = model(some_ids())
        (output.logits.square().mean() + sum(h.probabilities.square().mean() for h in output.head_routings)).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], output

    (before, plain), (after, recomputed) = gradients(Recompute.none), gradients(recompute)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert len(plain.head_routings) == len(recomputed.head_routings) == (3 if "heads" in kind else 0)


@EACH
def test_a_step_trains_every_parameter(kind: str, sparsity: str) -> None:
    model = build(kind, sparsity).train()
    updater = Updater(
        model,
        lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        weight_decay=0.0,
        master_weights=False,
        wide_states=False,
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = some_ids(4, 33)
    batches = [
        Batch(
            input_ids=part[:, :-1],
            labels=part[:, 1:].contiguous(),
            sample_ids=np.zeros(2, dtype=np.int64),
            documents=number_documents(part[:, :-1], 5),
        )
        for part in ids.split(2)
    ]
    terms = build_losses(SPARSITIES[sparsity], attention=KINDS[kind])
    metrics = train_step(
        model,
        updater,
        batches,
        terms,
        learning_rate=1e-2,
        max_norm=1.0,
        device=torch.device("cpu"),
        backward=Tensor.backward,
    )
    assert metrics.applied and np.isfinite(metrics.grad_norm)
    assert ("head_balance_loss" in metrics.losses) == ("heads" in kind)
    of_tokens = KINDS[kind].heads_per_token if "heads" in kind else 0  # type: ignore[attr-defined]
    assert [int(counts.sum()) for counts in metrics.head_counts] == [128 * of_tokens] * (3 if of_tokens else 0)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in still if "experts" not in name] == []


def test_the_balance_loss_of_heads_is_the_mean_over_layers_and_1_when_even() -> None:
    model, ids = build("heads"), some_ids()
    output = model(ids)
    term = HeadBalanceLoss(0.01)
    value = term(output, ids, StepContext(num_tokens=80))
    losses = [load_balancing_loss(heads.probabilities, heads.counts) for heads in output.head_routings]
    torch.testing.assert_close(value, torch.stack(losses).mean() / 2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.head_router.weight)
    assert term(model(ids), ids, StepContext(num_tokens=40)).item() == pytest.approx(1)
    assert term.weight_at(0.5) == 0.01
    assert [term.name for term in build_losses(DenseConfig(), attention=MIXTURE())] == ["loss", "head_balance_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_logits_that_they_have_alone(kind: str) -> None:
    model, ids = build(kind), some_ids(length=24)
    documents = torch.tensor([[0] * 8 + [1] * 16] * 2)
    packed = model(ids, documents_BT=documents).logits
    torch.testing.assert_close(packed[:, :8], model(ids[:, :8]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed[:, 8:], model(ids).logits[:, 8:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["multi_level", "mixture_of_heads"])
def test_experiments_cost_what_their_dense_partner_costs(name: str) -> None:
    flops = []
    for experiment in (f"equal_flops_{name}", "equal_flops_dense"):
        run = compose(["~local", f"experiment={experiment}"])
        flops.append(forward_flops_per_token(run.architecture, run.data.sequence_length))
    assert flops[0] == pytest.approx(flops[1], rel=0.01)


def test_the_table_of_costs_is_true() -> None:
    """Every row of the documentation's table, from the closed forms and a cache."""
    page = (Path(__file__).parents[3] / "docs" / "attention.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`attention[^|`]+` ?)+) \| (\d\.\d{3} .*) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for options, figures in rows:
        run = compose(["~local", *re.findall(r"`([^`]+)`", options)])
        plain = [scores_per_token(run.model, GROUPED(), length) for length in (256, 1024, 4096)]
        ours = [scores_per_token(run.model, run.attention, length) for length in (256, 1024, 4096)]
        cache = build_model(run.architecture, dtype=torch.bfloat16).new_cache(1, 64)
        for layer in cache.layers:
            heads = [buffer.shape[1] for buffer in layer.buffers]
            layer.extend(*(torch.zeros(1, num, 64, 64) for num in heads))
        kept = kept_attention_bytes(run.model, run.attention, 2, 256, on_cpu=True) / 1024
        expected = [f"{share / whole:.3f}" for share, whole in zip(ours, plain, strict=True)]
        expected += [f"{attention_parameters(run.model, run.attention)[0]:,}", f"{kept:.2f}"]
        assert figures.split(" | ") == [*expected, str(cache.num_bytes // 64 // run.model.num_layers)]


def test_documents_are_numbered_by_the_tokens_that_end_them() -> None:
    ids = torch.tensor([[5, 7, 0, 3, 0, 0, 9], [1, 2, 3, 4, 5, 6, 0]])
    assert number_documents(ids, 0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model, ids = build(kind), some_ids()
    torch.save(model.state_dict(), tmp_path / "weights")
    other = build_model(architecture(kind), seed=9).eval()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(kind: str) -> None:
    ids, of = some_ids(), architecture(kind)
    exact, rounded = build_model(of).eval()(ids).logits, build_model(of, dtype=torch.bfloat16).eval()(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_leave_the_start_of_everything_else_as_it_was(kind: str) -> None:
    one, other = build_model(architecture(kind)), build_model(Architecture(config(), GROUPED(qk_norm=True)))
    theirs = dict(other.named_parameters())
    common = [name for name, _ in one.named_parameters() if name in theirs]
    assert len(common) > 20 and all(torch.equal(one.get_parameter(name), theirs[name]) for name in common)


def test_documents_of_a_batch_reach_the_model_wherever_one_is_read() -> None:
    model, ids = build("levels with windows", "moe"), some_ids(2, 25)
    documents = number_documents(ids[:, :-1], int(ids[0, 7]))
    labels = ids[:, 1:].contiguous()
    parts = {"input_ids": ids[:, :-1], "labels": labels, "sample_ids": np.zeros(2, dtype=np.int64)}
    losses = []
    for known in (None, documents):
        batch = Batch(**parts, documents=known)  # type: ignore[arg-type]
        logits = model(batch.input_ids, documents_BT=known).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
        evaluated = evaluate_language(model, [batch], np.ones(96, dtype=np.int64), torch.device("cpu"))
        probed, _ = measure(model, [batch], torch.device("cpu"))
        updater = Updater(
            model,
            lambda groups: torch.optim.AdamW(groups, lr=0.0),
            weight_decay=0.0,
            master_weights=False,
            wide_states=False,
        )
        model.train()
        step = train_step(
            model,
            updater,
            [batch],
            [CrossEntropy()],
            learning_rate=0.0,
            max_norm=1.0,
            device=torch.device("cpu"),
            backward=Tensor.backward,
        )
        model.eval()
        losses.append(evaluated.loss)
        assert evaluated.loss == pytest.approx(expected, rel=1e-5)
        assert probed == pytest.approx(expected, rel=1e-5)
        assert step.losses["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
