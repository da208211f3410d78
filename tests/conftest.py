"""What every test may use: the command line in this process, as a program of its own, and with folders to write in."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ava_exp.config import folders


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str


CommandLine = Callable[..., Outcome]
"""Takes the arguments of `python -m ava_exp`."""


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """`python -m ava_exp ARGUMENTS` in this process and in an empty folder."""
    from ava_exp.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["ava-exp"])

    def run(*arguments: str) -> Outcome:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        capfd.readouterr()
        try:
            code = main(arguments)
        finally:  # `--info` lets Hydra log to what will be a closed stream in the next test
            root.handlers[:] = handlers
            root.setLevel(level)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def program(tmp_path: Path) -> CommandLine:
    """`python -m ava_exp ARGUMENTS` as a process of its own, in an empty folder."""

    def run(*arguments: str, cwd: Path = tmp_path) -> Outcome:
        command = [sys.executable, "-m", "ava_exp", *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of `conf/` that the command line reads instead, with `sweeps/` beside it."""
    root = tmp_path / "checkout"
    for name in ("conf", "sweeps"):
        shutil.copytree(folders.data_folder(name), root / name)
    (root / "conf" / "local" / "default.yaml").unlink(missing_ok=True)
    monkeypatch.setattr(folders, "data_folder", lambda name: root / name)
    return root / "conf"
