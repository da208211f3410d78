"""Fixtures of the integration tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Experiment


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A tiny run that was not started yet."""
    return Experiment(output_dir=tmp_path / "outputs")
