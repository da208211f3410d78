"""Runs trainings in processes of their own, lets faults happen to them, and compares what is left, bit for bit."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from tests.faults.faults import Fault

NUM_STEPS = 12
SAVE_EVERY = 3

TINY = (
    "~local",
    "name=tiny",
    "data=files",
    "data.sequence_length=16",
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.intermediate_size=64",
    "model.num_experts=4",
    "model.dropout=0.1",  # the random states matter
    "training.batch_size=2",
    "optimizer.learning_rate=1e-2",
    f"budget.steps={NUM_STEPS}",
    f"evaluation.interval_steps={SAVE_EVERY}",
    "evaluation.max_tokens=100",
    "evaluation.sample_tokens=5",
    f"checkpoint.save_every_n_batches={SAVE_EVERY}",
    "hardware=cpu",
    "tracker=none",
)
"""A run of twelve steps, which takes less time than starting it."""

SYNCHRONOUS = "checkpoint.asynchronous=false"
"""What was saved when a run is killed is then known for certain."""

NUMBERS = (
    "loss",
    "load_balancing_loss",
    "router_z_loss",
    "learning_rate",
    "grad_norm",
    "token_accuracy",
)
ROUTING = (
    "expert_load",
    "visits_per_token",
    "dropped_share",
    "dead_experts",
    "token_entropy",
    "churn",
    "source_load",
    "source_information",
)
DEPTH = (
    "layer_usage",
    "mod_capacity",
    "mod_predictor_loss",
    "compute_savings",
    "noncausal_loss",
    "processed_share",
    "predictor_accuracy",
    "skipped_by_frequency",
    "skipped_by_kind",
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended. `operations` are (operation, path) of what it did, as far as it came."""

    code: int
    out: str
    err: str
    operations: list[tuple[str, str]]

    @property
    def killed(self) -> bool:
        return self.code == -9


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a resumed run must have in common with one that was never interrupted."""

    records: list[tuple[object, ...]]
    """Of every step and evaluation: kind, step, samples, and all numbers, exactly."""
    final: dict[str, Any]
    """Checksums of all tensors of the newest checkpoint, and its JSON state."""


def observed(folder: Path) -> Observed:
    """Return what a run's folder holds, without what depends on time or place."""
    records = []
    for record in read_metrics(folder / "metrics.jsonl"):
        numbers = [float(record[name]).hex() for name in NUMBERS if name in record]
        routing = [json.dumps(record[name]) for name in (*ROUTING, *DEPTH) if name in record]
        records.append((record["kind"], record["step"], record.get("sample_crc32"), *numbers, *routing))
    return Observed(records, final_state(list_checkpoints(folder / "checkpoints")[-1]))


def final_state(checkpoint: Path) -> dict[str, Any]:
    """Return a verified checkpoint's content without what depends on time or place.

    Losses of evaluations are among the records; a last one that a signal had put off is not in the last checkpoint.
    """
    state = read_checkpoint(checkpoint).state
    del state["run"], state["train"]["elapsed_s"], state["train"]["evaluations"]
    tensors = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}
    return {"step": checkpoint.name, **tensors, **state}


class Harness:
    """Owns the server that runs are forked from, and the text they are trained on."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ava_exp_faults_"))
        write_corpus(self.folder / "corpus")
        self._server: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the server and remove its files."""
        if self._server is not None:
            self._server.communicate()
        shutil.rmtree(self.folder)

    def run(self, overrides: Sequence[str], faults: Sequence[Fault] = (), *, draw: bool = True) -> Ended:
        """Train in a new process until it ends, one way or another; `draw` is explained at `install`."""
        files = {name: self.folder / name for name in ("out", "err", "record")}
        request = {
            "overrides": list(overrides),
            "faults": [asdict(fault) for fault in faults],
            "draw": draw,
            "folder": str(self.folder),
            **{name: str(path) for name, path in files.items()},
        }
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, "the server died; its traceback is on standard error"
        operations = [tuple(json.loads(line)) for line in files["record"].read_text().splitlines()]
        return Ended(int(answer), files["out"].read_text(), files["err"].read_text(), operations)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server"],
                cwd=Path(__file__).resolve().parents[2],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server


@functools.cache
def harness() -> Harness:
    """Return this process's harness, started when it is first needed."""
    made = Harness()
    atexit.register(made.close)
    return made


@dataclass(kw_only=True, slots=True)
class Experiment:
    """One command line, given as often as a test likes, with an output folder of its own."""

    output_dir: Path
    overrides: tuple[str, ...] = ()
    draw: bool = True
    harness: Harness = field(default_factory=harness)

    @property
    def command(self) -> list[str]:
        """The overrides of the command line."""
        unless_given = {"precision=": "precision=fp32", "sparsity=": "sparsity.router.jitter=0.1"}
        return [
            *TINY,
            *(text for key, text in unless_given.items() if not any(given.startswith(key) for given in self.overrides)),
            f"data.paths=[{self.harness.folder / 'corpus'}]",
            f"cache_dir={self.harness.folder / 'cache'}",
            f"output_dir={self.output_dir}",
            *self.overrides,
        ]

    def run(self, *faults: Fault, also: Sequence[str] = ()) -> Ended:
        """Give the command, with further overrides in `also`."""
        return self.harness.run([*self.command, *also], faults, draw=self.draw)

    def finish(self, *, also: Sequence[str] = ()) -> Observed:
        """Give the command once more, without a fault, and return what is left when it has finished."""
        ended = self.run(also=also)
        assert ended.code == 0, ended.out + ended.err
        return observed(self.folder.root)

    @property
    def folder(self) -> RunFolder:
        """The newest attempt."""
        return RunFolder((self.output_dir / "latest").resolve())

    @property
    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return list_checkpoints(self.folder.checkpoints)

    def copy(self, output_dir: Path) -> Experiment:
        """Return the same experiment as it stands now, elsewhere."""
        shutil.copytree(self.output_dir, output_dir, symlinks=True)
        return replace(self, output_dir=output_dir)


@functools.cache
def uninterrupted(*overrides: str) -> Observed:
    """Return what a run leaves that nothing happened to; it is trained once for all tests of a process."""
    place = Path(tempfile.mkdtemp(dir=harness().folder))
    return Experiment(output_dir=place, overrides=overrides).finish()


def write_corpus(folder: Path, num_documents: int = 24, num_words: int = 150) -> None:
    """Write a small text in which some words are frequent: the same on every machine."""
    folder.mkdir()
    state = 1
    for number in range(num_documents):
        words = []
        for _ in range(num_words):
            state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
            words.append(f"w{((state >> 33) % 40) ** 2 // 40:02d}")
        (folder / f"{number:02d}.txt").write_text(" ".join(words) + "\n")
