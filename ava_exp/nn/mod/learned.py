"""Learned depth: a router that scores tokens, and a predictor that does without later ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.mod import num_chosen
from ava_exp.nn.attention.cache import AttentionContext
from ava_exp.nn.mod.depth import Decision, DepthRouter, real_tokens
from ava_exp.nn.mod.selection import multiple_of, select_as_many, select_everything, select_where

EPSILON = 1e-6


class LearnedDepth(DepthRouter):
    """The tokens of a sequence with the largest router logits are processed [raposo2024mod] §3.

    While training these are the ceil(capacity · T) best of a sequence, of equals the first, which depends on later
    tokens. At inference, and so for every figure that does not say otherwise, a token is processed if a predictor says
    that it would be among them: a small network on the same input, trained on that question by binary cross entropy,
    whose gradient reaches nothing else (§3.5).

    Deviations: what the layer adds to a token is multiplied by 2 · sigmoid(logit), where the paper has the logit
    itself. So logits of 0 and a capacity of 1 are the model without any of this, and a capacity that falls from 1
    changes it little by little. Router and predictor see a token divided by its root mean square, because residual
    streams grow with depth.
    Router weights start as all matrices do: equal logits would choose by position.
    """

    def __init__(
        self,
        capacity_factor: float,
        router_hidden_size: int | None,
        predictor_hidden_size: int,
        dim: int,
        place: int,
    ) -> None:
        super().__init__(capacity_factor, place)
        self.router = TokenScore(dim, router_hidden_size, bias=False)
        self.predictor = TokenScore(dim, predictor_hidden_size, bias=True)
        self.looks_ahead = False
        """Whether the best of a sequence are chosen at inference, too: how training sees text, and no way to write."""

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Decision:
        if self.training or self.looks_ahead:
            return self._choose_best(x_BTD, context)
        with torch.no_grad():
            chosen_BT = self.predictor.infer(x_BTD) > 0
        real_BT = real_tokens(context, x_BTD.shape[1])
        if real_BT is None:
            return Decision(selection=select_where(chosen_BT, chosen_BT.numel(), multiple_of(x_BTD)))
        return Decision(selection=select_where(chosen_BT & real_BT, int(real_BT.sum()), multiple_of(x_BTD)))

    def _choose_best(self, x_BTD: Tensor, context: AttentionContext) -> Decision:
        assert context.cache is None and context.counts is None, "the best are those of whole sequences"
        batch, length = x_BTD.shape[:2]
        number = num_chosen(self.capacity, length)
        with torch.no_grad():
            scale_BT1 = inverse_root_mean_square(x_BTD)
        if number < length:
            with torch.no_grad():
                order_BT = self.router(x_BTD, scale_BT1).sort(dim=1, descending=True, stable=True).indices
                tokens_BM = order_BT[:, :number].sort(dim=1).values
                chosen_BT = torch.zeros(batch, length, dtype=torch.bool, device=x_BTD.device)
                chosen_BT.scatter_(1, tokens_BM, True)
            selection = select_as_many(tokens_BM, length)
        else:
            chosen_BT = torch.ones(batch, length, dtype=torch.bool, device=x_BTD.device)
            selection = select_everything(batch, length, x_BTD.device)
        logits_BT = self.predictor(x_BTD.detach(), scale_BT1)
        loss = F.binary_cross_entropy_with_logits(logits_BT, chosen_BT.to(logits_BT.dtype))
        hits = ((logits_BT.detach() > 0) == chosen_BT).sum()
        return Decision(selection=selection, losses={"mod_predictor_loss": loss}, num_predicted=hits)

    def blend(self, x: Tensor, processed: Tensor) -> Tensor:
        score = self.router(x, inverse_root_mean_square(x)) if torch.is_grad_enabled() else self.router.infer(x)
        weight = 2 * score.sigmoid()
        return torch.lerp(x, processed, weight[..., None].to(x.dtype))


class TokenScore(nn.Module):
    """One number for every token, of the token divided by its root mean square: a product, or a network of two."""

    def __init__(self, dim: int, hidden_size: int | None, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_size, bias=bias) if hidden_size is not None else None
        self.score = nn.Linear(dim if hidden_size is None else hidden_size, 1, bias=bias)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Map (…, D) to (…), in the wide format of `scale` (…, 1), which is what `inverse_root_mean_square` makes of x.

        A network's first product is computed in the input's own format. Scaling what comes out of it needs no copy.
        """
        wide = scale.dtype
        if self.up is None:
            return (_linear(x.to(wide), self.score.weight) * scale).squeeze(-1)
        h = F.linear(x, self.up.weight).to(wide) * scale
        if self.up.bias is not None:
            h = h + self.up.bias.to(wide)
        return _linear(F.silu(h), self.score.weight, self.score.bias).squeeze(-1)

    def infer(self, x: Tensor) -> Tensor:
        """Return the same without gradients, (…,), in the format of x up to the result, which is fp32 or wider.

        A text that is written token by token pays for every operation.
        """
        h = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
        if self.up is not None:
            h = F.silu(self.up(h))
        return self.score(h).squeeze(-1).to(torch.promote_types(x.dtype, torch.float32))  # type: ignore[no-any-return]


def inverse_root_mean_square(x: Tensor) -> Tensor:
    """Map (…, D) to (…, 1), in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale: Tensor = (norm.square() / x.shape[-1] + EPSILON).rsqrt()
    return scale


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
