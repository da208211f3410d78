"""Memory of a training, before it runs: closed forms, without torch. Tests compare them with what autograd keeps."""

from __future__ import annotations

from dataclasses import dataclass

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionConfig
from ava_exp.config.machine import Precision
from ava_exp.config.model import Activation, ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.training import Recompute
from ava_exp.models.arithmetic import count_parameters, experts_per_token, num_prediction_heads, prediction_head_width
from ava_exp.models.attention import kept_attention_bytes

PROCESS_BYTES = 350_000_000
"""What the process takes beside its tensors: 260 MB were resident before there was a model, and kernels add to that."""
SLICE_VALUES = 2**24
"""Logits that exist at once: of `losses/cross_entropy.py`, which imports torch; a test holds the two together."""

WEIGHT_BYTES = {
    Precision.fp32: 4,
    Precision.fp16: 2,
    Precision.bf16: 2,
    Precision.mixed_fp16: 2,
    Precision.mixed_bf16: 2,
}


@dataclass(kw_only=True, slots=True, frozen=True)
class MemoryEstimate:
    """Bytes by part while training on one device.

    `logits` is what the loss makes of them at once, with the head's gradient; `snapshot` the copy that a checkpoint is
    written from while training goes on; `process` what the program itself takes.
    """

    weights: int
    master_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    snapshot: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        training = self.weights + self.master_weights + self.gradients + self.optimizer + self.activations
        return training + self.logits + self.snapshot + self.process


def estimate_memory(
    architecture: Architecture,
    *,
    precision: Precision,
    batch_size: int,
    sequence_length: int,
    recompute: Recompute = Recompute.none,
    on_cpu: bool = True,
    copies_state: bool = False,
) -> MemoryEstimate:
    """Estimate the peak of training with Adam.

    Weights and states are exact. All parts are added up, although gradients grow while activations shrink: a CPU's
    allocator hardly gives one's place to the other, and with accumulation they do exist together. `copies_state` is for
    checkpoints that are written while training goes on; `on_cpu` adds the process itself.
    """
    model, attention, sparsity = architecture.model, architecture.attention, architecture.sparsity
    parameters = count_parameters(architecture).total
    size = WEIGHT_BYTES[precision]
    mixed = precision in (Precision.mixed_fp16, Precision.mixed_bf16)
    wide = mixed or precision is Precision.fp16
    optimizer = 2 * (2 if precision is Precision.bf16 else 4) * parameters
    activations = _activation_bytes(model, attention, sparsity, size, batch_size, sequence_length, recompute, on_cpu)
    activations += size * batch_size * sequence_length * _prediction_values(architecture, recompute)
    num_logits = min(SLICE_VALUES, batch_size * sequence_length * model.vocab_size)
    head, more = model.vocab_size * model.hidden_size, num_prediction_heads(architecture)
    # Every prediction head brings a gradient of the product with the vocabulary, and one of its states, with its loss.
    gradients_of_losses = (1 + more) * head + more * batch_size * sequence_length * model.hidden_size
    return MemoryEstimate(
        weights=size * parameters,
        master_weights=4 * parameters if wide else 0,
        # The 16-bit gradients of a backward pass, and the fp32 ones that they are added to.
        gradients=(size + 4 if wide else size) * parameters,
        optimizer=optimizer,
        activations=activations,
        logits=size * (num_logits + gradients_of_losses),
        snapshot=(4 if wide else size) * parameters + optimizer if copies_state else 0,
        process=PROCESS_BYTES if on_cpu else 0,
    )


def _activation_bytes(
    model: ModelConfig,
    attention: AttentionConfig,
    sparsity: SparsityConfig,
    size: int,
    batch_size: int,
    sequence_length: int,
    recompute: Recompute,
    on_cpu: bool,
) -> int:
    """Bytes that the forward pass keeps for the backward pass, and the gradients of one block's values."""
    tokens = batch_size * sequence_length
    mixing = _mixing_bytes(model, attention, size, sequence_length, on_cpu)
    rows = _rows_of_experts(sparsity, tokens, on_cpu)
    block = round(tokens * (mixing + _norm_bytes(model, size))) + _feed_forward_bytes(
        model, sparsity, size, tokens, rows
    )
    ends = tokens * (_norm_bytes(model, size) + size * model.hidden_size)
    if recompute is Recompute.none:
        return model.num_layers * block + ends + block
    kept = tokens * size * model.hidden_size
    if recompute is Recompute.selective:
        kept += size * _product_values(model, sparsity, tokens, rows)
    return model.num_layers * kept + ends + 2 * block  # one block at a time is whole


def _prediction_values(architecture: Architecture, recompute: Recompute) -> int:
    """Values that the prediction heads keep of one token, and the states that wait for the loss."""
    model, width = architecture.model, prediction_head_width(architecture)
    up = 2 * width if model.activation is Activation.swiglu else width
    whole = 5 * model.hidden_size + up + width  # joined, projected, normed, the network's two, and their sum
    kept = {Recompute.none: whole, Recompute.selective: 2 * model.hidden_size + up, Recompute.full: 0}[recompute]
    working = whole if recompute is not Recompute.none and num_prediction_heads(architecture) else 0
    return num_prediction_heads(architecture) * (kept + model.hidden_size) + working


def _norm_bytes(model: ModelConfig, size: int) -> int:
    """A norm's input and output, for one token."""
    return 2 * size * model.hidden_size


def _mixing_bytes(
    model: ModelConfig, attention: AttentionConfig, size: int, sequence_length: int, on_cpu: bool
) -> float:
    """Attention of one token: its norm, what is kept of the attention itself, and masks of dropped values."""
    masks = 2 * size * model.hidden_size if model.dropout > 0 else 0
    return _norm_bytes(model, size) + kept_attention_bytes(model, attention, size, sequence_length, on_cpu) + masks


def _rows_of_experts(sparsity: SparsityConfig, tokens: int, on_cpu: bool) -> int:
    """Rows that the experts compute: visits, and what fills their groups up on a CPU, as `nn/moe/dispatch.py` does."""
    if not isinstance(sparsity, MoEConfig):
        return tokens
    visits = round(experts_per_token(sparsity) * tokens)
    return visits + (max(4 * sparsity.num_experts, visits // 45) if on_cpu else 0)


def _widths(model: ModelConfig, sparsity: SparsityConfig) -> tuple[int, int]:
    """Return the width of a feed-forward network, and that of its first product."""
    assert model.intermediate_size is not None
    width = model.intermediate_size
    if isinstance(sparsity, MoEConfig) and sparsity.intermediate_size is not None:
        width = sparsity.intermediate_size
    return width, 2 * width if model.activation is Activation.swiglu else width


def _feed_forward_bytes(model: ModelConfig, sparsity: SparsityConfig, size: int, tokens: int, rows: int) -> int:
    """The first product, what the activation makes of it; for experts also inputs and outputs in their own order, and
    the router's fp32 values."""
    width, up = _widths(model, sparsity)
    if not isinstance(sparsity, MoEConfig):
        return size * rows * (up + width)
    router = 12 * sparsity.num_experts + (4 * model.hidden_size if size == 2 else 0)
    visits = round(tokens * experts_per_token(sparsity))
    return size * rows * (up + width + 2 * model.hidden_size) + tokens * router + 40 * visits


def _product_values(model: ModelConfig, sparsity: SparsityConfig, tokens: int, rows: int) -> int:
    """Results of the products with weights, of one block."""
    assert model.head_dim is not None and model.num_kv_heads is not None
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    _, up = _widths(model, sparsity)
    return tokens * (heads + model.hidden_size) + rows * (up + model.hidden_size)
