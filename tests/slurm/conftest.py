"""A real cluster for the tests of this folder, raised once and torn down; where there can be none they are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.slurm.jobs import Cluster

SCRIPT = Path(__file__).with_name("cluster.sh")
WANTED = "AVA_EXP_TEST_SLURM"
CANNOT_INSTALL = 3
PORTS = 20
"""Each process that runs tests has a cluster, with ports of its own."""


def obstacle() -> str | None:
    """Return why there can be no cluster here."""
    if sys.platform != "linux":
        return "a cluster needs Linux"
    if os.geteuid() != 0:
        return "a cluster needs root, as which its daemons run"
    if not os.environ.get(WANTED):
        return f"daemons are started as root only where {WANTED}=1 asks for it; SLURM is installed from Debian then"
    if find_spec("submitit") is None:
        return "submitit is not installed: `pip install 'ava_exp[slurm]'`"
    return None


@pytest.fixture(scope="session")
def running_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cluster's daemons. What they logged is kept when a test failed."""
    if reason := obstacle():
        pytest.skip(reason)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    folder = Path(f"/tmp/ava_exp_slurm_tests_{worker}")
    environment = {**os.environ, "AVA_SLURM_DIR": str(folder), "AVA_SLURM_PORT": str(17_817 + PORTS * worker)}
    up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, timeout=280, check=False)
    if up.returncode == CANNOT_INSTALL:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    assert up.returncode == 0, up.stderr
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield
    patch.undo()
    if request.session.testsfailed:
        shutil.copytree(folder / "log", tmp_path_factory.getbasetemp() / "slurm_logs")
    subprocess.run([SCRIPT, "down", "--purge"], env=environment, timeout=120, check=True)


@pytest.fixture
def cluster(running_cluster: None, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster with a folder to submit from; afterwards nothing of this test is left in it."""
    made = Cluster(tmp_path)
    yield made
    made.cancel_all()
