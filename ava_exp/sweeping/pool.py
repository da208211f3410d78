"""Runs points, so many at a time, until none is left or somebody asks to stop."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from ava_exp.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord, is_finished, objective_of
from ava_exp.sweeping.source import PointSource
from ava_exp.sweeping.start import Slot, Start, Work
from ava_exp.tracking.text import format_seconds
from ava_exp.training.signals import STOP_SIGNALS, SignalRequests

POLL_S = 0.1
WATCH_S = 1.0
"""How often running points are looked at for pruning."""
NOT_ENDED = (PointStatus.waiting, PointStatus.running)
Tell = Callable[[str], None]


class Requests(SignalRequests):
    """Signals to a sweep: the first to stop lets its points save, a further one ends them; SIGUSR1 is handed on."""

    def __init__(self) -> None:
        super().__init__(tells=False)
        self.num_stops = 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        super()._on_signal(number, frame)
        self.num_stops += number in STOP_SIGNALS


@dataclass(slots=True)
class _Running:
    point: Point
    slot: Slot
    work: Work
    started: float
    is_pruned: bool = False


class Pool:
    """The points of a sweep at work. `run` returns when all that can be done is done; the record tells the rest."""

    def __init__(
        self,
        record: SweepRecord,
        source: PointSource,
        slots: list[Slot],
        start: Start,
        requests: Requests,
        *,
        max_retries: int,
        extra: Callable[[Point], list[str]],
        tell: Tell,
    ) -> None:
        self._record, self._source, self._start = record, source, start
        self._free, self._requests, self._tell = deque(slots), requests, tell
        self._max_retries, self._extra = max_retries, extra
        self._again: deque[Point] = deque()
        self._running: list[_Running] = []
        self._num_stops = 0
        self._watched = 0.0

    def run(self) -> None:
        """Start points while there are any and nobody asked to stop, and wait for those that run."""
        try:
            while True:
                if not self._requests.num_stops:
                    self._start_points()
                if not self._running:
                    return
                time.sleep(POLL_S)
                self._hand_on_requests()
                self._watch()
                self._collect()
        finally:
            for running in self._running:  # after an error of ours: no process stays behind
                running.work.send(signal.SIGTERM)
            self._source.close()

    def _start_points(self) -> None:
        while self._free and (point := self._next()) is not None:
            self._start_point(point)

    def _next(self) -> Point | None:
        """Return the next point that has something to do; those that are finished are told and left out."""
        while (point := self._candidate()) is not None:
            if not is_finished(point):
                return point
            point.status, point.value = PointStatus.finished, objective_of(point, self._record.objective)
            self._end(point, "was finished before")
        return None

    def _candidate(self) -> Point | None:
        """Return a point to be tried again, or a new one. The twin of a run at work waits until that has ended."""
        at_work = {running.point.run_id for running in self._running}
        for point in self._again:
            if point.run_id not in at_work:
                self._again.remove(point)
                return point
        if self._again:
            return None
        fresh = self._source.next()
        if fresh is None or fresh.run_id not in at_work:
            return fresh
        self._again.append(fresh)
        return None

    def _start_point(self, point: Point) -> None:
        slot = self._free.popleft()
        point.status, point.error = PointStatus.running, ""
        point.attempts += 1
        work = self._start([*point.overrides, *self._extra(point)], self._record.log(point), slot)
        self._running.append(_Running(point, slot, work, time.monotonic()))
        again = f" (attempt {point.attempts})" if point.attempts > 1 else ""
        self._say(point, f"started{again}")
        self._record.save()

    def _hand_on_requests(self) -> None:
        if self._requests.save:
            self._requests.save = False
            self._send(signal.SIGUSR1)
        if self._requests.num_stops > self._num_stops:
            self._num_stops = self._requests.num_stops
            is_first = self._num_stops == 1
            number = len(self._running)
            points = f"{number} point{'s' if number != 1 else ''}"
            self._tell(f"Stopping: {points} {'save and stop; once more ends them at once' if is_first else 'ended'}.")
            self._send(signal.SIGTERM if is_first else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for running in self._running:
            running.work.send(number)

    def _watch(self) -> None:
        if time.monotonic() - self._watched < WATCH_S or self._num_stops:
            return
        self._watched = time.monotonic()
        for running in self._running:
            if not running.is_pruned and self._source.should_prune(running.point):
                running.is_pruned = True
                running.work.send(signal.SIGTERM)

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.work.poll()
            if code is not None:
                self._running.remove(running)
                self._free.append(running.slot)
                self._ended(running, code)

    def _ended(self, running: _Running, code: int) -> None:
        point, seconds = running.point, time.monotonic() - running.started
        point.seconds += seconds
        point.code = code
        if code == EXIT_OK:
            point.status, point.value = PointStatus.finished, objective_of(point, self._record.objective)
            measured = f"{self._record.objective} {point.value:.4f}" if point.value is not None else "no evaluation"
            self._end(point, f"finished: {measured}, {format_seconds(seconds)}")
        elif running.is_pruned:
            point.status = PointStatus.pruned
            self._end(point, "pruned: worse than the others at this share of its budget")
        elif code in (EXIT_RESUMABLE, EXIT_INTERRUPTED) or (code < 0 and self._num_stops):
            point.status = PointStatus.interrupted
            self._again_or_end(point, "interrupted; its state is saved" if code == EXIT_RESUMABLE else "interrupted")
        else:
            point.status = PointStatus.failed
            ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            point.error = f"{running.work.last_words() or 'it said nothing'} ({ending})"
            self._again_or_end(point, f"failed: {point.error}", is_worthwhile=code != EXIT_USER_ERROR)

    def _again_or_end(self, point: Point, text: str, is_worthwhile: bool = True) -> None:
        if is_worthwhile and not self._num_stops and point.attempts <= self._max_retries:
            self._say(point, f"{text}; trying again")
            self._again.append(point)
            self._record.save()
        else:
            self._end(point, text)

    def _end(self, point: Point, text: str) -> None:
        folder = point.folder
        point.root = str(folder.root) if folder else None
        self._source.ended(point)
        ended = sum(other.status not in NOT_ENDED for other in self._record.points)
        self._say(point, f"{text} ({ended} of {self._source.total})")
        self._record.save()

    def _say(self, point: Point, text: str) -> None:
        self._tell(f"[{point.number}] {point.label}: {text}")
