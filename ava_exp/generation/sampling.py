"""Sampling from a decoder, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ava_exp.errors import UserError, must_be
from ava_exp.models.decoder import Decoder


def filter_logits(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Divide by the temperature and rule tokens out with -inf: all but the `top_k` best (0 keeps all), then all beyond
    the smallest set whose probability reaches `top_p` [holtzman2020nucleus] §3.1. The best token always stays.
    """
    logits = logits_BV / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    return logits


@torch.inference_mode()
def sample_tokens(
    model: Decoder,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield new token ids until `stop_id`, `max_new_tokens` or the model's last position. Temperature 0 is greedy.

    Raises UserError for an empty or too long prompt.
    """
    limit = model.config.max_position_embeddings
    if not 0 < len(prompt_ids) < limit:
        raise UserError(must_be("prompt", f"between 1 and {limit - 1} tokens", len(prompt_ids)))
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    was_training = model.training
    model.eval()
    cache = model.new_cache(batch_size=1, capacity=min(limit, len(prompt_ids) + max_new_tokens))
    ids = torch.tensor([prompt_ids], device=device)
    for _ in range(min(max_new_tokens, limit - len(prompt_ids))):
        logits = model(ids, cache).last_logits.float()
        if temperature == 0:
            ids = logits.argmax(dim=-1, keepdim=True)
        else:
            probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)
            ids = torch.multinomial(probabilities, 1, generator=generator)
        token = int(ids)
        if token == stop_id:
            break
        yield token
    model.train(was_training)
