"""The points of a sweep as jobs of a cluster: submitted together as an array, found again, waited for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ava_exp.errors import EXIT_FAILURE
from ava_exp.sweeping.pool import Tell
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord, is_finished, objective_of
from ava_exp.sweeping.start import last_line
from ava_exp.tracking.jobs import Job, JobFolder, Request, all_jobs, cluster, commands_for, pauses

AT_WORK = (PointStatus.queued, PointStatus.running)
FAILURES = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL", "COMPLETED")
"""States in which a job that has not finished its run has failed; any other end can be gone on from."""
Found = dict[str, tuple[JobFolder, Job]]


class PointJobs:
    """Points that jobs train. `update` tells how they stand, by their runs and by what the cluster says of their jobs.

    Args:
        points: those that are sound.
        num_parallel: how many jobs of an array run at a time.
        max_retries: how often a point that failed is submitted again while the sweep waits for it.
        extra: what a point is given besides its own overrides.
    """

    def __init__(
        self,
        record: SweepRecord,
        points: Sequence[Point],
        *,
        num_parallel: int,
        max_retries: int,
        extra: Callable[[Point], list[str]],
        tell: Tell,
    ) -> None:
        self._record, self._points, self._tell = record, points, tell
        self._num_parallel, self._max_retries, self._extra = num_parallel, max_retries, extra
        self._told: dict[int, PointStatus] = {}

    def run(self, *, waits: bool) -> None:
        """Submit what neither is finished nor has a job; with `waits` stay until all jobs have ended."""
        self.update()
        left = [point for point in self._points if point.status not in (PointStatus.finished, *AT_WORK)]
        if not left:
            self._tell(f"Nothing is left to submit: {self._counts()}.")
        while left or (waits and self._at_work()):
            if left:
                self._submit(left)
            left = self._wait_for_failures() if waits else []

    def update(self) -> None:
        """Find out how every point stands."""
        found = self._jobs_by_run()
        states = cluster().states([job.id for _, job in found.values()], must_answer=True)
        for point in self._points:
            folder = point.folder
            job_folder, job = found.get(str(folder.root.resolve()), (None, None)) if folder else (None, None)
            point.root = str(folder.root) if folder else None
            if job is not None and job_folder is not None:
                point.job = job.id
                point.log = next((str(path) for path in job_folder.outputs(job)), None)
            _judge(point, states.get(job.id, "UNKNOWN") if job else None, self._record.objective)

    def _jobs_by_run(self) -> Found:
        """Return the newest job of every run."""
        folders = {point.config.output_dir for point in self._points}
        jobs = [pair for folder in sorted(folders) for pair in all_jobs(Path(folder))]
        return {job.run_folder: (folder, job) for folder, job in jobs if job.run_folder}

    def _submit(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.error:
                self._say(point, f"{point.error}; submitted again")
        launcher = points[0].config.launcher.build()
        requests = [Request(config=point.config, overrides=[*point.overrides, *self._extra(point)]) for point in points]
        folder, jobs = launcher.submit_all(requests, self._record.id, self._num_parallel)
        for point, job in zip(points, jobs, strict=True):
            point.status, point.code, point.error, point.job = PointStatus.queued, None, "", job.id
            point.attempts += 1
        self._record.save()
        at_a_time = f", {min(self._num_parallel, len(jobs))} at a time" if len(jobs) > 1 else ""
        arrays = list(dict.fromkeys(job.id.partition("_")[0] for job in jobs))
        self._tell(f"Job {' and '.join(arrays)}: {len(jobs)} point{'s' if len(jobs) > 1 else ''} submitted{at_a_time}.")
        self._tell(f"  job folder  {folder.root}")
        name = arrays[0] if len(arrays) == 1 else folder.root.name
        for line in commands_for(name, points[0].config.output_dir, logs_of=jobs[0].id):
            self._tell(line)

    def _wait_for_failures(self) -> list[Point]:
        """Wait until no job is at work; return the points that failed and are worth another try."""
        for pause in pauses():
            self.update()
            self._tell_changes()
            if not self._at_work():
                break
            time.sleep(pause)
        self._record.save()
        return [p for p in self._points if p.status is PointStatus.failed and p.attempts <= self._max_retries]

    def _at_work(self) -> list[Point]:
        return [point for point in self._points if point.status in AT_WORK]

    def _tell_changes(self) -> None:
        for point in self._points:
            if self._told.get(point.number) is not point.status and point.status is not PointStatus.queued:
                measured = f": {self._record.objective} {point.value:.4f}" if point.value is not None else ""
                self._say(point, point.error or f"{point.status.value}{measured} (job {point.job})")
            self._told[point.number] = point.status

    def _say(self, point: Point, text: str) -> None:
        self._tell(f"[{point.number}] {point.label}: {text}")

    def _counts(self) -> str:
        counts = Counter(point.status for point in self._points)
        return ", ".join(f"{count} {status.value}" for status, count in counts.items())


def _judge(point: Point, state: str | None, objective: str) -> None:
    """Note how a point stands: `state` is what the cluster says of its newest job, None where there is none."""
    point.value, point.code, point.error = None, None, ""
    if is_finished(point):
        point.status, point.value = PointStatus.finished, objective_of(point, objective)
        summary = point.folder.read_json("summary.json", {}) if point.folder else {}
        point.seconds = float(summary.get("seconds") or 0.0)
    elif state is None:
        point.status = PointStatus.waiting
    elif cluster().is_active(state):
        point.status = PointStatus.queued if state == "PENDING" else PointStatus.running
    else:
        point.status = PointStatus.failed if state in FAILURES else PointStatus.interrupted
        words = last_line(Path(point.log)) if point.log else ""
        point.error = f"job {point.job} ended {state}{f': {words}' if words else ''}"
        point.code = EXIT_FAILURE if point.status is PointStatus.failed else None
