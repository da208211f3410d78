"""A cluster that is played by scripts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[[str, str], None]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts a program of a cluster on the path: the body of a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def cluster(script: Script, tmp_path: Path) -> None:
    """A cluster that takes every job as number 42, keeps the script it was given, and knows of nothing afterwards."""
    pytest.importorskip("submitit", reason="submitit is not installed: `pip install 'ava_exp[slurm]'`")
    script("sbatch", f'cp "$1" {tmp_path}/submitted.sh\necho Submitted batch job 42')
    for name in ("srun", "squeue", "scontrol", "scancel", "sacct"):
        script(name, f'echo {name} "$@" >>{tmp_path}/asked')
