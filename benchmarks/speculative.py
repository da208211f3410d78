"""Tokens per second of plain and of speculative greedy decoding, batch 1, by confidence threshold.

    python benchmarks/speculative.py [--minutes 15] [--prompts 8] [--run NAME] [--figure FILE]

Trains `experiment=speculative` (dense, 30 M parameters) and `experiment=speculative_moe` (as many active) on the
embedded text for so many minutes each, unless they have been; `--run` takes a run that is there instead. Prompts are
held-out text. Plain and speculative decoding take turns, prompt by prompt.

The output is checked: in fp32 both must write the same. In the run's own 16-bit format they may part at a near tie,
which then has to be one: the two logits less than `TIE` of the largest apart. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from ava_exp.config.compose import compose
from ava_exp.generation.sampling import sample_tokens
from ava_exp.generation.speculative import SpeculationStatistics, speculate_tokens
from ava_exp.models.decoder import Decoder
from ava_exp.stages.trained import TrainedRun, open_trained_run
from ava_exp.tracking.figures import STYLE
from ava_exp.tracking.plotting import BLUE, ORANGE

EXPERIMENTS = ("speculative", "speculative_moe")
FOLDERS = ["output_dir=outputs/speculative", "cache_dir=outputs/cache"]
TIE = 0.02
"""Of the largest logit: two and a half times what bf16 was seen to differ by between one row and several."""


@dataclass(slots=True)
class Total:
    """Sums over prompts."""

    seconds: float = 0.0
    tokens: int = 0
    forwards: int = 0
    num_parted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, statistics: SpeculationStatistics) -> None:
        self.forwards += statistics.num_forwards
        for sums, counts in ((self.drafted, statistics.drafted), (self.accepted, statistics.accepted)):
            sums[:] = [a + b for a, b in zip(sums or [0] * len(counts), counts, strict=True)]


def train(experiment: str, minutes: float, overrides: list[str]) -> None:
    """Train, or go on with the training, until it has had so many minutes; a finished run is left as it is."""
    command = [sys.executable, "-m", "ava_exp", f"experiment={experiment}", f"budget.seconds={60 * minutes:g}"]
    command += ["tracker=none", *FOLDERS, *overrides]
    subprocess.run(command, check=True)


def open_run(experiment: str, run: str | None, overrides: list[str]) -> TrainedRun:
    return open_trained_run(compose([f"experiment={experiment}", *FOLDERS, *overrides]), run)


def prompts_of(run: TrainedRun, number: int, length: int) -> list[list[int]]:
    """Return so many pieces of the validation split, spread evenly."""
    text = run.data.validation
    stride = (text.num_tokens - length) // number
    return [text.tokens(start, start + length).tolist() for start in range(0, number * stride, stride)]


def timed(generation: Iterable[int]) -> tuple[list[int], float]:
    started = time.perf_counter()
    tokens = list(generation)
    return tokens, time.perf_counter() - started


@torch.inference_mode()
def parted_at_a_tie(model: Decoder, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Return whether two outputs are different. Fails unless the first difference is a near tie."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if place is None:
        return False
    logits = model(torch.tensor([[*prompt, *one[:place]]])).last_logits[0].float()
    gap = (logits[one[place]] - logits[other[place]]).abs().item()
    assert gap <= TIE * logits.abs().max().item(), f"the outputs part at token {place}, the logits by {gap:.3g}"
    return True


def check_in_fp32(run: TrainedRun, prompts: list[list[int]], num_tokens: int) -> None:
    """Fail unless both write the same in fp32."""
    model = copy.deepcopy(run.model).float()
    for prompt in prompts:
        plain = list(sample_tokens(model, prompt, max_new_tokens=num_tokens, temperature=0))
        for threshold in (0.0, 0.5):
            ours = speculate_tokens(
                model, prompt, max_new_tokens=num_tokens, temperature=0, confidence_threshold=threshold
            )
            assert list(ours) == plain, "speculative decoding wrote another text"


def measure(
    model: Decoder, prompts: list[list[int]], num_tokens: int, thresholds: list[float]
) -> tuple[Total, dict[float, Total]]:
    """Decode every prompt plainly and at every threshold, in turns."""
    plain, by_threshold = Total(), {threshold: Total() for threshold in thresholds}
    for prompt in prompts:
        expected, seconds = timed(sample_tokens(model, prompt, max_new_tokens=num_tokens, temperature=0))
        plain.seconds, plain.tokens = plain.seconds + seconds, plain.tokens + len(expected)
        for threshold, total in by_threshold.items():
            statistics = SpeculationStatistics()
            generation = speculate_tokens(
                model,
                prompt,
                max_new_tokens=num_tokens,
                temperature=0,
                confidence_threshold=threshold,
                statistics=statistics,
            )
            tokens, seconds = timed(generation)
            total.seconds, total.tokens = total.seconds + seconds, total.tokens + len(tokens)
            total.num_parted += parted_at_a_tie(model, prompt, expected, tokens)
            total.add(statistics)
    return plain, by_threshold


def table(plain: Total, by_threshold: dict[float, Total], num_prompts: int) -> str:
    """Return Markdown."""
    names = ["threshold", "tokens/s", "× plain", "tokens a pass", "drafts accepted", "by head", "parted at a tie"]
    rate = plain.tokens / plain.seconds
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| plain | {rate:.1f} | 1 | 1 | | | |"]
    for threshold, total in by_threshold.items():
        own = total.tokens / total.seconds
        by_head = ", ".join(f"{a / max(1, d):.0%}" for a, d in zip(total.accepted, total.drafted, strict=True))
        cells = [
            f"{threshold:g}",
            f"{own:.1f}",
            f"{own / rate:.2f}",
            f"{(total.forwards + sum(total.accepted)) / total.forwards:.2f}",
            f"{sum(total.accepted) / max(1, sum(total.drafted)):.0%} of {sum(total.drafted)}",
            by_head,
            f"{total.num_parted} of {num_prompts}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, tuple[Total, dict[float, Total]]], path: Path) -> None:
    """Speed against plain decoding, and the share of each head's drafts that is accepted, by threshold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speed, acceptance = figure.subplots(1, 2)
        for color, (name, (plain, by_threshold)) in zip((BLUE, ORANGE), found.items(), strict=False):
            times = [total.tokens / total.seconds * plain.seconds / plain.tokens for total in by_threshold.values()]
            speed.plot(list(by_threshold), times, color=color, marker="o", markersize=4, label=name)
            for head, line in enumerate(("-", "--", ":")):
                shares = [total.accepted[head] / max(1, total.drafted[head]) for total in by_threshold.values()]
                label = f"{name}, head {head + 1}"
                acceptance.plot(list(by_threshold), shares, line, color=color, marker="o", markersize=3, label=label)
        speed.axhline(1, color="grey", linewidth=0.8)
        speed.set(xlabel="confidence threshold", ylabel="tokens/s, plain decoding is 1")
        acceptance.set(xlabel="confidence threshold", ylabel="share of drafts accepted", ylim=(0, 1.02))
        for axis in (speed, acceptance):
            axis.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--check-tokens", type=int, default=64, help="so many are compared in fp32")
    parser.add_argument("--thresholds", default="0,0.05,0.1,0.2,0.4,0.6")
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    parser.add_argument("--run", help="a run to measure instead of training any")
    parser.add_argument("overrides", nargs="*", help="changes to the trainings, as `model.num_layers=4`")
    options = parser.parse_args()
    thresholds = [float(threshold) for threshold in options.thresholds.split(",")]
    found = {}
    for experiment in ["speculative"] if options.run else options.experiments.split(","):
        if options.run is None:
            train(experiment, options.minutes, options.overrides)
        run = open_run(experiment, options.run, options.overrides)
        prompts = prompts_of(run, options.prompts, options.prompt_tokens)
        check_in_fp32(run, prompts, options.check_tokens)
        measure(run.model, prompts[:1], 16, thresholds)  # warms up
        plain, by_threshold = found[run.config.name] = measure(run.model, prompts, options.new_tokens, thresholds)
        print(f"\n{run.folder.root.name}, step {run.step}, {run.model.embedding.weight.dtype}, ", end="")
        print(f"{torch.get_num_threads()} threads\n\n{table(plain, by_threshold, len(prompts))}", flush=True)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
