"""Heads that predict the tokens after the next one, each from what the one before it knew and the token since."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ava_exp.config.model import ModelConfig
from ava_exp.config.prediction import MultiTokenConfig, PredictionConfig
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.norm import build_norm


class PredictionHead(nn.Module):
    """One link of the chain: it turns a hidden state that predicts a token into one that predicts the token after it.

    The token itself is known by then: its embedding comes in. As in [ankner2024hydra] §3 heads see the tokens since the
    trunk's state, other than in [cai2024medusa]; as in [deepseek2024v3] §2.2 state and embedding are normed, joined and
    projected. Two deviations from the latter: a feed-forward network takes the place of its transformer block, so that
    there are no keys and values to keep and a draft costs little; and the state comes in after the last norm, so that
    it is not normed again.
    """

    def __init__(self, model: ModelConfig, width: int) -> None:
        super().__init__()
        dim = model.hidden_size
        self.embedding_norm = build_norm(model.norm, dim, model.norm_epsilon)
        self.projection = nn.Linear(2 * dim, dim, bias=False)
        self.feed_forward_norm = build_norm(model.norm, dim, model.norm_epsilon)
        self.feed_forward = FeedForward(dim, width, model.activation, mixed_activations=model.mixed_activations)
        self.output_norm = build_norm(model.norm, dim, model.norm_epsilon)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Map two (…, D), a state and the embedding of the token it was to predict, to the next state (…, D)."""
        x = self.projection(torch.cat((hidden, self.embedding_norm(embedding)), dim=-1))
        return self.output_norm(x + self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


def build_prediction_heads(model: ModelConfig, prediction: PredictionConfig) -> nn.ModuleList:
    """Return the heads that `prediction` asks for: none where it asks for the next token alone."""
    if not isinstance(prediction, MultiTokenConfig):
        return nn.ModuleList()
    width = prediction.head_width or model.hidden_size
    return nn.ModuleList(PredictionHead(model, width) for _ in range(prediction.num_prediction_heads))
