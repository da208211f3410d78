"""The metrics file of a run: one JSON record a line. Figures, report and trackers are made from it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ava_exp.tracking.experts import layer_statistics, overall_of, overall_statistics
from ava_exp.tracking.files import restore_numbers, to_json, write_atomically

logger = logging.getLogger(__name__)

Record = dict[str, Any]

NOT_METRICS = frozenset({"kind", "step", "time", "final", "sample_crc32", "expert_load", "head_load"})
LOADS = ("expert_load", "source_load", "head_load")
LOAD_DECIMALS = 5
MAX_PENDING = 10_000
"""Records kept in memory while the file cannot be written."""


class MetricsFile:
    """Appends records, each whole at once. While the disk is full they wait in memory, up to `MAX_PENDING`.

    Every record gets the wall-clock `time` at which it was appended, in seconds since 1970; the loads of experts, by
    far its largest part, are rounded. A context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_to_append(path)
        self._pending: deque[bytes] = deque()
        self._num_lost = 0
        self._warned = False

    def append(self, record: Record) -> None:
        """Write one record; a disk that is full costs one warning and is tried again at the next record."""
        record = {**record, "time": round(time.time(), 3)}
        record |= {name: _rounded(record[name]) for name in LOADS if name in record}
        line = to_json(record) + "\n"
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self._num_lost += 1
        self._pending.append(line.encode())
        self._write_pending()

    def cut_back(self, step: int, evaluations: Container[int] | None = None) -> None:
        """Drop what comes after `step`, and a last line that was torn, so that a resumed run repeats nothing.

        An evaluation after `step` steps is dropped, too, unless `evaluations` has it: it was made after the checkpoint.
        """

        def is_kept(record: Record) -> bool:
            if record["step"] == step and record["kind"] == "eval" and evaluations is not None:
                return step in evaluations
            return bool(record["step"] <= step)

        kept = [line for line, record in _whole_lines(self.path) if is_kept(record)]
        if sum(map(len, kept)) != self.path.stat().st_size:
            write_atomically(self.path, b"".join(kept).decode())
            os.close(self._descriptor)
            self._descriptor = _open_to_append(self.path)

    def sync(self) -> None:
        """Bring what was written to the disk; to be called before a checkpoint that counts on it is committed."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Try once more to write what waits, and say what was lost."""
        self._write_pending()
        if lost := self._num_lost + len(self._pending):
            logger.error("%d metric records could not be written to %s and are lost.", lost, self.path)
        os.close(self._descriptor)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_pending(self) -> None:
        while self._pending:
            try:
                _write_whole(self._descriptor, self._pending[0])
            except OSError as error:
                self._warn(error)
                return
            self._pending.popleft()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Metrics cannot be written (%s: %s); the run goes on.", self.path, error.strerror)


def _rounded(shares: Any) -> Any:
    return [_rounded(share) for share in shares] if isinstance(shares, list) else round(shares, LOAD_DECIMALS)


def _open_to_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def _write_whole(descriptor: int, line: bytes) -> None:
    """Append a line, or leave the file as it was: half a line would spoil the next one."""
    end = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _whole_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill, or just being written
            try:
                yield line, parse_record(line)
            except ValueError:
                logger.warning("%s, line %d is no metric record and is left out.", path, number)


def parse_record(line: bytes) -> Record:
    """Turn one line of a metrics file back into the record that was appended. Raises `ValueError`."""
    record: Record = restore_numbers(json.loads(line))
    return record


def read_metrics(path: Path) -> list[Record]:
    """Return all whole records of a metrics file; none where there is no file."""
    return [record for _, record in _whole_lines(path)] if path.exists() else []


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Return the records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def metric_group(record: Record) -> str:
    """Return what a record's metrics are filed under: `train`, `eval`, or `final` for the last evaluation."""
    return "final" if record.get("final") else str(record["kind"])


def metric_values(record: Record) -> dict[str, float]:
    """Return a record's numbers by tracker name: `train/loss`, `experts/layer_0/gini`, `eval/experts/overall/churn`."""
    group = metric_group(record)
    values = {
        f"{group}/{name}": float(value)
        for name, value in record.items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }
    for place, weights in record.get("activation_weights", {}).items():
        values |= {f"{group}/activations/{place}/{name}": weight for name, weight in weights.items()}
    if layers := layer_statistics(record):
        prefix = "experts" if group == "train" else f"{group}/experts"
        named = {f"layer_{number}": layer for number, layer in enumerate(layers)} | {
            "overall": overall_statistics(layers)
        }
        values |= {f"{prefix}/{place}/{name}": value for place, layer in named.items() for name, value in layer.items()}
    return values


def describe_step(record: Record, total_steps: int) -> str:
    """Say a `train` record in one line."""
    parts = [
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {record['loss']:.3f}",
        f"learning rate {record['learning_rate']:.2e}",
        f"gradient norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts + describe_routers(record))


def describe_routers(record: Record) -> list[str]:
    """Say what there is to worry about in a `train` record's routers: what was dropped, and who is dead."""
    dropped, dead = overall_of(record, "dropped_share"), overall_of(record, "dead_experts")
    words = [f"dropped {dropped:.1%}"] if dropped else []
    return [*words, f"dead experts {dead:.0f}"] if dead else words


def describe_evaluation(record: Record) -> str:
    """Say an `eval` record in one line."""
    name = "final evaluation" if record.get("final") else f"evaluated at step {record['step']:,}"
    churn = overall_of(record, "churn")
    return (
        f"{name}: {record['bits_per_byte']:.3f} bits per byte, loss {record['loss']:.3f}, "
        f"{record['token_accuracy']:.1%} right" + (f", churn {churn:.1%}" if churn is not None else "")
    )


def describe_surgery(record: Record) -> str:
    """Say a `surgery` record in one line."""
    return (
        f"{record['operation']} after step {record['step']:,}: {'; '.join(record['done'])}; "
        f"loss {record['loss_before']:.4f} before, {record['loss']:.4f} after; "
        f"{record['parameters_before']:,} parameters before, {record['parameters']:,} after"
    )
