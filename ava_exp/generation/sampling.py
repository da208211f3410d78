"""Sampling and greedy search: one token for every sequence at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ava_exp.config.generation import GenerationSettings
from ava_exp.generation.batch import check_prompts, check_settings, prepared, read_prompts, room_for
from ava_exp.generation.history import History
from ava_exp.models.decoder import Decoder

SEED_STEP = 1_000_003
"""Between the seeds of a prompt's samples; the first has the seed itself."""


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


def pick(scores_RV: Tensor, settings: GenerationSettings, generators: Sequence[torch.Generator]) -> Tensor:
    """Return a token for each of R sequences, (R,): the best at temperature 0, else a draw of its own generator.

    A draw is the first to come of exponential races, which is what `torch.multinomial` does for one row.
    """
    if settings.temperature == 0:
        return scores_RV.argmax(dim=-1)
    kept = filter_logits(scores_RV, settings.temperature, settings.top_k, settings.top_p)
    probabilities_RV = kept.softmax(dim=-1)
    races_RV = torch.empty_like(probabilities_RV)
    for race_V, generator in zip(races_RV, generators, strict=True):
        race_V.exponential_(generator=generator)
    return (probabilities_RV / races_RV).argmax(dim=-1)


@torch.inference_mode()
def decode(
    model: Decoder, prompts: Sequence[Sequence[int]], settings: GenerationSettings, stop_id: int | None
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, the new token of each sequence that is not at its end: (sequence, token).

    The samples of a prompt stand next to each other. What a sequence becomes depends on its prompt, the seed and the
    sample's number, and on nothing else in the batch; one that ends leaves the batch. `stop_id` is not yielded.
    """
    check_settings(settings)
    check_prompts(model, prompts)
    device, num_samples = model.embedding.weight.device, settings.num_samples
    with prepared(model, settings.max_new_tokens) as head:
        rooms = [room_for(model, prompt, settings) for prompt in prompts for _ in range(num_samples)]
        capacity = max(len(prompt) + room_for(model, prompt, settings) for prompt in prompts)
        last_RD, cache = read_prompts(model, prompts, capacity)
        logits_RV = head(last_RD)
        history = History(prompts, logits_RV.shape[1], settings, device)
        sequences = list(range(len(rooms)))
        if num_samples > 1:
            rows = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
            logits_RV = logits_RV[rows]
            cache.select(rows)
            history.select(rows)
        seeds = [settings.generation_seed + SEED_STEP * (sequence % num_samples) for sequence in sequences]
        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        for step in range(1, max(rooms) + 1):
            tokens_R = pick(history.penalize(logits_RV), settings, [generators[s] for s in sequences])
            new = list(zip(sequences, tokens_R.tolist(), strict=True))
            yield [(sequence, token) for sequence, token in new if token != stop_id]
            going = [row for row, (sequence, token) in enumerate(new) if token != stop_id and step < rooms[sequence]]
            if not going:
                return
            history.append(tokens_R)
            if len(going) < len(new):
                rows = torch.tensor(going, device=device)
                sequences, tokens_R = [sequences[row] for row in going], tokens_R[rows]
                cache.select(rows)
                history.select(rows)
            logits_RV = head(model(tokens_R[:, None], cache).hidden[:, -1])


def sample_tokens(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield new token ids until `stop_id`, `max_new_tokens` or the model's last position. Temperature 0 is greedy.

    Raises UserError for an empty or too long prompt.
    """
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        generation_seed=seed,
    )
    return stream(model, prompt_ids, settings, stop_id=stop_id)


def stream(
    model: Decoder, prompt_ids: Sequence[int], settings: GenerationSettings, *, stop_id: int | None = None
) -> Iterator[int]:
    """Yield the tokens of one sequence as they are written. Raises UserError as `generate` does."""
    for step in decode(model, [prompt_ids], settings, stop_id):
        yield from (token for _, token in step)
