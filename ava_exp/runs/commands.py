"""What can be asked of runs and jobs; every function prints its answer and returns an exit code."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ava_exp.errors import EXIT_FAILURE, EXIT_OK, UserError
from ava_exp.runs.catalogue import Entry, all_entries, find_entries, find_entry
from ava_exp.runs.table import in_columns
from ava_exp.tracking.jobs import cluster
from ava_exp.tracking.trackers import RunStatus

WELL_ENDED = (RunStatus.finished, "completed")
COLUMNS = ("name", "status", "step", "loss", "job")


def list_runs(output_dir: Path) -> int:
    """Print a line for every run and job."""
    entries = all_entries(output_dir)
    print(_table(entries) if entries else f"There are no runs in {output_dir} yet.")
    return EXIT_OK


def _table(entries: Sequence[Entry]) -> str:
    rows = [(e.name, e.status, e.steps(), e.loss(), e.job.id if e.job else "") for e in entries]
    return "\n".join(in_columns([COLUMNS, *rows]))


def show(output_dir: Path, name: str) -> int:
    """Print how a run stands, what came of it, how it differs from the default and where it lies; of several a line."""
    entries = find_entries(output_dir, name)
    if len(entries) > 1:
        print(_table(entries))
        return EXIT_OK
    (entry,) = entries
    print("\n".join(in_columns([[key, str(value)] for key, value in _facts(entry)])))
    difference = entry.folder.read_json("difference.json", {}) if entry.folder else {}
    if difference:
        print("\ndifferent from the default:")
        print("\n".join(in_columns([["  " + key, f"{pair[1]} (not {pair[0]})"] for key, pair in difference.items()])))
    return EXIT_OK


def _facts(entry: Entry) -> Iterable[tuple[str, Any]]:
    yield "name", entry.name
    yield "status", entry.status
    if entry.steps():
        yield "step", entry.steps()
    if entry.loss():
        yield "loss", entry.loss()
    summary = (entry.folder.read_json("summary.json") if entry.folder else None) or {}
    for key, value in (summary.get("final") or {}).items():
        yield f"validation {key}", f"{value:.4f}" if isinstance(value, float) else value
    for key in ("tokens", "seconds", "tokens_per_s"):
        if summary.get(key) is not None:
            yield key, f"{summary[key]:.6g}"
    if entry.has_local_process and entry.owner is not None:
        yield "process", f"{entry.owner['pid']}, since {entry.owner['started']}"
    if entry.folder:
        yield "run folder", entry.folder.root
    if entry.job and entry.job_folder:
        yield "job", f"{entry.job.id} ({(entry.job_state or 'unknown').lower()}), submitted {entry.job.submitted}"
        yield "job folder", entry.job_folder.root
        if entry.job.commit:
            yield "commit", entry.job.commit


def watch(output_dir: Path, name: str, interval_s: float) -> int:
    """Print a line whenever something changed, until all has ended; return 0 if it finished. Several are counted."""
    told = ""
    while True:
        entries = find_entries(output_dir, name)
        line = _line(entries[0]) if len(entries) == 1 else _counts(entries)
        if line != told:
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
            told = line
        if not any(entry.is_active for entry in entries):
            return EXIT_OK if all(entry.status in WELL_ENDED for entry in entries) else EXIT_FAILURE
        time.sleep(interval_s)


def _line(entry: Entry) -> str:
    return f"{entry.status}  {entry.steps()}  {f'loss {entry.loss()}' if entry.loss() else ''}".rstrip()


def _counts(entries: Sequence[Entry]) -> str:
    counts = Counter(entry.status for entry in entries)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def logs(output_dir: Path, name: str, num_lines: int, which: str | None) -> int:
    """Print the last lines of a run's log, or of what its job printed."""
    entry = _one(output_dir, name)
    files = _log_files(entry, which)
    if not files:
        raise UserError(f"{entry.name} has not printed anything yet.")
    for path in files:
        if len(files) > 1:
            print(f"── {path}")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-num_lines:]))
    return EXIT_OK


def _log_files(entry: Entry, which: str | None) -> list[Path]:
    own = entry.folder.logs / f"{which or 'training'}.log" if entry.folder and which != "job" else None
    if own is not None and own.is_file():
        return [own]
    if entry.job_folder and entry.job and which in (None, "job"):
        return [path for path in entry.job_folder.outputs(entry.job) if path.stat().st_size]
    return []


def cancel(output_dir: Path, name: str) -> int:
    """End a run: the job that trains it, or all that were submitted with it, or the process, which saves first.

    Raises UserError when nothing is at work.
    """
    entries = find_entries(output_dir, name)
    active = [entry.job.id for entry in entries if entry.has_active_job and entry.job]
    if active:
        cluster().cancel(active[::-1])  # those that wait first, or they would take the places of those that end
        which = f"Job {active[0]} is" if len(active) == 1 else f"{len(active)} jobs are"
        print(f"{which} cancelled. The same command goes on from the newest checkpoint.")
        return EXIT_OK
    if len(entries) > 1:
        raise UserError(f"{name} has ended ({_counts(entries)}): there is nothing to cancel.")
    return _stop_process(entries[0])


def _stop_process(entry: Entry) -> int:
    owner = entry.owner
    if owner is not None and entry.has_local_process:
        os.kill(owner["pid"], signal.SIGTERM)
        print(f"Process {owner['pid']} was asked to save and stop. The same command goes on from there.")
        return EXIT_OK
    if owner is not None and entry.status == RunStatus.running:
        raise UserError(f"{entry.name} is the work of process {owner['pid']} on {owner['host']}: cancel it there.")
    raise UserError(f"{entry.name} is {entry.status}: there is nothing to cancel.")


def _one(output_dir: Path, name: str) -> Entry:
    """Return the only thing with this name. Raises UserError where it means several jobs."""
    entries = find_entries(output_dir, name)
    if len(entries) > 1:
        ids = [entry.job.id for entry in entries if entry.job]
        raise UserError(f"{name} is {len(entries)} jobs; name one of them, from {ids[0]} to {ids[-1]}.")
    return entries[0]


def resubmit(output_dir: Path, name: str) -> int:
    """Submit a job's command once more, with the code as it is now; a run goes on. Raises UserError without a job."""
    entry = _one(output_dir, name)
    if entry.job is None:
        raise UserError(f"{entry.name} was not a job: give its command again.")
    from ava_exp.cli import main

    os.chdir(entry.job.directory)
    return main(entry.job.overrides)


def verify(output_dir: Path, name: str) -> int:
    """Read every checkpoint of a run, compare it with its checksums, and return 1 if one is not as it was written."""
    from ava_exp.training.checkpoint import list_checkpoints, verify_checkpoint

    entry = find_entry(output_dir, name)
    checkpoints = list_checkpoints(entry.folder.checkpoints) if entry.folder else []
    if not checkpoints:
        raise UserError(f"{entry.name} has no checkpoint.")
    problems = {checkpoint.name: verify_checkpoint(checkpoint) for checkpoint in checkpoints}
    print("\n".join(f"{step}  {problem or 'is as it was written'}" for step, problem in problems.items()))
    return EXIT_FAILURE if any(problems.values()) else EXIT_OK
