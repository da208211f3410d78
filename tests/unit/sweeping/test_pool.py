"""How points are run: so many at a time, tried again, skipped, stopped, pruned."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.sweeping import pool
from ava_exp.sweeping.pool import Pool, Requests
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord
from ava_exp.sweeping.source import Queue
from ava_exp.sweeping.start import Slot

MakePoint = Callable[..., Point]


class FakeWork:
    """Ends with a code after having been looked at so often; a signal ends it at once with its own code."""

    def __init__(self, cluster: Cluster, code: int, looks: int) -> None:
        self.cluster, self.code, self.looks = cluster, code, looks
        self.ended = False

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks >= 0:
            return None
        if not self.ended:
            self.ended = True
            self.cluster.at_work -= 1
        return self.code

    def send(self, number: signal.Signals) -> None:
        self.cluster.signals.append(number)
        if number != signal.SIGUSR1:
            self.looks = 0
            self.code = EXIT_RESUMABLE if number == signal.SIGTERM else -number

    def last_words(self) -> str:
        return "ava_exp: it does not work."


class Cluster:
    """Starts fake work: `codes` are the exit codes of a point's attempts, 0 where nothing is said."""

    def __init__(self) -> None:
        self.codes: dict[str, list[int]] = {}
        self.looks = 1
        self.started: list[list[str]] = []
        self.slots: list[Slot] = []
        self.signals: list[int] = []
        self.at_work = self.most_at_work = 0

    def start(self, overrides: Sequence[str], log: Path, slot: Slot) -> FakeWork:
        self.started.append(list(overrides))
        self.slots.append(slot)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        codes = self.codes.get(overrides[0], [])
        return FakeWork(self, codes.pop(0) if codes else EXIT_OK, self.looks)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POLL_S", 0.0)
    monkeypatch.setattr(pool, "WATCH_S", 0.0)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


class Run:
    """One run of a pool over points."""

    def __init__(self, record: SweepRecord, cluster: Cluster) -> None:
        self.record, self.cluster, self.lines = record, cluster, list[str]()

    def __call__(self, points: list[Point], slots: int = 1, max_retries: int = 1, source: Queue | None = None) -> None:
        self.record.points = points
        with Requests() as requests:
            Pool(
                self.record,
                source or Queue(points),
                [Slot(device=number) for number in range(slots)],
                self.cluster.start,
                requests,
                max_retries=max_retries,
                extra=lambda point: [f"name={point.run_id}"],
                tell=self.lines.append,
            ).run()


@pytest.fixture
def run(record: SweepRecord, cluster: Cluster) -> Run:
    return Run(record, cluster)


@pytest.fixture
def points(make_point: MakePoint) -> list[Point]:
    return [make_point(seed=str(seed)) for seed in range(5)]


def test_all_points_run_in_order_with_what_is_added(run: Run, cluster: Cluster, points: list[Point]) -> None:
    run(points)
    assert cluster.started == [[f"seed={seed}", f"name=run-{seed}"] for seed in range(5)]
    assert {point.status for point in points} == {PointStatus.finished}
    assert cluster.most_at_work == 1


def test_so_many_at_a_time_each_in_its_own_slot(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.looks = 3
    run(points, slots=2)
    assert cluster.most_at_work == 2
    assert {slot.device for slot in cluster.slots[:2]} == {0, 1}
    assert len(cluster.started) == 5


def test_finished_points_are_left_out(
    run: Run, cluster: Cluster, points: list[Point], finish_run: Callable[..., object]
) -> None:
    finish_run(points[1], 1.5)
    run(points)
    assert [texts[0] for texts in cluster.started] == ["seed=0", "seed=2", "seed=3", "seed=4"]
    assert (points[1].status, points[1].value) == (PointStatus.finished, 1.5)
    assert "[1] seed=1: was finished before (2 of 5)" in run.lines


def test_a_point_with_a_larger_budget_is_not_finished(
    run: Run, cluster: Cluster, points: list[Point], finish_run: Callable[..., object]
) -> None:
    finish_run(points[0], 1.5)
    points[0].config.budget.steps = 100_000
    run(points[:1])
    assert len(cluster.started) == 1


def test_a_run_that_was_opened_again_is_not_finished(
    run: Run, cluster: Cluster, points: list[Point], finish_run: Callable[..., object]
) -> None:
    finish_run(points[0], 1.5)
    folder = points[0].folder
    assert folder is not None
    later = folder.status.stat().st_mtime + 5
    os.utime(folder.config, (later, later))
    run(points[:1])
    assert len(cluster.started) == 1


def test_a_point_that_fails_is_told_at_once_and_tried_again(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.codes = {"seed=0": [EXIT_FAILURE, EXIT_OK]}
    run(points[:2])
    assert [texts[0] for texts in cluster.started] == ["seed=0", "seed=0", "seed=1"]
    assert run.lines[1] == "[0] seed=0: failed: ava_exp: it does not work. (exit code 1); trying again"
    assert (points[0].status, points[0].attempts, points[0].error) == (PointStatus.finished, 2, "")


def test_retries_have_an_end(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.codes = {"seed=0": [EXIT_FAILURE] * 9}
    run(points[:2], max_retries=2)
    assert [texts[0] for texts in cluster.started] == ["seed=0"] * 3 + ["seed=1"]
    assert (points[0].status, points[0].code) == (PointStatus.failed, EXIT_FAILURE)
    assert points[1].status is PointStatus.finished


def test_a_mistake_of_the_user_is_not_tried_again(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.codes = {"seed=0": [EXIT_USER_ERROR]}
    run(points[:1], max_retries=5)
    assert len(cluster.started) == 1
    assert points[0].status is PointStatus.failed


def test_a_killed_point_says_by_what(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.codes = {"seed=0": [-signal.SIGKILL]}
    run(points[:1], max_retries=0)
    assert "killed by SIGKILL" in points[0].error


def test_a_point_that_somebody_stopped_goes_on(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.codes = {"seed=0": [EXIT_RESUMABLE]}
    run(points[:1])
    assert len(cluster.started) == 2
    assert points[0].status is PointStatus.finished


def test_two_points_of_one_run_are_never_at_work_together(
    run: Run, cluster: Cluster, make_point: MakePoint, finish_run: Callable[..., object]
) -> None:
    twins = [make_point(seed="0"), make_point(seed="0")]
    cluster.looks = 3
    run(twins, slots=2)
    assert cluster.most_at_work == 1
    assert len(cluster.started) == 2


@pytest.fixture
def soon() -> Iterator[Callable[[signal.Signals], None]]:
    """Send this process a signal in a moment, as from outside."""
    timers: list[threading.Thread] = []

    def wait_and_send(number: signal.Signals, after_s: float) -> None:
        while signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            time.sleep(0.01)  # a signal that nobody waits for would end the tests
        time.sleep(after_s)
        os.kill(os.getpid(), number)

    def send(number: signal.Signals, after_s: float = 0.2) -> None:
        timers.append(threading.Thread(target=wait_and_send, args=(number, after_s), daemon=True))
        timers[-1].start()

    yield send
    for timer in timers:
        timer.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_request_to_stop_lets_points_save_and_starts_no_more(
    run: Run, cluster: Cluster, points: list[Point], soon: Callable[[signal.Signals], None], number: signal.Signals
) -> None:
    cluster.looks = 10**9
    soon(number)
    run(points, slots=2)
    assert cluster.signals == [signal.SIGTERM, signal.SIGTERM]
    statuses = [point.status for point in points]
    assert statuses == [PointStatus.interrupted] * 2 + [PointStatus.waiting] * 3
    assert len(cluster.started) == 2


def test_a_second_request_ends_points_that_do_not_stop(
    run: Run,
    cluster: Cluster,
    points: list[Point],
    soon: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster.looks = 10**9
    patient = FakeWork.send

    def stubborn(self: FakeWork, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            patient(self, number)

    monkeypatch.setattr(FakeWork, "send", stubborn)
    soon(signal.SIGINT, 0.1)
    soon(signal.SIGINT, 0.5)
    started = time.monotonic()
    run(points[:1])
    assert time.monotonic() - started >= 0.4
    assert points[0].status is PointStatus.interrupted


def test_a_request_to_save_is_handed_on(
    run: Run, cluster: Cluster, points: list[Point], soon: Callable[..., None]
) -> None:
    cluster.looks = 10**9
    soon(signal.SIGUSR1, 0.1)
    soon(signal.SIGTERM, 0.5)
    run(points[:1])
    assert cluster.signals == [signal.SIGUSR1, signal.SIGTERM]


class Pruning(Queue):
    """Gives up every point that is looked at."""

    def should_prune(self, point: Point) -> bool:
        return True


def test_a_pruned_point_is_stopped_and_not_tried_again(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.looks = 10**9
    run(points[:2], source=Pruning(points[:2]), max_retries=5)
    assert cluster.signals == [signal.SIGTERM] * 2
    assert [point.status for point in points[:2]] == [PointStatus.pruned] * 2
    assert len(cluster.started) == 2


def test_the_record_is_up_to_date_after_every_point(
    run: Run, record: SweepRecord, cluster: Cluster, points: list[Point]
) -> None:
    seen: list[list[str]] = []
    start = cluster.start

    def spying(overrides: Sequence[str], log: Path, slot: Slot) -> FakeWork:
        seen.append([point["status"] for point in record.earlier().values()])
        return start(overrides, log, slot)

    cluster.start = spying  # type: ignore[method-assign]
    run(points[:3])
    assert seen[1:] == [["finished", "waiting", "waiting"], ["finished", "finished", "waiting"]]
    assert [point["status"] for point in record.earlier().values()] == ["finished"] * 3


def test_after_a_bug_no_point_stays_behind(run: Run, cluster: Cluster, points: list[Point]) -> None:
    cluster.looks = 10**9

    class Broken(Queue):
        def should_prune(self, point: Point) -> bool:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(points[:1], source=Broken(points[:1]))
    assert cluster.signals == [signal.SIGTERM]
