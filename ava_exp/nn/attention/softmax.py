"""Softmax attention [vaswani2017attention] eq. 1 and the back ends that compute it.

`auto` takes plain products on a CPU for short texts, else torch's fused product. With a window, whole texts are cut
into chunks, so that scores outside the band are never made.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ava_exp.config.attention import AttentionBackend
from ava_exp.errors import ConfigError
from ava_exp.nn.attention.band import Band
from ava_exp.nn.attention.cache import Held, visible

PLAIN_LENGTH = 512
"""On a CPU plain products beat torch's fused kernel up to about this many keys (25 % at 256), and need T·S memory."""

KERNELS = {
    AttentionBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttentionBackend.memory_efficient: SDPBackend.EFFICIENT_ATTENTION,
    AttentionBackend.math: SDPBackend.MATH,
}
"""Kernels of torch's fused product that can be asked for by name."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""How torch begins to say that the kernels it may use cannot serve its input."""

logger = logging.getLogger(__name__)


class SoftmaxAttention:
    """Computes causal softmax attention by the back end that was asked for, or by the one that suits."""

    def __init__(self, backend: AttentionBackend, tells: bool) -> None:
        """`tells` is for one layer of a model: it logs what was chosen, every choice once."""
        self.backend, self.tells = backend, tells
        self._told: set[AttentionBackend] = set()

    def __call__(
        self,
        q_RHTC: Tensor,
        held: Held,
        *,
        window: int | None = None,
        documents_RT: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Let each of T new entries read what it sees: (R, H, T, C), in the format of `q_RHTC`.

        That are the entries before it and itself, the last `window` of them, and of its own document where
        `documents_RT` numbers those of a text without a cache. Raises ConfigError when the back end that was asked
        for cannot serve.
        """
        length, num_keys = q_RHTC.shape[2], held.keys.shape[2]
        whole = isinstance(held.starts, int) and held.starts == 0
        assert documents_RT is None or whole, "documents are told apart without a cache only"
        window = None if window is None or window >= num_keys else window
        if self.backend is AttentionBackend.flex:
            return self._flex(q_RHTC, held, _sees(held, window, documents_RT), dropout)
        if window is not None and whole and length == num_keys and (band := Band.of(length, window)) is not None:
            chunks = band.cut(q_RHTC, held.keys, held.values, documents_RT)
            return band.join(self.masked(*chunks, dropout), q_RHTC.shape)
        if window is not None:
            held = held.last(window)
        alone = whole and length == num_keys and documents_RT is None and window is None
        mask = None if alone else visible(held, length, window)
        if documents_RT is not None and length > 1:
            assert mask is not None
            mask = mask & (documents_RT[:, None, :, None] == documents_RT[:, None, None, :])
        return self.masked(q_RHTC, held.keys, held.values, mask, dropout)

    def masked(
        self, q_RHTC: Tensor, k_RKSC: Tensor, v_RKSC: Tensor, mask: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """Compute softmax attention under a mask, true where a query sees a key: (T, S), (R, 1, T, S) or (R, H, T, S).

        None is causal for T = S, and everything for one query.
        """
        length, num_keys = q_RHTC.shape[2], k_RKSC.shape[2]
        backend = self.choose(q_RHTC.device, num_keys, length)
        if backend is AttentionBackend.flex:
            sees = _sees(Held(k_RKSC, v_RKSC, 0), None, None) if mask is None else _sees_by(mask)
            return self._flex(q_RHTC, Held(k_RKSC, v_RKSC, 0), sees, dropout)
        if backend is AttentionBackend.plain:
            if length == 1 and dropout == 0:
                return single_query_attention(q_RHTC, k_RKSC, v_RKSC, mask)
            if mask is None and length > 1:
                mask = visible(Held(k_RKSC, v_RKSC, 0), length)
            return plain_attention(q_RHTC, k_RKSC, v_RKSC, mask, dropout)
        fused = functools.partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and length > 1,
            enable_gqa=q_RHTC.shape[1] != k_RKSC.shape[1],
        )
        if backend is AttentionBackend.sdpa:
            return fused(q_RHTC, k_RKSC, v_RKSC)
        try:
            with sdpa_kernel(KERNELS[backend]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says why in several; the error below says it in one line
                return fused(q_RHTC, k_RKSC, v_RKSC)
        except RuntimeError as error:
            if not str(error).startswith(NO_KERNEL):
                raise
            properties = [str(q_RHTC.dtype).removeprefix("torch."), f"{q_RHTC.shape[3]} channels a head"]
            properties += ["a mask"] if mask is not None else []
            properties += [f"dropout {dropout:g}"] if dropout > 0 else []
            self._refuse(f"torch has no such kernel for {', '.join(properties)} on this {_name(q_RHTC.device)}")

    def choose(self, device: torch.device, num_keys: int, length: int) -> AttentionBackend:
        """Return the back end for so many keys and queries, and log what has not been chosen before."""
        backend = self.backend
        if backend is AttentionBackend.auto:
            short = device.type == "cpu" and (num_keys <= PLAIN_LENGTH or length == 1)
            backend = AttentionBackend.plain if short else AttentionBackend.sdpa
        if self.tells and not torch.compiler.is_compiling() and backend not in self._told:
            self._told.add(backend)
            asked = "" if backend is self.backend else ", chosen by `attention.backend=auto`"
            logger.info("attention over %d keys on %s: %s%s", num_keys, device.type, backend.value, asked)
        return backend

    def _flex(self, q_RHTC: Tensor, held: Held, sees: Callable[..., Tensor], dropout: float) -> Tensor:
        """[dong2024flex] by torch: on a GPU compiled, blocks that nothing sees are left out; on a CPU all scores."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # takes long to import

        device, needs_grad = (
            q_RHTC.device,
            torch.is_grad_enabled() and (q_RHTC.requires_grad or held.keys.requires_grad),
        )
        if dropout > 0:
            self._refuse("torch's flexible product has no dropout, but `attention.attention_dropout` is above 0")
        if device.type != "cuda" and needs_grad:
            self._refuse(f"torch's flexible product trains on a CUDA device only, and this is {_name(device)}")
        batch, num_heads, length, _ = q_RHTC.shape
        self.choose(device, held.keys.shape[2], length)
        grouped = num_heads != held.keys.shape[1]
        blocks = create_block_mask(sees, batch, num_heads, length, held.keys.shape[2], device=device)
        if device.type == "cuda":
            return _compiled_flex()(q_RHTC, held.keys, held.values, block_mask=blocks, enable_gqa=grouped)  # type: ignore[no-any-return]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that all scores are made is documented, and logged as `flex` on `cpu`
            y = flex_attention(q_RHTC, held.keys, held.values, block_mask=blocks, enable_gqa=grouped)
        assert isinstance(y, Tensor)
        return y

    def _refuse(self, reason: str) -> NoReturn:
        raise ConfigError(f"`attention.backend` cannot be `{self.backend.value}` here: {reason}. Use `auto`.")


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _name(device: torch.device) -> str:
    return device.type.upper() if device.type in ("cpu", "cuda", "mps") else device.type


def _sees(held: Held, window: int | None, documents_RT: Tensor | None) -> Callable[..., Tensor]:
    """Return whether query t of head h in sequence r sees key s, as a function of tensors."""
    starts = torch.as_tensor(held.starts, device=held.keys.device)

    def sees(r: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        last = t + (starts[r] if starts.ndim else starts)
        seen = s <= last
        if window is not None:
            seen = seen & (s > last - window)
        return seen if documents_RT is None else seen & (documents_RT[r, t] == documents_RT[r, s])

    return sees


def _sees_by(mask: Tensor) -> Callable[..., Tensor]:
    full = mask if mask.ndim == 4 else mask[None, None]

    def sees(r: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return full[r if full.shape[0] > 1 else 0, h if full.shape[1] > 1 else 0, t, s]

    return sees


def plain_attention(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention [vaswani2017attention] eq. 1 by two matrix products; makes the (T, S) scores of every head.

    `mask` is true where a query sees a key, (T, S), (B, 1, T, S) or (B, H, T, S); None is everywhere.
    """
    batch, num_heads, length, head_dim = q_BHTC.shape
    num_kv_heads, num_keys = k_BKSC.shape[1], k_BKSC.shape[2]
    # Query heads of one group stand next to each other: fold them into rows of the same product.
    q = q_BHTC.reshape(batch, num_kv_heads, -1, head_dim)
    scores = (q @ k_BKSC.transpose(-1, -2)).view(batch, num_heads, length, num_keys) / math.sqrt(head_dim)
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + bias.masked_fill_(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights.view(batch, num_kv_heads, -1, num_keys) @ v_BKSC).view(batch, num_heads, length, head_dim)


def single_query_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_attention` of T = 1 query. Keys times queries, not queries times keys: keys need no transposed copy then,
    which a CPU makes in bf16, at the cost of all the rest.
    """
    batch, num_heads, _, head_dim = q_BHTC.shape
    keys, values = k_BKSC.flatten(0, 1), v_BKSC.flatten(0, 1)
    q = (q_BHTC / math.sqrt(head_dim)).reshape(keys.shape[0], -1, head_dim)
    scores = torch.bmm(keys, q.transpose(1, 2)).transpose(1, 2)
    if mask is not None:
        scores = scores.reshape(batch, num_heads, 1, -1).masked_fill(~mask, float("-inf")).view_as(scores)
    return torch.bmm(scores.softmax(dim=-1), values).view(batch, num_heads, 1, head_dim)
