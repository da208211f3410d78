"""Activations: given ones, and those that a layer learns as a mixture of several or a choice among them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.model import Activation, MixedActivation

BLOCK_ROWS = 256
"""Rows at once on a CPU: what one operation writes is still in the cache when the next one reads it."""

_aten = torch.ops.aten
FUNCTIONS: dict[MixedActivation, Callable[[Tensor], Tensor]] = {
    MixedActivation.gelu: F.gelu,
    MixedActivation.silu: F.silu,
    MixedActivation.relu: F.relu,
    MixedActivation.tanh: torch.tanh,
    MixedActivation.identity: lambda h: h,
}
GRADIENTS: dict[MixedActivation, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    MixedActivation.gelu: lambda grad, h, y: _aten.gelu_backward(grad, h),
    MixedActivation.silu: lambda grad, h, y: _aten.silu_backward(grad, h),
    MixedActivation.relu: lambda grad, h, y: _aten.threshold_backward(grad, h, 0),
    MixedActivation.tanh: lambda grad, h, y: _aten.tanh_backward(grad, y),
    MixedActivation.identity: lambda grad, h, y: grad,
}
"""Of the gradient of y = act(h), with h and y, to that of h."""


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Apply GELU [hendrycks2016gelu] §2, or SwiGLU [shazeer2020glu] eq. 5 to gate and value: (…, 2F) → (…, F)."""
    if activation is Activation.gelu:
        return F.gelu(h)
    if not torch.is_grad_enabled() and h.numel() <= BLOCK_ROWS * h.shape[-1]:
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)
    y: Tensor = _SwiGLU.apply(h)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · value. Its backward writes both gradients into one buffer and keeps the input only,
    where autograd would keep three tensors and join the halves by a copy. On a CPU it goes block by block."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        y = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype, device=h.device)
        for h_block, y_block in zip(_blocks(h), _blocks(y), strict=True):
            gate, value = h_block.chunk(2, dim=-1)
            torch.ops.aten.silu(gate, out=y_block).mul_(value)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        for h_block, grad_block, out in zip(_blocks(h), _blocks(grad), _blocks(grad_h), strict=True):
            gate, value = h_block.chunk(2, dim=-1)
            grad_gate, grad_value = out.chunk(2, dim=-1)
            torch.mul(grad_block, F.silu(gate), out=grad_value)
            torch.ops.aten.silu_backward(grad_block * value, gate, grad_input=grad_gate)
        return grad_h


class ActivationMixture(nn.Module):
    """Σ wᵢ · actᵢ(h) with w = softmax(`logits`), A numbers that one layer learns: a convex combination of activations
    [manessi2018learning]. That the softmax makes the weights convex is ours.

    `hard` makes it a choice. While training it is drawn for every forward pass with the probabilities w, and its
    gradient is that of the Gumbel-softmax sample at temperature 1, straight through [jang2017gumbel] §2.2. Without
    training it is the most probable one, which costs as much as it alone. A GPU is waited for to learn the choice.
    """

    def __init__(self, functions: Sequence[MixedActivation], hard: bool = False) -> None:
        super().__init__()
        assert functions, "there is nothing to mix"
        self.functions, self.hard = tuple(functions), hard
        self.logits = nn.Parameter(torch.empty(len(self.functions)))

    def draw(self) -> Callable[[Tensor], Tensor]:
        """Return the activation of one forward pass, for all that has to be activated in it: (…, F) → (…, F)."""
        wide_A = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        if not self.hard:
            return functools.partial(self._mix, wide_A.softmax(dim=0), None)
        if not self.training:
            return FUNCTIONS[self.functions[int(wide_A.argmax())]]
        sample_A = F.gumbel_softmax(wide_A)
        return functools.partial(self._mix, sample_A, int(sample_A.argmax()))

    def weights(self) -> dict[str, float]:
        """Return each activation's weight, or the probability that it is chosen."""
        shares = self.logits.detach().float().softmax(dim=0).tolist()
        return dict(zip([function.value for function in self.functions], shares, strict=True))

    def _mix(self, weights_A: Tensor, chosen: int | None, h: Tensor) -> Tensor:
        y: Tensor = _Mixture.apply(h, weights_A, self.functions, chosen)  # type: ignore[no-untyped-call]
        return y


class _Mixture(torch.autograd.Function):
    """Σ wᵢ · actᵢ(h), or the chosen one of them with a gradient as if it were that sum. The backward pass keeps the
    input only, where autograd would keep every activation too, and computes them again. For four activations in
    bf16 on a CPU both passes take 1.4 times as long as autograd's, and keep a fifth."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weights_A: Tensor, functions: Sequence[MixedActivation], chosen: int | None
    ) -> Tensor:
        ctx.save_for_backward(h, weights_A)
        ctx.functions, ctx.chosen = functions, chosen
        if chosen is not None:
            return FUNCTIONS[functions[chosen]](h)
        y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        first, *further = zip(functions, weights_A.unbind(), strict=True)
        for h_block, y_block in zip(_blocks(h), _blocks(y), strict=True):
            torch.mul(FUNCTIONS[first[0]](h_block), first[1], out=y_block)
            for function, share in further:
                y_block.add_(FUNCTIONS[function](h_block) * share)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, weights_A = ctx.saved_tensors
        grad_h = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
        shares = weights_A.unbind()
        products = []
        for h_block, grad_block, out in zip(_blocks(h), _blocks(grad), _blocks(grad_h), strict=True):
            for index, function in enumerate(ctx.functions):
                y_block = FUNCTIONS[function](h_block)
                products.append((grad_block * y_block).sum(dtype=weights_A.dtype))
                if ctx.chosen in (None, index):
                    gradient = GRADIENTS[function](grad_block, h_block, y_block)
                    out.add_(gradient * shares[index] if ctx.chosen is None else gradient)
        return grad_h, torch.stack(products).view(-1, len(shares)).sum(dim=0), None, None


def build_mixture(activation: Activation, functions: Sequence[MixedActivation]) -> ActivationMixture | None:
    """Return what learns the activation, or None where it is given."""
    if activation not in (Activation.mixture, Activation.hard_mixture):
        return None
    return ActivationMixture(functions, hard=activation is Activation.hard_mixture)


def draw_activation(activation: Activation, mixture: ActivationMixture | None) -> Callable[[Tensor], Tensor]:
    """Return the activation of one forward pass."""
    return functools.partial(activate, activation=activation) if mixture is None else mixture.draw()


def activation_weights(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the weights of every mixture of activations in a decoder, by where it is: `layer_3`, `layer_3_shared`."""
    mixtures = ((name, part) for name, part in model.named_modules() if isinstance(part, ActivationMixture))
    return {_place(name): mixture.weights() for name, mixture in mixtures}


def _place(name: str) -> str:
    layer = re.search(r"\d+", name)
    assert layer is not None
    owner = name.split(".")[-2]
    return f"layer_{layer[0]}" + (f"_{owner}" if owner in ("shared", "residual") else "")


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Cut the rows so that on a CPU what one operation writes is still in the cache when the next one reads it."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.split(rows, BLOCK_ROWS) if x.device.type == "cpu" else (rows,)
