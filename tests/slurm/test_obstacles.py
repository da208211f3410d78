"""Where there can be no cluster, the tests of this folder say why they are skipped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm import conftest


@pytest.fixture(autouse=True)
def as_root_with_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(conftest, "find_spec", lambda name: name)
    monkeypatch.setenv(conftest.WANTED, "1")


def test_with_everything_there_is_none() -> None:
    assert conftest.obstacle() is None


def test_each_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "find_spec", lambda name: None)
    assert "submitit is not installed" in str(conftest.obstacle())
    monkeypatch.delenv(conftest.WANTED)
    assert "only where AVA_EXP_TEST_SLURM=1 asks for it" in str(conftest.obstacle())
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "needs root" in str(conftest.obstacle())
    monkeypatch.setattr("sys.platform", "darwin")
    assert "needs Linux" in str(conftest.obstacle())


def test_packages_that_cannot_be_installed_are_told(tmp_path: Path) -> None:
    """On a machine without Debian's tools: the script finds none of its packages, and nothing to install them with."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "id", "mkdir", "chmod", "grep"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}" if name != "id" else "/usr/bin/id")
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "AVA_SLURM_DIR": str(tmp_path / "state")}
    if os.getuid() != 0:
        pytest.skip("needs root: the script looks at that first")
    done = subprocess.run([conftest.SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == conftest.CANNOT_INSTALL
    assert "there is no apt-get" in done.stderr
