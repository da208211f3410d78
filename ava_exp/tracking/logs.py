"""Log files of a run. A disk that is full costs one warning, never the run."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import Record, describe_evaluation, describe_step, describe_surgery
from ava_exp.tracking.redaction import redact_text

ROOT = "ava_exp"
TRAINING = "ava_exp.training"
EVALUATION = "ava_exp.evaluation"


def configure_logging(folder: RunFolder, verbose: bool = False) -> LogFiles:
    """Send what is logged under `ava_exp` to the files below `logs/`, and warnings to the terminal.

    `training.log` has the course of the run, `evaluation.log` what `ava_exp.evaluation` says, `errors.log` warnings
    and errors of both, `debug.log` everything. `verbose` shows the course of the run on the terminal too.
    """
    terminal = TerminalHandler(logging.INFO if verbose else logging.WARNING)
    trouble = OneWarning(terminal)
    files = [LogFile(folder.logs / name, level, trouble) for name, level in _LEVELS.items()]
    files[0].addFilter(lambda record: not _is_evaluation(record))
    files[1].addFilter(_is_evaluation)
    return LogFiles([terminal, *files])


_LEVELS = {
    "training.log": logging.INFO,
    "evaluation.log": logging.INFO,
    "errors.log": logging.WARNING,
    "debug.log": logging.DEBUG,
}


def _is_evaluation(record: logging.LogRecord) -> bool:
    return record.name == EVALUATION or record.name.startswith(EVALUATION + ".")


class RecordLog:
    """Puts records of the metrics file into words: every `interval`-th step and the last one, and every evaluation."""

    def __init__(self, total_steps: int, interval: int = 50) -> None:
        self.total_steps = total_steps
        self.interval = interval

    def append(self, record: Record) -> None:
        """Log a record, if it is one to log."""
        if record["kind"] == "eval":
            logging.getLogger(EVALUATION).info("%s", describe_evaluation(record))
        elif record["kind"] == "surgery":
            logging.getLogger(TRAINING).info("%s", describe_surgery(record))
        elif record["step"] % self.interval == 0 or record["step"] == self.total_steps:
            logging.getLogger(TRAINING).info("%s", describe_step(record, self.total_steps))


class LogFiles:
    """The handlers of one run; closing takes them off the logger. A context manager."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        self._handlers = handlers
        logger = logging.getLogger(ROOT)
        self._level_before = logger.level
        logger.setLevel(logging.DEBUG)
        for handler in handlers:
            logger.addHandler(handler)

    def close(self) -> None:
        """Write no more. Calling it twice changes nothing."""
        logger = logging.getLogger(ROOT)
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        if self._handlers:
            logger.setLevel(self._level_before)
        self._handlers = []

    def __enter__(self) -> LogFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RedactingFormatter(logging.Formatter):
    """Hides secrets in the whole text of a record, its traceback included. Times are UTC."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class TerminalHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment, so that a live view can show it above its panel."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class OneWarning:
    """Tells the terminal of the first log that cannot be written; the same trouble is not told again."""

    def __init__(self, terminal: TerminalHandler) -> None:
        self._terminal = terminal
        self._told = False

    def tell(self, error: OSError, path: Path) -> None:
        """Say that `path` cannot be written, if nothing of the kind was said before."""
        if self._told:
            return
        self._told = True
        message = f"Logs cannot be written ({path}: {error.strerror}); the run goes on without them."
        self._terminal.handle(logging.LogRecord(ROOT, logging.WARNING, __file__, 0, message, None, None))


class LogFile(logging.Handler):
    """A log file without a buffer: nothing is lost with the process, and a failed write can be made up for."""

    def __init__(self, path: Path, level: int, trouble: OneWarning) -> None:
        super().__init__(level)
        self.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._path = path
        self._trouble = trouble
        self._file: IO[bytes] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed with the handler
            self._file.write(line.encode())
        except OSError as error:
            self._trouble.tell(error, self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
