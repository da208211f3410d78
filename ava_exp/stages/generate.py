"""Continue a prompt with a trained run, streamed to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

from ava_exp.config.prediction import MultiTokenConfig, PredictionConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import GenerateConfig
from ava_exp.errors import EXIT_OK
from ava_exp.generation.sampling import sample_tokens
from ava_exp.generation.speculative import SpeculationStatistics, speculate_tokens
from ava_exp.stages.trained import open_trained_run


def run(config: RunConfig) -> int:
    """Print the prompt and its continuation as it is sampled. Return the exit code."""
    settings = config.stage
    assert isinstance(settings, GenerateConfig)
    trained = open_trained_run(config, settings.run)
    tokenizer = trained.data.tokenizer
    new_ids: list[int] = []
    shown = ""
    print(settings.prompt, end="", flush=True)
    statistics = SpeculationStatistics()
    generate: Callable[..., Iterator[int]] = sample_tokens
    if settings.speculative:
        threshold = confidence_threshold(settings, trained.config.prediction)
        generate = partial(speculate_tokens, confidence_threshold=threshold, statistics=statistics)
    for token in generate(
        trained.model,
        tokenizer.encode(settings.prompt) or [tokenizer.end_of_document_id],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.generation_seed,
        stop_id=tokenizer.end_of_document_id,
    ):
        new_ids.append(token)
        text = tokenizer.decode(new_ids)
        # A character of several bytes may be split between tokens: wait until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(new_ids)[len(shown) :])
    if settings.speculative:
        print(statistics, file=sys.stderr)
    return EXIT_OK


def confidence_threshold(settings: GenerateConfig, prediction: PredictionConfig) -> float:
    """Return how sure a prediction head must be to draft: what the stage says, else what the run was made for."""
    if settings.confidence_threshold is not None:
        return settings.confidence_threshold
    return prediction.confidence_threshold if isinstance(prediction, MultiTokenConfig) else 0.0
