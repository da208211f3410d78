"""`generate`: continuations of prompts, whichever way they are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ava_exp.config.generation import GenerationSettings
from ava_exp.generation.beam import beam_search
from ava_exp.generation.sampling import decode
from ava_exp.models.decoder import Decoder


@dataclass(slots=True)
class Continuation:
    """New tokens, without the one that ends a document. Beams have a score: log-probability, made up for length."""

    ids: list[int]
    score: float | None = None


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | None = None,
    *,
    stop_id: int | None = None,
) -> list[list[Continuation]]:
    """Return `num_samples` continuations of each prompt, a sequence of token ids; the best ones first for beams.

    All prompts are one batch. Each continuation ends by itself: at `stop_id`, after `max_new_tokens`, or at the
    model's last position.

    Raises:
        UserError: a prompt is empty, too long or not made of the model's tokens; as ConfigError, settings are out of
            bounds.
    """
    settings = settings or GenerationSettings()
    if not prompts:
        return []
    if settings.num_beams > 1:
        found = beam_search(model, prompts, settings, stop_id)
        return [[Continuation(h.ids, h.score) for h in best[: settings.num_samples]] for best in found]
    number = settings.num_samples
    continuations = [[Continuation([]) for _ in range(number)] for _ in prompts]
    for step in decode(model, prompts, settings, stop_id):
        for sequence, token in step:
            continuations[sequence // number][sequence % number].ids.append(token)
    return continuations
