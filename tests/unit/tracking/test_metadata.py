"""What a run was made with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ava_exp.tracking.metadata import collect_metadata, cpu_model, git_state, package_versions


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_it_says_what_is_needed_to_repeat_a_run() -> None:
    metadata = collect_metadata(["python", "-m", "ava_exp", "name=a b", "hub.token=hunter2"])
    assert metadata["command"] == "python -m ava_exp 'name=a b' hub.token=[redacted]"
    assert metadata["python"] == sys.version.split()[0]
    assert {"torch", "numpy", "hydra-core"} <= set(metadata["packages"])
    assert metadata["memory_bytes"] > 0 and metadata["cores"] > 0 and metadata["cpu"]
    assert json.loads(json.dumps(metadata)) == metadata


def test_an_apple_chip_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    answer = subprocess.CompletedProcess([], 0, stdout="Apple M1 Max\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keywords: answer)
    assert cpu_model() == "Apple M1 Max"


def test_versions_are_learnt_without_importing() -> None:
    code = (
        "import sys; from ava_exp.tracking.metadata import collect_metadata; collect_metadata([]); "
        "sys.exit(bool({'torch', 'mlflow', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert package_versions()["mlflow"]


def test_commit_and_changes_of_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None
    _git(tmp_path, "init")
    assert git_state(package) is None, "a package that merely lies inside somebody's repository"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    state = git_state(package)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (package / "__init__.py").write_text("changed")
    assert git_state(package) == {**state, "dirty": True}
