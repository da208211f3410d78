"""What a router is besides its formula: saved and loaded, in 16 bits, recomputed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils.checkpoint import checkpoint

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import Activation, Overflow
from ava_exp.models.decoder import build_model
from ava_exp.training.tally import ExpertTally
from tests.unit.nn.routing_cases import (
    ALL_CASES,
    CASES,
    ROUTERS,
    build_decoder,
    build_layer,
    case_id,
    model_config,
    moe_config,
    some_input,
)

WITH_STATE = ("deepseek", "expert_choice")


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_save_and_load(name: str, overflow: Overflow | None, tmp_path: Path) -> None:
    layer, fresh, x = build_layer(name, overflow), build_layer(name, overflow), some_input()
    with torch.no_grad():
        for value in (*fresh.parameters(), *fresh.buffers()):
            value.zero_()
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x)[0], fresh.train(mode)(x)[0])
    learned = {key.removeprefix("router.") for key in layer.state_dict() if key.startswith("router.")} - {"weight"}
    expected = {"deepseek": {"bias"}, "expert": {"threshold", "num_updates"}, "soft": {"log_gate"}}
    assert learned == expected.get(name.partition("_")[0], set())


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_bf16_is_close_to_fp32(name: str, overflow: Overflow | None, activation: Activation) -> None:
    layer, x = build_layer(name, overflow, activation, torch.bfloat16), some_input(dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    rounded, exact = layer(x), wide(x.float())
    assert rounded[0].dtype == torch.bfloat16
    assert rounded[1].weights.dtype == rounded[1].probabilities.dtype == torch.float32
    assert torch.equal(rounded[1].expert_ids, exact[1].expert_ids), "routers compute in fp32 in both"
    assert (rounded[0].float() - exact[0]).norm() < 0.02 * exact[0].norm()


@pytest.mark.parametrize("name", WITH_STATE)
def test_what_a_router_learned_keeps_its_format(name: str) -> None:
    """Steps of 0.001 would vanish in bf16."""
    architecture = Architecture(model_config(), GroupedAttentionConfig(), moe_config(name))
    built = build_model(architecture, dtype=torch.bfloat16)  # by way of `meta`, `to` and `to_empty`
    copied = copy.deepcopy(build_decoder(name)).to(torch.bfloat16)
    for model in (built, copied, copied.half(), build_decoder(name).to(device="cpu", dtype=torch.bfloat16)):
        assert next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        formats = {n: b.dtype for n, b in model.named_buffers() if ".router." in n}
        assert len(formats) == 2 * (1 if name == "deepseek" else 2)
        assert {t for n, t in formats.items() if not n.endswith("num_updates")} == {torch.float32}
    assert all(not b.any() for n, b in built.named_buffers() if ".router." in n), "nothing is learned at the start"
    for (n, before), (_, after) in zip(build_decoder(name).named_buffers(), copied.named_buffers(), strict=True):
        assert ".router." not in n or torch.equal(before, after)


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_recomputation_changes_no_gradient_and_counts_nothing_twice(name: str, overflow: Overflow | None) -> None:
    router = copy.copy(ROUTERS[name])
    router.whole_expert_dropout = 0.3
    if hasattr(router, "jitter"):
        router.jitter = 0.1
    results, x = [], some_input()
    for recompute in (False, True):
        layer = build_layer(router, overflow, expert_dropout=0.2)
        before = {key: value.clone() for key, value in layer.named_buffers()}
        torch.manual_seed(11)
        y, routing = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        tally = ExpertTally()
        tally.add([routing])
        y.square().sum().backward()
        assert all(torch.equal(before[key], value) for key, value in layer.named_buffers())
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([y.detach(), tally.layers[0].counts, *gradients])
    for plain, recomputed in zip(*results, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)
