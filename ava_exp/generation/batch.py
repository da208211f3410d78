"""Prompts as one batch: checked, padded at the right, read once, and then continued row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.generation import GenerationSettings, faults_of
from ava_exp.config.rules import BOUNDS
from ava_exp.errors import ConfigError, UserError, must_be
from ava_exp.models.decoder import Decoder
from ava_exp.nn.attention.cache import KeyValueCache


def check_settings(settings: GenerationSettings) -> None:
    """Raise ConfigError for the first setting that is out of bounds, or does not go with another."""
    for bound in BOUNDS:
        for key in bound.keys:
            section, _, name = key.partition(".")
            if section == "stage" and hasattr(settings, name) and not bound.holds(getattr(settings, name)):
                raise ConfigError(must_be(name, bound.expected, getattr(settings, name)))
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


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Switch to evaluation, and afterwards back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def room_for(model: Decoder, prompt: Sequence[int], settings: GenerationSettings) -> int:
    """Return how many tokens can follow a prompt: as many as are asked for, up to the model's last position."""
    return min(settings.max_new_tokens, model.config.max_position_embeddings - len(prompt))


def read_prompts(model: Decoder, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, KeyValueCache]:
    """Return what follows each of P prompts, logits (P, V) in fp32, and a cache that holds them.

    Shorter prompts are padded at the right, where causal attention keeps the padding out of sight.
    """
    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids_PT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    cache = model.new_cache(batch_size=len(prompts), capacity=capacity)
    if min(lengths) == longest:
        return model(ids_PT, cache).last_logits.float(), cache
    counts_P = torch.tensor(lengths, device=device)
    output = model(ids_PT, cache, counts_B=counts_P)
    last_PD = output.hidden[torch.arange(len(prompts), device=device), counts_P - 1]
    return F.linear(last_PD, output.head).float(), cache
