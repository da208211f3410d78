"""The routers that the tests run through, and layers and models built with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import Activation, DispatchBackend, ModelConfig, MoEConfig, Overflow
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    SoftRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)
from ava_exp.models.decoder import Decoder, build_feed_forward, build_model
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing

DIM, WIDTH, NUM_EXPERTS = 8, 8, 8

ROUTERS: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(),
    "topk_3_plain": TopKRouterConfig(moe_top_k=3, renormalize=False, routing_temperature=0.7),
    "switch": SwitchRouterConfig(jitter=0.0),
    "soft": SoftRouterConfig(routing_temperature=1.5),
    "sinkhorn": SinkhornRouterConfig(),
    "deepseek": DeepSeekRouterConfig(),
    "deepseek_groups": DeepSeekRouterConfig(num_groups=4, groups_per_token=2, moe_top_k=3, routed_scaling_factor=2.5),
    "two_stage": TwoStageRouterConfig(num_groups=4, groups_per_token=2),
    "dynamic": DynamicRouterConfig(threshold=0.7, max_experts=3),
    "dynamic_renormalized": DynamicRouterConfig(threshold=0.8, max_experts=3, renormalize=True),
    "hierarchical": HierarchicalRouterConfig(),
    "tree_of_3_levels": HierarchicalRouterConfig(branching=[2, 2, 2], choices=[2, 1, 2], renormalize=True),
    "expert_choice": ExpertChoiceRouterConfig(average_experts=1.5),
}
OVERFLOWS: tuple[Overflow | None, ...] = (None, *Overflow)
NOT_CAUSAL_WHILE_TRAINING = {"sinkhorn", "expert_choice"}
NO_CAPACITY = {"soft", "expert_choice"}
"""Routers for which a capacity has no meaning; a rule of the configuration refuses it."""
ACTIVATIONS = [Activation.gelu, Activation.swiglu]
CASES = [(name, overflow) for name in ROUTERS for overflow in OVERFLOWS if not (overflow and name in NO_CAPACITY)]
ALL_CASES = [(name, overflow, activation) for name, overflow in CASES for activation in ACTIVATIONS]


def moe_config(router: str | RouterConfig, overflow: Overflow | None = None, **changes: Any) -> MoEConfig:
    """Return the configuration of a mixture; with an overflow its capacity is well below what is asked for."""
    values: dict[str, Any] = {
        "router": ROUTERS[router] if isinstance(router, str) else router,
        "num_experts": NUM_EXPERTS,
        "dispatch": DispatchBackend.loop,
    }
    if overflow is not None:
        values |= {"capacity_factor": 0.7, "overflow": overflow}
    return MoEConfig(**values | changes)


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": DIM,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": WIDTH,
        "max_position_embeddings": 32,
    }
    return ModelConfig(**values | changes)


def build_layer(
    router: str | RouterConfig,
    overflow: Overflow | None = None,
    activation: Activation = Activation.swiglu,
    dtype: torch.dtype = torch.float64,
    size: dict[str, int] | None = None,
    **changes: Any,
) -> MoELayer:
    """Return a layer in training mode whose weights are large enough for routers to be decided."""
    sizes = size or {}
    model = model_config(activation=activation, **sizes)
    layer = build_feed_forward(model, moe_config(router, overflow, **changes), layer=0)
    assert isinstance(layer, MoELayer)
    layer = layer.to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    layer.router.weight.data.mul_(2)
    teach(layer.router)
    return layer


def teach(router: Router) -> None:
    """Give a router what it would have learned beside gradients."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in router.named_buffers():
        if name == "bias":
            buffer.normal_(0, 0.2, generator=generator)
        elif name == "threshold":
            buffer.uniform_(0.05, 0.3, generator=generator)
        elif name == "num_updates":
            buffer.fill_(7)


def build_decoder(router: str | RouterConfig, overflow: Overflow | None = None, **changes: Any) -> Decoder:
    """Return a decoder at inference, taught; `changes` are of its sparsity."""
    model = build_model(Architecture(model_config(), GroupedAttentionConfig(), moe_config(router, overflow, **changes)))
    for layer in model.moe_layers():
        layer.router.weight.data.mul_(40)
        layer.experts.down.data.mul_(500)
        teach(layer.router)
    return model.eval()


def some_input(num_sequences: int = 2, length: int = 9, dtype: torch.dtype = torch.float64, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, length, DIM, generator=generator, dtype=torch.float64).to(dtype)


def some_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(0))


def case_id(value: object) -> str:
    """Name a case of a parametrised test."""
    return getattr(value, "name", "dropless" if value is None else str(value))


def backward(layer: MoELayer, x: Tensor) -> Routing:
    y, routing = layer(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * direction).sum().backward()
    return routing  # type: ignore[no-any-return]
