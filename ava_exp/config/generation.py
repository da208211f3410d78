"""How text is generated: for the stage and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class GenerationSettings:
    """Sampling, greedy search (`temperature` 0) or beam search (`num_beams` above 1)."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    """0 forbids nothing."""
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_samples: int = 1
    """Continuations of each prompt."""
    generation_seed: int = 0


def faults_of(settings: GenerationSettings) -> Iterator[tuple[str, str, object]]:
    """Yield (field, what it must be, what it is) for what does not go together."""
    if settings.num_beams > 1 and settings.temperature != 0:
        yield (
            "temperature",
            f"0 with {settings.num_beams} beams, which are searched and not sampled",
            settings.temperature,
        )
    elif settings.num_beams > 1 and settings.num_samples > settings.num_beams:
        yield "num_samples", f"at most the {settings.num_beams} beams", settings.num_samples
    elif settings.num_beams == 1 and settings.temperature == 0 and settings.num_samples > 1:
        yield "num_samples", "1 at temperature 0, which always writes the same", settings.num_samples
