"""Prompts as one batch: checked, padded at the right, read once, and then continued row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.bounds import BOUNDS
from ava_exp.config.generation import GenerationSettings, faults_of
from ava_exp.errors import ConfigError, UserError, must_be
from ava_exp.models.decoder import Decoder
from ava_exp.nn.attention.cache import KeyValueCache
from ava_exp.nn.packed import PackedProduct, packed


def check_settings(settings: GenerationSettings) -> None:
    """Raise ConfigError for the first setting that is out of bounds, or does not go with another."""
    for bound in BOUNDS:
        for key in bound.keys:
            section, _, name = key.partition(".")
            value = getattr(settings, name, None) if section == "stage" else None
            if value is not None and not bound.holds(value):
                raise ConfigError(must_be(name, bound.expected, value))
    for name, expected, value in faults_of(settings):
        raise ConfigError(must_be(name, expected, value))


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError for a prompt that is empty, leaves no position to write at, or has an id that is no token."""
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            raise UserError(must_be("prompt", f"between 1 and {limit - 1} tokens", len(prompt)))
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(must_be("prompt", f"of token ids from 0 to {vocab_size - 1}", wrong))


FEW_TOKENS = 12
"""Up to here, laying weights out anew takes longer than it saves."""


@contextmanager
def prepared(model: Decoder, max_new_tokens: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Make a model ready to generate, and afterwards again what it was: in evaluation, with packed weights where that
    pays. Yields what turns hidden states (…, D) into logits (…, V) in fp32."""
    was_training = model.training
    model.eval()
    try:
        with packed(model, wanted=max_new_tokens > FEW_TOKENS) as is_packed:
            yield _head_of(model, is_packed)
    finally:
        model.train(was_training)


def _head_of(model: Decoder, is_packed: bool) -> Callable[[Tensor], Tensor]:
    product: Callable[[Tensor], Tensor]
    if model.head is not None:
        product = model.head
    elif is_packed:
        product = PackedProduct(model.embedding.weight)
    else:
        product = partial(F.linear, weight=model.embedding.weight)
    return lambda hidden: product(hidden).float()


def room_for(model: Decoder, prompt: Sequence[int], settings: GenerationSettings) -> int:
    """Return how many tokens can follow a prompt: as many as are asked for, up to the model's last position."""
    return min(settings.max_new_tokens, model.config.max_position_embeddings - len(prompt))


def read_prompts(model: Decoder, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, KeyValueCache]:
    """Return the last hidden state of each of P prompts, (P, D), and a cache that holds them.

    Shorter prompts are padded at the right, where causal attention keeps the padding out of sight.
    """
    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids_PT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    cache = model.new_cache(batch_size=len(prompts), capacity=capacity)
    if min(lengths) == longest:
        return model(ids_PT, cache).hidden[:, -1], cache
    counts_P = torch.tensor(lengths, device=device)
    hidden_PTD = model(ids_PT, cache, counts_B=counts_P).hidden
    return hidden_PTD[torch.arange(len(prompts), device=device), counts_P - 1], cache
