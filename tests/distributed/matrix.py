"""Every back end, number of ranks and accumulation against one process on the same global batches, and the table of
`docs/distributed.md` that tells how far they are from each other.

Whoever changes how ranks train together writes the table anew:

    python -m tests.distributed.matrix
"""

from __future__ import annotations

import fcntl
import functools
import operator
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ava_exp.config.distributed import Backend
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from tests.distributed.group import Command, Ended, run_in_group
from tests.faults.harness import Experiment
from tests.golden.pages import filled, markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"

TIMEOUT_S = 1000.0
NUM_STEPS = 8
NUM_SEQUENCES = 8
"""Of a step, over all ranks and micro-batches."""
ACCUMULATIONS = (1, 2)
FP32, BF16, NARROW = (f"precision.training={name}" for name in ("fp32", "mixed_bf16", "bf16"))
ROUNDED_BY_CHANCE = f"{NARROW} precision.stochastic_rounding=true"
EXPERTS = ("sparsity=moe", "router=topk", "model.num_experts=16", "sparsity.router.moe_top_k=1")
"""More of them than a rank's tokens use: there are always some that one rank's tokens chose and another's did not."""
DEPTH = ("mod=learned", "mod.layers=alternating")
"""Not in the first layer, where tokens that are the same have the same score: rounding would choose among them."""
KINDS: dict[str, tuple[str, ...]] = {
    "dense": ("sparsity=dense",),
    "experts": EXPERTS,
    "depth": ("sparsity=dense", *DEPTH),
    "experts and depth": (*EXPERTS, *DEPTH),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "three experts": ("sparsity=moe", "router=topk", "model.num_experts=3"),
    "deepseek": ("sparsity=moe", "router=deepseek"),
    "mixture of heads": (
        "sparsity=dense",
        "attention=mixture_of_heads",
        "attention.num_shared_heads=1",
        "attention.heads_per_token=1",
    ),
    "multi-token": ("sparsity=moe", "prediction=multi_token", "loss=label_smoothing"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A back end, its number of ranks, and how many of them divide the experts."""

    backend: Backend
    num_ranks: int
    expert_parallel: int = 1

    def __str__(self) -> str:
        divided = f", `expert_parallel={self.expert_parallel}`" if self.expert_parallel > 1 else ""
        return f"`{self.backend.value}`{divided}"


ALONE = Row(Backend.single, 1)
HEADER = ("`distributed=`", "ranks", "accumulation", *KINDS, "others", "`mixed_bf16`")


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest that was seen: of losses and gradient norms, relative, and of any weight, absolute; and of a share
    of the tokens that an expert, a head or a layer got."""

    numbers: float = 0.0
    weights: float = 0.0
    shares: float = 0.0

    def __str__(self) -> str:
        return ", ".join(
            f"{value:.0e}".replace("e-0", "e-") if value else "0" for value in (self.numbers, self.weights)
        )

    def is_within(self, bound: Difference) -> bool:
        """Whether it is nowhere larger than `bound`."""
        return self | bound == bound

    def __or__(self, other: Difference) -> Difference:
        """Return the larger of each."""
        return Difference(
            max(self.numbers, other.numbers), max(self.weights, other.weights), max(self.shares, other.shares)
        )


IN_FP32 = Difference(2**-19, 1e-5, 0.02)
"""Sixteen units in the last place; and a near tie may be decided the other way."""
IN_MIXED = Difference(0.02, 0.015, 1.0)
IN_BF16 = Difference(0.02, 5 * 2**-7, 1.0)
"""Weights near one have steps of 2⁻⁷."""


@dataclass(frozen=True, slots=True)
class Training:
    """One that is compared. The same one is trained by one process and by ranks."""

    kind: str
    accumulation: int
    precision: str = FP32

    @property
    def bound(self) -> Difference:
        return {FP32: IN_FP32, BF16: IN_MIXED}.get(self.precision, IN_BF16)

    def experiment(self, folder: Path, row: Row) -> Experiment:
        """Return the run in which the ranks of `row` train it."""
        batch_size = NUM_SEQUENCES // self.accumulation // row.num_ranks
        place = folder / f"{row.backend.value}_{row.expert_parallel}"
        return Experiment(
            output_dir=place / str(TRAININGS.index(self)),
            overrides=(
                *(KINDS | OTHERS)[self.kind],
                *self.precision.split(),
                f"distributed={row.backend.value}",
                f"distributed.expert_parallel={row.expert_parallel}",
                "model.dropout=0",
                "optimizer.learning_rate=1e-3",
                f"hardware.num_devices={row.num_ranks}",
                f"training.batch_size={batch_size}",
                f"training.gradient_accumulation_steps={self.accumulation}",
                f"budget.steps={NUM_STEPS}",
                f"evaluation.interval_steps={NUM_STEPS}",
                f"checkpoint.save_every_n_batches={NUM_STEPS}",
            ),
        )


TRAININGS = [
    *(Training(kind, steps, precision) for kind in KINDS for steps in ACCUMULATIONS for precision in (FP32, BF16)),
    *(Training(kind, 2) for kind in OTHERS),
    *(Training("experts", 2, precision) for precision in (NARROW, ROUNDED_BY_CHANCE)),
]
DIVISIBLE = ("experts", "experts and depth", "deepseek", "multi-token")
ELSEWHERE = (Backend.auto, Backend.single)
"""What is one of the others, and what is compared with."""


def trainings_of(row: Row) -> list[Training]:
    """Return what a row trains: DeepSpeed has masters of its own, unless it has copies of the model only; and experts
    are divided where there are some, evenly."""
    found = [each for each in TRAININGS if row.expert_parallel == 1 or each.kind in DIVISIBLE]
    has_masters = bool(row.backend.zero_stage)
    return [each for each in found if not has_masters or each.precision not in (NARROW, ROUNDED_BY_CHANCE)]


def rows() -> Iterator[Row]:
    """Yield every back end with its numbers of ranks, and those that divide experts."""
    for backend in Backend:
        if backend not in ELSEWHERE:
            yield from (Row(backend, num_ranks) for num_ranks in ((1, 2, 4) if backend is Backend.ddp else (1, 2)))
    yield from (Row(Backend.ddp, num_ranks, expert_parallel=2) for num_ranks in (2, 4))


def starts() -> list[list[Row]]:
    """Return the rows whose ranks are started together: those of one library and as many ranks."""
    together: dict[tuple[bool, int], list[Row]] = {}
    for row in rows():
        together.setdefault((row.backend.zero_stage is None, row.num_ranks), []).append(row)
    return [*together.values()]


def train_all(folder: Path, start: Sequence[Row]) -> dict[tuple[Row, Training], list[Ended]]:
    """Let ranks that are started once train everything of some rows; return how each ended, by rank."""
    trainings = [(row, each) for row in start for each in trainings_of(row)]
    commands = [Command(overrides=each.experiment(folder, row).command) for row, each in trainings]
    return dict(zip(trainings, run_in_group(start[0].num_ranks, commands, TIMEOUT_S), strict=True))


def train_reference(folder: Path) -> Path:
    """Return `folder` with what one process trains in it, unless another process has already done that there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for training, ended in train_all(folder, [ALONE]).items():
                assert [each.code for each in ended] == [0], f"{training}: {ended}"
            (folder / "done").touch()
    return folder


def compare(folder: Path, reference: Path, row: Row) -> dict[Training, Difference]:
    """Return how far all that a row trained in one folder is from what one process trained in the other."""
    return {
        each: difference(each.experiment(folder, row).folder, each.experiment(reference, ALONE).folder)
        for each in trainings_of(row)
    }


def difference(run: RunFolder, reference: RunFolder) -> Difference:
    """Return how far two runs are from each other, which have had the same sequences in every step."""
    found = Difference()
    pairs = [read_metrics(each.metrics) for each in (run, reference)]
    assert of_kind(pairs[1], "train")
    for step, expected in zip(*pairs, strict=True):
        assert all(step.get(name) == expected.get(name) for name in ("kind", "sample_crc32", "tokens"))
        for name in expected:
            if name.endswith("loss") or name == "grad_norm":
                found |= Difference(numbers=abs(step[name] - expected[name]) / abs(expected[name]))
            if name in ("expert_load", "visits_per_token", "layer_usage", "head_load"):
                found |= Difference(shares=_largest(step[name], expected[name]))
    newest = (list_checkpoints(each.checkpoints)[-1] for each in (run, reference))
    ours, theirs = (read_checkpoint(checkpoint).tensors["model"] for checkpoint in newest)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        found |= Difference(weights=(ours[name].double() - weight.double()).abs().max().item())
    return found


def _largest(one: object, other: object) -> float:
    """Return the largest difference of numbers in two lists of the same form."""
    if not isinstance(one, list):
        return abs(float(one) - float(other))  # type: ignore[arg-type]
    assert isinstance(other, list)
    return max((_largest(*pair) for pair in zip(one, other, strict=True)), default=0.0)


def table(measured: Mapping[Row, Mapping[Training, Difference]]) -> str:
    """Return the table: what was measured, by row and training."""
    lines = []
    for row, found in measured.items():
        for steps in ACCUMULATIONS:
            groups = [*([Training(kind, steps)] for kind in KINDS), [Training(kind, steps) for kind in OTHERS]]
            groups.append([Training(kind, steps, BF16) for kind in KINDS])
            cells = [[found[training] for training in group if training in found] for group in groups]
            largest = [str(functools.reduce(operator.or_, cell)) if cell else "" for cell in cells]
            lines.append([str(row), str(row.num_ranks), str(steps), *largest])
    return markdown(HEADER, lines)


def main() -> None:
    """Train everything and write the table anew."""
    measured = {}
    with tempfile.TemporaryDirectory() as place:
        reference = train_reference(Path(place) / "reference")
        for number, start in enumerate(starts()):
            folder = Path(place) / str(number)
            train_all(folder, start)
            measured |= {row: compare(folder, reference, row) for row in start}
    page = filled(PAGE.read_text(encoding="utf-8"), {"matrix": table({row: measured[row] for row in rows()})})
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
