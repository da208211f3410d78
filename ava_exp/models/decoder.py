"""The decoder: embedding, pre-norm blocks, head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.architecture import Architecture
from ava_exp.config.mod import DepthConfig, DepthPart
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig, Overflow, RopeScaling, SparsityConfig
from ava_exp.config.training import Recompute
from ava_exp.errors import ConfigError
from ava_exp.nn.attention.cache import AttentionContext, KeyValueCache
from ava_exp.nn.attention.mixture_of_heads import HeadRouting
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.init import initialize
from ava_exp.nn.mod.depth import Depth, DepthRouter, positions_of
from ava_exp.nn.mod.learned import LearnedDepth
from ava_exp.nn.mod.selection import multiple_of
from ava_exp.nn.moe.experts import Experts
from ava_exp.nn.moe.layer import CapacityLimit, MoELayer
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.norm import build_norm
from ava_exp.nn.output import ModelOutput
from ava_exp.nn.prediction import build_prediction_heads
from ava_exp.nn.recompute import offload, run_recomputed
from ava_exp.nn.rope import RotaryScaling, rope_tables

BlockOutput = tuple[Tensor, Routing | None, HeadRouting | None, Depth | None]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    With a Mixture of Depths some tokens take part in neither, or not in the second, and stay what they are
    [raposo2024mod] §3.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        model, attention, sparsity = architecture.model, architecture.attention, architecture.sparsity
        self.attention_norm = build_norm(model.norm, model.hidden_size, model.norm_epsilon)
        self.attention = attention.build(
            dim=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            layer=layer,
            bias=model.bias,
            norm_epsilon=model.norm_epsilon,
        )
        self.feed_forward_norm = build_norm(model.norm, model.hidden_size, model.norm_epsilon)
        self.feed_forward = build_feed_forward(model, sparsity, layer)
        self.dropout = model.dropout
        self.mod = _build_mod(architecture, layer)
        self.skips_attention = isinstance(architecture.mod, DepthConfig) and architecture.mod.part is DepthPart.block

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> BlockOutput:
        """Map (B, T, D) to (B, T, D). The routing is None where the feed-forward network is dense, that of heads where
        all tokens use all of them, and the depth where no token may skip."""
        heads = None
        if self.mod is None:
            x_BTD, heads = self._attend(x_BTD, context)
            x_BTD, routing = self._feed(x_BTD)
            return x_BTD, routing, heads, None
        if not self.skips_attention:
            x_BTD, heads = self._attend(x_BTD, context)
        decision = self.mod(x_BTD, context)
        selection, depth = decision.selection, decision.depth(attends=self.skips_attention)
        if depth.num_processed == 0:
            return x_BTD, self._routing_of_nobody(x_BTD.device), heads, depth
        before = after = selection.take(x_BTD)
        if self.skips_attention:
            batch, length, _ = x_BTD.shape
            positions_BT = positions_of(context, batch, length, x_BTD.device)
            after, heads = self._attend(before, selection.context(context, positions_BT))
        # Padding is left out from here on: it would visit experts. A dense network may have some.
        multiple = 1 if isinstance(self.feed_forward, MoELayer) else multiple_of(x_BTD)
        after, routing = self._feed(selection.compact(after, multiple))
        if routing is not None and not selection.is_everything:
            routing.token_ids = selection.token_ids
        processed = self.mod.blend(selection.compact(before, multiple), after)
        return selection.put(x_BTD, processed), routing, heads, depth

    def _attend(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, HeadRouting | None]:
        y = self.attention(self.attention_norm(x), context)
        y, heads = y if isinstance(y, tuple) else (y, None)
        return x + self._drop(y), heads

    def _feed(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        y = self.feed_forward(self.feed_forward_norm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + self._drop(y), routing

    def _routing_of_nobody(self, device: torch.device) -> Routing | None:
        if not isinstance(self.feed_forward, MoELayer):
            return None
        return Routing.of_nobody(self.feed_forward.router.num_experts, device)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


def _build_mod(architecture: Architecture, layer: int) -> DepthRouter | None:
    mod, model = architecture.mod, architecture.model
    layers = mod.skippable_layers(model.num_layers)
    if not isinstance(mod, DepthConfig) or layer not in layers:
        return None
    router: DepthRouter = mod.build(dim=model.hidden_size, place=layers.index(layer))
    return router


def build_feed_forward(model: ModelConfig, sparsity: SparsityConfig, layer: int) -> nn.Module:
    """Return the dense network or the mixture of experts that `sparsity` asks for in this layer."""
    assert model.intermediate_size is not None
    mixed = model.mixed_activations
    if isinstance(sparsity, DenseConfig) or (isinstance(sparsity, MoEConfig) and layer < sparsity.first_k_dense):
        return FeedForward(model.hidden_size, model.intermediate_size, model.activation, model.bias, mixed)
    assert isinstance(sparsity, MoEConfig)
    width = sparsity.intermediate_size or model.intermediate_size
    experts = Experts(
        num_experts=sparsity.num_experts,
        dim=model.hidden_size,
        intermediate_size=width,
        activation=model.activation,
        dispatch=sparsity.dispatch,
        share=sparsity.share_projection,
        norm=sparsity.expert_norm,
        dropout=sparsity.expert_dropout,
        mixed_activations=mixed,
    )
    has_residual = sparsity.capacity_factor is not None and sparsity.overflow is Overflow.residual
    return MoELayer(
        router=sparsity.router.build(dim=model.hidden_size, num_experts=sparsity.num_experts),
        experts=experts,
        shared=_network(model, sparsity.num_shared_experts * width) if sparsity.num_shared_experts else None,
        residual=_network(model, width) if has_residual else None,
        capacity=_capacity(sparsity),
    )


def rotary_scaling(model: ModelConfig) -> RotaryScaling | None:
    """Return how the model's rotary positions are scaled; None where they are not."""
    factor, original_length = model.rope_scaling_factor, model.original_max_position_embeddings
    if model.rope_scaling is RopeScaling.none:
        return None
    if factor is None or original_length is None:
        either = "`model.rope_scaling_factor` or `model.original_max_position_embeddings`"
        raise ConfigError(f"`model.rope_scaling={model.rope_scaling.name}` needs {either}.")
    return RotaryScaling(
        kind=model.rope_scaling,
        factor=factor,
        original_length=original_length,
        beta_fast=model.yarn_beta_fast,
        beta_slow=model.yarn_beta_slow,
        attention_factor=model.yarn_attention_factor,
    )


def _network(model: ModelConfig, width: int) -> FeedForward:
    return FeedForward(model.hidden_size, width, model.activation, mixed_activations=model.mixed_activations)


def _capacity(sparsity: MoEConfig) -> CapacityLimit | None:
    if sparsity.capacity_factor is None:
        return None
    return CapacityLimit(
        factor=sparsity.capacity_factor,
        experts_per_token=sparsity.router.experts_per_token(sparsity.num_experts),
        overflow=sparsity.overflow,
        at_evaluation=sparsity.capacity_at_evaluation,
    )


class Decoder(nn.Module):
    """A causal language model, fp32 and uninitialised until `initialize` (or a checkpoint) fills it.

    While it trains, `recompute` and `offload_activations` say what is kept for the backward pass, and where.
    """

    cos: Tensor
    sin: Tensor
    recompute: Recompute = Recompute.none
    offload_activations: bool = False
    adjusted_mod_capacity: float | None = None
    is_compiled = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        model = architecture.model
        self.config, self.mod_config = model, architecture.mod
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(architecture, layer) for layer in range(model.num_layers))
        self.final_norm = build_norm(model.norm, model.hidden_size, model.norm_epsilon)
        self.head = None if model.tie_embeddings else nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.prediction_heads = build_prediction_heads(model, architecture.prediction)
        self.refresh_rope()

    def refresh_rope(self) -> None:
        """(Re)compute the rotary tables on the model's device; they are no part of a checkpoint."""
        model, device = self.config, self.embedding.weight.device
        assert model.head_dim is not None
        scaling = rotary_scaling(model)
        tables = rope_tables(model.max_position_embeddings, model.head_dim, model.rope_theta, device, scaling)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def scale_positions(self, model: ModelConfig) -> None:
        """Read positions as `model` says, which has other rotary scaling or more positions, and is else the same."""
        self.config = model
        self.refresh_rope()

    def forward(
        self,
        ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        *,
        counts_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the next token at every position of (B, T) int64 ids.

        With a cache the ids continue what it holds, and it is extended by T positions; or by the first `counts_B` of a
        sequence, where padding follows. `documents_BT` numbers the documents of a text without a cache: no token then
        sees another document than its own. Prediction heads, where there are any, run when the output's `future` is
        read.
        Raises ConfigError when the positions exceed `max_position_embeddings`.
        """
        context = self._context(ids_BT, cache, counts_B, documents_BT)
        embedding_BTD = x_BTD = self.embedding(ids_BT)
        routings, head_routings, depths = [], [], []
        with self._offload(), self._eager() if cache is not None else nullcontext():
            for block in self.blocks:
                x_BTD, routing, heads, depth = self._run(block, x_BTD, context)
                if routing is not None:
                    routings.append(routing)
                if heads is not None:
                    head_routings.append(heads)
                if depth is not None:
                    depths.append(depth)
        if cache is not None:
            cache.advance(ids_BT.shape[1] if counts_B is None else counts_B)
        weight = self.embedding.weight if self.head is None else self.head.weight
        hidden_BTD = self.final_norm(x_BTD)
        return ModelOutput(
            hidden=hidden_BTD,
            head=weight,
            routings=routings,
            head_routings=head_routings,
            depths=depths,
            chain=partial(self._chain, hidden_BTD, embedding_BTD),
        )

    def _chain(self, hidden_BTD: Tensor, embedding_BTD: Tensor) -> list[Tensor]:
        """Chain the prediction heads: head j reads the true token j positions on, so it ends j before the text does."""
        states = []
        with self._offload():
            for distance, head in enumerate(self.prediction_heads, start=1):
                hidden_BTD = self._run(head, hidden_BTD[:, :-1], embedding_BTD[:, distance:])
                states.append(hidden_BTD)
        return states

    def _offload(self) -> AbstractContextManager[Any]:
        """Return the context in which activations are kept where `offload_activations` says."""
        if self.offload_activations and torch.is_grad_enabled():
            return offload([*self.parameters(), self.cos, self.sin])
        return nullcontext()

    def _eager(self) -> AbstractContextManager[Any]:
        """Return the context in which nothing is compiled: with a cache every call has other shapes."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def _context(
        self, ids_BT: Tensor, cache: KeyValueCache | None, counts_B: Tensor | None, documents_BT: Tensor | None
    ) -> AttentionContext:
        starts = cache.lengths if cache is not None else 0
        stops = starts + (ids_BT.shape[1] if counts_B is None else counts_B)
        stop, limit = int(stops.max()) if isinstance(stops, Tensor) else stops, self.cos.shape[0]
        if stop > limit:
            raise ConfigError(f"a sequence must have at most {limit} tokens, but has {stop} instead.")
        cos, sin = self._tables(starts, ids_BT.shape[1])
        if cache is not None:  # once, not in every layer
            cos, sin = cos.to(self.embedding.weight.dtype), sin.to(self.embedding.weight.dtype)
        return AttentionContext(cos=cos, sin=sin, cache=cache, counts=counts_B, documents=documents_BT)

    def _tables(self, starts: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `length` positions: (T, C/2), or (B, 1, T, C/2) for sequences that start apart."""
        if isinstance(starts, int) and starts + length <= self.cos.shape[0]:
            return self.cos[starts : starts + length], self.sin[starts : starts + length]
        offsets = torch.arange(length, device=self.cos.device)
        positions = torch.as_tensor(starts, device=self.cos.device).reshape(-1, 1) + offsets
        # Padding may reach beyond the last position: it takes that one's angles, which nobody looks at.
        positions = positions.clamp(max=self.cos.shape[0] - 1)
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def moe_layers(self) -> list[MoELayer]:
        """Return the layers that are mixtures of experts, in the order of an output's `routings`."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]

    def mod_layers(self) -> dict[int, DepthRouter]:
        """Return what decides for the layers that tokens may skip, by layer, in the order of an output's `depths`."""
        return {layer: block.mod for layer, block in enumerate(self.blocks) if block.mod is not None}  # type: ignore[misc]

    @property
    def mod_capacity(self) -> float | None:
        """The share of tokens that layers process, where tokens may skip some: the one in force."""
        return next((router.capacity for router in self.mod_layers().values()), None)

    @mod_capacity.setter
    def mod_capacity(self, capacity: float) -> None:
        for router in self.mod_layers().values():
            router.capacity = capacity

    def anneal(self, progress: float) -> None:
        """Set the capacity that the configuration has for this share of the budget, unless it was set for good."""
        if isinstance(self.mod_config, DepthConfig):
            adjusted = self.adjusted_mod_capacity
            self.mod_capacity = self.mod_config.capacity_at(progress) if adjusted is None else adjusted

    def adjust_mod_capacity(self, capacity: float) -> None:
        """Set the capacity for good: no annealing changes it any more."""
        self.mod_capacity = self.adjusted_mod_capacity = capacity

    @property
    def chooses_by_content(self) -> bool:
        """Whether layers choose tokens otherwise while training than at inference."""
        return any(isinstance(router, LearnedDepth) for router in self.mod_layers().values())

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Let layers choose the best tokens of whole sequences, as they do while training, at inference, too."""
        routers = [router for router in self.mod_layers().values() if isinstance(router, LearnedDepth)]
        for router in routers:
            router.looks_ahead = True
        try:
            yield
        finally:
            for router in routers:
                router.looks_ahead = False

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        if self.recompute is Recompute.none or not torch.is_grad_enabled():
            return module(*inputs)
        return run_recomputed(module, self.recompute, *inputs)

    def compile_blocks(self) -> None:
        """Compile the blocks in place; names of weights stay. Experts are left out: how many rows each gets is data,
        and a grouped product over such sizes cannot be compiled. No token may skip a layer, for the same reason."""
        assert not self.mod_layers(), "a rule of the configuration refuses it"
        self.is_compiled = True
        for block in self.blocks:
            assert isinstance(block, Block)
            if not isinstance(block.feed_forward, MoELayer):
                block.compile()
                continue
            for part in (block.attention_norm, block.attention, block.feed_forward_norm):
                part.compile()

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """Return an empty cache for at most `capacity` positions of `batch_size` sequences."""
        weight = self.embedding.weight
        mixers: list[Any] = [block.attention for block in self.blocks]
        return KeyValueCache([m.new_cache(batch_size, capacity, weight.dtype, weight.device) for m in mixers])


def build_model(
    architecture: Architecture,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """Build and initialise a decoder: the same weights for the same seed on every device.

    On the `meta` device nothing is allocated or initialised.
    """
    with torch.device("meta"):
        decoder = Decoder(architecture)
    if torch.device(device).type == "meta":
        return decoder.to(dtype)
    decoder = decoder.to(dtype).to_empty(device=device)
    decoder.refresh_rope()
    initialize(decoder, seed, architecture.model.initializer_range, architecture.model.num_layers)
    return decoder
