"""A folder in which small trainings are started as a user starts them, with processes of their own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ava_exp.tracking.folder import RunFolder
from tests.faults.harness import TINY, Observed, observed, write_corpus

PATIENCE_S = 270.0
LONG = (
    "budget.steps=300",
    "checkpoint.save_every_n_batches=30",
    "evaluation.interval_steps=150",
)
"""So long that something can happen to it on the way."""
SEVERAL = ("budget.steps=120", "checkpoint.save_every_n_batches=20", "evaluation.interval_steps=60")
"""The same for several ranks, whose steps take longer."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """A folder with a text to train on."""

    folder: Path

    def command(self, *overrides: str, output_dir: str = "outputs") -> list[str]:
        """Return a command that trains, in which later overrides win."""
        corpus = self.folder / "corpus"
        if not corpus.exists():
            write_corpus(corpus)
        own = [f"data.paths=[{corpus}]", f"cache_dir={self.folder / 'cache'}", f"output_dir={output_dir}"]
        return [sys.executable, "-m", "ava_exp", *TINY, "precision=fp32", *own, *overrides]

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Give a command and wait for it."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """Give a command and do not wait for it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=pipe, text=True)

    def observed(self) -> Observed:
        """Return what the run left."""
        return observed(self.run_folder.root)

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(next((self.folder / "outputs" / "runs").iterdir()))

    @property
    def num_steps(self) -> int:
        """How many steps the run's metrics tell of."""
        paths = list((self.folder / "outputs" / "runs").glob("*/metrics.jsonl"))
        return sum(path.read_text().count('"kind": "train"') for path in paths)

    def ranks(self) -> list[int]:
        """Return the ids of the processes that train the run at this moment, in the order of their ranks."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(entry.partition("=")[::2] for entry in path.read_text().split("\0"))
                arguments = path.with_name("cmdline").read_text()
            except (OSError, UnicodeDecodeError):  # it has just ended, or is somebody else's
                continue
            if "WORLD_SIZE" in variables and f"{self.folder}/corpus" in arguments:
                found[int(variables["RANK"])] = int(path.parent.name)
        return [pid for _, pid in sorted(found.items())]

    def wait_until(self, condition: Callable[[], object], what: str, every_s: float = 0.05) -> None:
        """Wait until something has happened; tell what did not."""
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until, f"{what}: did not happen\n{self.story()}"
            time.sleep(every_s)

    def story(self) -> str:
        """Return what may explain why something did not happen."""
        return ""


@functools.cache
def uninterrupted(*overrides: str) -> Observed:
    """Return what a training leaves when it runs on this machine and nothing happens to it; it is trained once."""
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(Path(folder))
        done = workplace.run(workplace.command(*overrides))
        assert done.returncode == 0, done.stdout + done.stderr
        return workplace.observed()
