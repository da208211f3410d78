"""Loss per token, per FLOP and per second at equal active FLOPs: real trainings, several seeds each.

    python benchmarks/comparison.py routers [--steps 300] [--seeds 0,1,2] [--figure docs/images/routers.png]
    python benchmarks/comparison.py architectures --seconds 45

Every training is a point of one `-m` sweep over `experiment=equal_flops_…`, seeds outermost, so that all take turns.
With `--steps` all train on the same tokens, which at equal active FLOPs cost the same FLOPs. With `--seconds` every
run gets as many steps as its own speed makes of that time, and its schedule ends there.
Seconds are of training steps alone. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.figure import Figure

from ava_exp.config.identity import from_plain
from ava_exp.models.arithmetic import count_parameters, training_flops_per_token
from ava_exp.tracking.experts import expert_summary
from ava_exp.tracking.figures import STYLE
from ava_exp.tracking.metrics import of_kind, read_metrics

EXPERIMENTS = {
    "routers": ("dense", "topk", "switch", "deepseek", "sinkhorn", "expert_choice"),
    "architectures": ("dense", "topk", "mod", "hybrid", "multi_level", "mixture_of_heads", "multi_token"),
}
EVALUATION_TOKENS = 30_000
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Training:
    """One run: validation loss (nats per token) at its evaluations, after so many tokens, FLOPs and seconds."""

    name: str
    loss: Values
    tokens: Values
    flops: Values
    seconds: Values
    bits_per_byte: float
    gini: float | None
    active: int
    total: int


def train(experiments: Sequence[str], seeds: str, budget: str, folder: Path) -> None:
    """Run what is not there yet: a second call goes on."""
    points = ",".join(f"equal_flops_{name}" for name in experiments)
    command = [sys.executable, "-m", "ava_exp", "-m", f"seed={seeds}", f"experiment={points}", budget, "tracker=none"]
    command += [f"output_dir={folder}", "cache_dir=outputs/cache", "evaluation.sample_tokens=8"]
    command += [f"evaluation.max_tokens={EVALUATION_TOKENS}", "checkpoint.save_every_n_batches=1000000"]
    subprocess.run(command, check=True)


def read(folder: Path) -> Training:
    config = from_plain(yaml.safe_load((folder / "config.yaml").read_text()))
    records = read_metrics(folder / "metrics.jsonl")
    steps = {record["step"]: record for record in of_kind(records, "train")}
    evaluations = of_kind(records, "eval")
    tokens = np.array([steps[record["step"]]["tokens"] for record in evaluations], dtype=float)
    parameters, last = count_parameters(config.architecture), steps[evaluations[-1]["step"]]
    loads = last.get("expert_load")
    return Training(
        name=config.name,
        loss=np.array([record["loss"] for record in evaluations]),
        tokens=tokens,
        flops=tokens * training_flops_per_token(config.architecture, config.data.sequence_length),
        seconds=np.array([steps[record["step"]]["elapsed_s"] for record in evaluations]),
        bits_per_byte=evaluations[-1]["bits_per_byte"],
        gini=statistics.mean(expert_summary(load)["gini"] for load in loads) if loads else None,
        active=parameters.active,
        total=parameters.total,
    )


def table(groups: dict[str, list[Training]]) -> str:
    """Return Markdown: means over seeds, ± the standard deviation."""
    names = ["experiment", "seeds", "parameters (active)", "loss at the end", "bits per byte", "10³ tokens"]
    names += ["10¹² FLOPs", "seconds", "Gini"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, group in groups.items():
        ginis = [t.gini for t in group if t.gini is not None]
        cells = [
            name,
            str(len(group)),
            f"{group[0].total / 1e6:.1f} M ({group[0].active / 1e6:.1f} M)",
            spread([float(t.loss[-1]) for t in group], 3),
            spread([t.bits_per_byte for t in group], 3),
            f"{statistics.mean(float(t.tokens[-1]) for t in group) / 1e3:.0f}",
            f"{statistics.mean(float(t.flops[-1]) for t in group) / 1e12:.1f}",
            spread([float(t.seconds[-1]) for t in group], 1),
            f"{statistics.mean(ginis):.2f}" if ginis else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], decimals: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{decimals}f} ± {deviation:.{decimals}f}"


def draw(groups: dict[str, list[Training]], title: str, path: Path) -> None:
    """Validation loss against tokens, FLOPs and seconds: the mean of the seeds, and their range."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        panels = (
            ("tokens", 1e3, "thousand tokens"),
            ("flops", 1e12, "training FLOPs (10¹²)"),
            ("seconds", 1, "seconds"),
        )
        for axis, (field, unit, label) in zip(axes, panels, strict=True):
            for number, (name, group) in enumerate(groups.items()):
                colour = matplotlib.colormaps["tab10"](number)
                num_evaluations = min(len(t.loss) for t in group)
                x = np.mean([getattr(t, field)[:num_evaluations] for t in group], axis=0) / unit
                losses = np.array([t.loss[:num_evaluations] for t in group])
                # The first evaluations are far above, and would hide the differences.
                shown = slice(len(x) // 4, None)
                axis.plot(x[shown], losses.mean(axis=0)[shown], color=colour, label=name)
                axis.fill_between(
                    x[shown], losses.min(axis=0)[shown], losses.max(axis=0)[shown], color=colour, alpha=0.15
                )
            axis.set_xlabel(label)
        axes[0].set_ylabel("validation loss (nats per token)")
        axes[0].set_title(title)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", choices=EXPERIMENTS)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, default=300)
    budget.add_argument("--seconds", type=float)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    limit = f"seconds={arguments.seconds}" if arguments.seconds else f"steps={arguments.steps}"
    folder = Path(f"outputs/comparison_{arguments.experiments}_{limit.replace('=', '_')}")
    train(EXPERIMENTS[arguments.experiments], arguments.seeds, f"budget.{limit}", folder)
    trainings = [read(path) for path in sorted((folder / "runs").iterdir()) if is_finished(path)]
    groups = {name: [t for t in trainings if t.name == name] for name in EXPERIMENTS[arguments.experiments]}
    print(table(groups))
    figure = arguments.figure or folder / "comparison.png"
    per = "seconds of training" if arguments.seconds else "tokens"
    draw(groups, f"{arguments.experiments.capitalize()} of equal active FLOPs, after equal {per}", figure)
    print(f"figure: {figure}")


def is_finished(path: Path) -> bool:
    status = json.loads((path / "status.json").read_text()) if (path / "status.json").exists() else {}
    return bool(status.get("status") == "finished")


if __name__ == "__main__":
    main()
