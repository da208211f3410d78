"""Continue prompts with a trained run; a single sequence is streamed to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ava_exp.config.prediction import MultiTokenConfig, PredictionConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import GenerateConfig
from ava_exp.errors import EXIT_OK, UserError, must_be
from ava_exp.generation.batch import check_prompts
from ava_exp.generation.generate import generate
from ava_exp.generation.sampling import stream
from ava_exp.generation.speculative import SpeculationStatistics, speculate_tokens
from ava_exp.stages.trained import TrainedRun, open_trained_run
from ava_exp.tokenizer.tokenizer import Tokenizer

MAX_FILE_BYTES = 2**20


def run(config: RunConfig) -> int:
    """Print every prompt and its continuations, a single one as it is written. Return the exit code."""
    settings = config.stage
    assert isinstance(settings, GenerateConfig)
    prompts = [settings.prompt] if settings.prompt_file is None else read_lines(Path(settings.prompt_file))
    trained = open_trained_run(config, settings.run)
    tokenizer = trained.data.tokenizer
    ids = [tokenizer.encode(prompt) or [tokenizer.end_of_document_id] for prompt in prompts]
    started = time.perf_counter()
    if len(prompts) == settings.num_samples == settings.num_beams == 1:
        num_tokens = _stream(trained, prompts[0], ids[0], settings)
    else:
        num_tokens = _print_all(trained, prompts, ids, settings)
    _tell_rate(num_tokens, time.perf_counter() - started)
    return EXIT_OK


def read_lines(path: Path) -> list[str]:
    """Return the prompts of a file, one a line. Raises UserError if there are none, or it cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise UserError(must_be("stage.prompt_file", f"at most {MAX_FILE_BYTES} bytes long", str(path)))
        lines = raw.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts {str(path)!r} cannot be read: {error}.") from error
    if not lines:
        raise UserError(must_be("stage.prompt_file", "a file with a prompt on each line", str(path)))
    return lines


class Writer:
    """Prints a text as its tokens come. A character of several bytes may be split between tokens: it waits until it is
    whole, or until `finish`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        """Print what a token adds."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def finish(self) -> None:
        """Print what is left, and end the line."""
        print(self.tokenizer.decode(self.ids)[len(self.shown) :], flush=True)


def _stream(trained: TrainedRun, prompt: str, ids: list[int], settings: GenerateConfig) -> int:
    """Print one continuation as it is written, and return the number of its tokens. Ctrl-C leaves what was written."""
    tokenizer = trained.data.tokenizer
    check_prompts(trained.model, [ids])  # before anything is printed
    writer = Writer(tokenizer)
    print(prompt, end="", flush=True)
    statistics = SpeculationStatistics()
    try:
        for token in _tokens(trained, ids, settings, statistics):
            writer.add(token)
    finally:
        writer.finish()
    if settings.speculative:
        print(statistics, file=sys.stderr)
    return len(writer.ids)


def _tokens(
    trained: TrainedRun, ids: list[int], settings: GenerateConfig, statistics: SpeculationStatistics
) -> Iterator[int]:
    """Return the tokens of one continuation, in turn; `statistics` tell what became of drafts."""
    stop_id = trained.data.tokenizer.end_of_document_id
    if not settings.speculative:
        return stream(trained.model, ids, settings, stop_id=stop_id)
    return speculate_tokens(
        trained.model,
        ids,
        max_new_tokens=settings.max_new_tokens,
        confidence_threshold=confidence_threshold(settings, trained.config.prediction),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.generation_seed,
        stop_id=stop_id,
        statistics=statistics,
    )


def _print_all(trained: TrainedRun, prompts: list[str], ids: list[list[int]], settings: GenerateConfig) -> int:
    """Print all continuations under headings, and return the number of their tokens."""
    tokenizer = trained.data.tokenizer
    found = generate(trained.model, ids, settings, stop_id=tokenizer.end_of_document_id)
    for number, (prompt, continuations) in enumerate(zip(prompts, found, strict=True), start=1):
        for sample, continuation in enumerate(continuations, start=1):
            score = "" if continuation.score is None else f", score {continuation.score:.3f}"
            print(f"── prompt {number}, continuation {sample}{score}")
            print(prompt + tokenizer.decode(continuation.ids), flush=True)
    return sum(len(continuation.ids) for continuations in found for continuation in continuations)


def _tell_rate(num_tokens: int, seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def confidence_threshold(settings: GenerateConfig, prediction: PredictionConfig) -> float:
    """Return how sure a prediction head must be to draft: what the stage says, else what the run was made for."""
    if settings.confidence_threshold is not None:
        return settings.confidence_threshold
    return prediction.confidence_threshold if isinstance(prediction, MultiTokenConfig) else 0.0
