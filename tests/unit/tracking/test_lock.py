"""The lock of a run folder within one process; `tests/faults/test_tracking.py` has several."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ava_exp.errors import RunFolderError
from ava_exp.tracking.lock import RunLock


def test_a_lock_names_its_owner_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        owner = json.loads(path.read_text())
        assert owner["pid"] == os.getpid() and owner["command"] and owner["host"] and owner["started"]
    assert path.read_text() == ""


def test_it_can_be_taken_once_at_a_time_and_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for _ in range(2):
        with RunLock(path), pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on "), RunLock(path):
            pass


def test_an_owner_that_cannot_be_read_is_still_respected(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path):
        path.write_text('{"pid": ')
        with pytest.raises(RunFolderError, match="in use by another process"), RunLock(path):
            pass


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run.lock"):
        raise ZeroDivisionError
    with RunLock(tmp_path / "run.lock"):
        pass
