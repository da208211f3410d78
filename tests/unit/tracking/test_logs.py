"""Log files: what goes where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.logs import RecordLog, configure_logging


def _messages(path: Path) -> list[str]:
    return [line.split(": ", 1)[1] for line in path.read_text().splitlines()] if path.exists() else []


def test_every_record_goes_where_it_belongs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).create()
    with configure_logging(folder):
        logging.getLogger("ava_exp.training").debug("shapes")
        logging.getLogger("ava_exp.training").info("started")
        logging.getLogger("ava_exp.evaluation").info("evaluated")
        logging.getLogger("ava_exp.evaluation.language").warning("slow")
        logging.getLogger("ava_exp.evaluation_tools").error("broken")
        logging.getLogger("elsewhere").error("not ours")
    assert _messages(folder.logs / "training.log") == ["started", "broken"]
    assert _messages(folder.logs / "evaluation.log") == ["evaluated", "slow"]
    assert _messages(folder.logs / "errors.log") == ["slow", "broken"]
    assert _messages(folder.logs / "debug.log") == ["shapes", "started", "evaluated", "slow", "broken"]


def test_closing_ends_it_and_a_second_run_does_not_write_into_the_first(tmp_path: Path) -> None:
    logger = logging.getLogger("ava_exp.training")
    for name in ("first", "second"):
        with configure_logging(RunFolder(tmp_path / name).create()) as logs:
            logger.info("%s", name)
        logger.info("after")
        logs.close()
    assert _messages(tmp_path / "first/logs/training.log") == ["first"]
    assert _messages(tmp_path / "second/logs/training.log") == ["second"]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).create()
    for text in ("one", "two"):
        with configure_logging(folder):
            logging.getLogger("ava_exp").info(text)
    assert _messages(folder.logs / "training.log") == ["one", "two"]


@pytest.mark.parametrize(
    ("verbose", "expected"), [(False, ["WARNING: look"]), (True, ["INFO: started", "WARNING: look"])]
)
def test_the_terminal_shows_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbose: bool, expected: list[str]
) -> None:
    with configure_logging(RunFolder(tmp_path).create(), verbose):
        logging.getLogger("ava_exp").info("started")
        logging.getLogger("ava_exp").warning("look")
    assert capsys.readouterr().err.splitlines() == expected


def test_records_are_put_into_words(tmp_path: Path, fake_records: Callable[..., Iterator[dict[str, Any]]]) -> None:
    folder = RunFolder(tmp_path).create()
    with configure_logging(folder):
        log = RecordLog(total_steps=120, interval=50)
        for record in fake_records(120):
            log.append(record)
    steps = [line[: line.index("  loss")] for line in _messages(folder.logs / "training.log")]
    assert steps == ["step  50/120", "step 100/120", "step 120/120"]
    evaluations = _messages(folder.logs / "evaluation.log")
    assert len(evaluations) == 11
    assert evaluations[0].startswith("evaluated at step 12") and evaluations[-1].startswith("final evaluation")
