"""A sweep from its command line to its report."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from ava_exp.config.bounds import BOUNDS, value_at
from ava_exp.config.compose import composition_errors_in_one_line, to_run_config
from ava_exp.config.faults import is_blocked
from ava_exp.config.identity import run_id, to_plain
from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.machine import MLflowConfig
from ava_exp.config.points import PointComposer
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PipelineStageConfig, PretrainConfig
from ava_exp.config.validate import validate
from ava_exp.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR, ConfigError, UserError, must_be
from ava_exp.sweeping.definition import Definition, define, varying
from ava_exp.sweeping.handover import Launch, ending, is_chosen, launch_points
from ava_exp.sweeping.jobs import AT_WORK, PointJobs
from ava_exp.sweeping.pool import Pool, Requests, Tell
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord, definition_hash, of_status
from ava_exp.sweeping.results import grouped, unfinished
from ava_exp.sweeping.source import PointSource, Queue
from ava_exp.sweeping.start import LocalWork, Start, slots
from ava_exp.sweeping.table import as_text, rows
from ava_exp.tracking.files import write_atomically
from ava_exp.tracking.lock import RunLock
from ava_exp.tracking.redaction import redact_text
from ava_exp.tracking.sweep_tracker import SweepTracker
from ava_exp.tracking.trackers import RunStatus

IN_USE = "Wait for it, or stop it: the same command then goes on."


def run_sweep(
    config: DictConfig,
    arguments: Sequence[str],
    *,
    params: Mapping[str, str],
    max_parallel: int | None,
    loader: ConfigLoader,
    task: TaskFunction,
    launch: Launch,
    start: Start = LocalWork,
) -> int:
    """Run every point that a command line asks for, and return the exit code.

    Points that train run in processes of their own, are kept on record, compared and reported. Those of any other stage
    run here, one after the other, as `task`, which remembers how they ended.

    Args:
        config: what Hydra composed of `arguments`, the overrides of the command line.
        params: what varies by the settings of Hydra's sweeper, by key.
        max_parallel: the most points that run at a time by those settings.
        loader: composes the points.
        launch: runs all points with one of Hydra's launchers, where one is chosen.
        start: how a point that trains is started.

    Raises:
        UserError: the sweep cannot be composed, or its folder cannot be used.
    """
    with composition_errors_in_one_line():
        assert isinstance(loader, ConfigLoaderImpl)
        composer = PointComposer(loader)
        definition = define(config, arguments, params, composer)
        settings = definition.settings
        if max_parallel is not None:
            settings.num_parallel = min(settings.num_parallel, max_parallel)
            settings.devices = settings.devices[:max_parallel]
        points, composed = _compose(definition, composer)
        record = _open_record(config, definition, points, composer)
        chosen = launch if is_chosen(config) else None
        if chosen is not None and settings.optuna.space:
            raise ConfigError(
                "`hydra/launcher` gets all points at once, and a search has them one by one: leave it out."
            )
        _check_jobs(definition, points, chosen is not None)
        if isinstance(points[0].config.stage, PipelineStageConfig):
            raise ConfigError("`stage=pipeline` is one at a time: leave `-m` out, or sweep over one of its stages.")
    if not isinstance(points[0].config.stage, PretrainConfig):
        return _run_here(points, composed, task) if chosen is None else _run_there(points, chosen)
    try:
        with RunLock(record.root / "sweep.lock", IN_USE):
            return Sweep(definition, record, points, composer, start, chosen).run()
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - a bug keeps its traceback, which Hydra would take for a composition error's
        traceback.print_exc()
        return EXIT_FAILURE


def _compose(definition: Definition, composer: PointComposer) -> tuple[list[Point], list[DictConfig]]:
    """Compose every point, so that a wrong one is told before any runs. A search has one, to see that it composes."""
    composed, points = [], []
    sets = definition.points if not definition.settings.optuna.space else [_sample(definition, composer)]
    choices = varying(sets, composer)
    for number, (overrides, chosen) in enumerate(zip(sets, choices, strict=True)):
        config = composer.compose(overrides)
        run = to_run_config(config)
        composed.append(config)
        points.append(Point(number=number, overrides=overrides, choices=chosen, run_id=identity(run), config=run))
    return points, composed


def _sample(definition: Definition, composer: PointComposer) -> list[str]:
    """Return some point of a search: the first value of everything."""
    texts = []
    for key, text in definition.settings.optuna.space.items():
        override = composer.parse(f"{key}={text}")
        value: Any = getattr(override.value(), "start", None)
        if override.is_discrete_sweep():
            value = next(iter(override.sweep_string_iterator()))
        texts.append(f"{key}={value}")
    return [*definition.common, *texts]


def identity(run: RunConfig) -> str:
    """Return the id of a point's run; where that starts from another's weights, their name is a part of it."""
    if run.init_from is None:
        return run_id(run)
    from ava_exp.stages.runs import with_initial_weights

    return run_id(with_initial_weights(run)[0])


def _open_record(
    config: DictConfig, definition: Definition, points: Sequence[Point], composer: PointComposer
) -> SweepRecord:
    """Make the folder of a sweep: the same for the same points, however many run at a time, and for how long."""
    settings = definition.settings
    what: dict[str, Any] = {"stage": type(points[0].config.stage).name, "points": sorted(p.run_id for p in points)}
    if settings.optuna.space:
        what["space"] = dict(settings.optuna.space)
        what["search"] = [settings.objective.value, settings.optuna.seed]
    root = Path(str(config.output_dir)) / "sweeps" / f"{definition.name}-{definition_hash(what)}"
    record = SweepRecord(
        root=root,
        name=definition.name,
        command=shlex.join(["python", "-m", "ava_exp", *sys.argv[1:]]),
        objective=settings.objective.value,
        definition=_plain_settings(definition),
    )
    record.create()
    write_atomically(root / "multirun.yaml", redact_text(OmegaConf.to_yaml(config)))
    return record


def _plain_settings(definition: Definition) -> dict[str, Any]:
    return asdict(definition.settings) | {"objective": definition.settings.objective.value}


def _run_here(points: Sequence[Point], composed: Sequence[DictConfig], task: TaskFunction) -> int:
    """Run points of a stage that does not train; of a search, one."""
    for point, config in zip(points, composed, strict=True):
        print_line(f"── point {point.number}: {' '.join(point.overrides)}")
        task(config)
    return EXIT_OK


def _run_there(points: Sequence[Point], launch: Launch) -> int:
    """Let a launcher of Hydra run points of a stage that does not train."""
    returns = launch([point.overrides for point in points])
    codes = [ending(returned)[0] for returned in returns]
    return next((code for code in codes if code != EXIT_OK), EXIT_OK)


class Sweep:
    """A sweep of points that train, in its folder."""

    def __init__(
        self,
        definition: Definition,
        record: SweepRecord,
        points: list[Point],
        composer: PointComposer,
        start: Start,
        launch: Launch | None = None,
    ) -> None:
        self._launch = launch
        self._definition, self._record, self._composer, self._start = definition, record, composer, start
        self._settings = definition.settings
        self._sample = points[0]
        self._check_settings()
        if self._settings.optuna.space:
            self._source: PointSource = self._open_search()
        else:
            self._check_distinct(points)
            record.points = points
            self._take_over_earlier(points)
            self._source = Queue([point for point in points if self._is_sound(point)], total=len(points))

    def run(self) -> int:
        """Run what is left to run, compare, report; return the exit code."""
        tell = print_line
        tell(f"Sweep folder: {self._record.root}")
        tracker = self._open_tracker()
        self._record.save()
        is_stopped = False
        if self._launch is not None:
            launch_points(self._record, self._record.points, self._launch, self._tags)
        elif self._are_jobs:
            self._run_jobs(tell)
        else:
            is_stopped = self._run_pool(tell)
        code = self._exit_code(is_stopped)
        self._conclude(code, tell)
        if tracker is not None and not self._at_work():
            status = {EXIT_OK: RunStatus.finished, EXIT_RESUMABLE: RunStatus.stopped}.get(code, RunStatus.failed)
            tracker.finish(status, self._results(), [self._record.report, self._record.file])
        return code

    def _run_pool(self, tell: Tell) -> bool:
        """Run the points in processes of this machine; return whether somebody asked to stop."""
        places = slots(self._sample.config, self._settings.num_parallel, self._settings.devices)
        with Requests() as requests:
            Pool(
                self._record,
                self._source,
                places,
                self._start,
                requests,
                max_retries=self._settings.max_retries,
                extra=self._tags,
                tell=tell,
            ).run()
            return requests.num_stops > 0

    @property
    def _are_jobs(self) -> bool:
        """Whether points are submitted together; a search, which has them one by one, waits for a job of each."""
        return isinstance(self._sample.config.launcher, SlurmLauncherConfig) and not self._settings.optuna.space

    def _run_jobs(self, tell: Tell) -> None:
        """Let jobs run the points, and wait for them if that is wished."""
        launcher = self._sample.config.launcher
        assert isinstance(launcher, SlurmLauncherConfig)
        PointJobs(
            self._record,
            [point for point in self._record.points if point.status is PointStatus.waiting],
            num_parallel=self._settings.num_parallel,
            max_retries=self._settings.max_retries,
            extra=self._tags,
            tell=tell,
        ).run(waits=launcher.wait)

    def _at_work(self) -> list[Point]:
        return [point for point in self._record.points if point.status in AT_WORK]

    def _check_settings(self) -> None:
        """The settings of a sweep are no part of its points' configurations: their bounds are looked at here."""
        config = self._sample.config
        config.sweep = self._settings
        for bound in BOUNDS:
            for key in bound.keys:
                value = value_at(config, key) if key.startswith("sweep.") else None
                if value is not None and not bound.holds(value):
                    raise ConfigError(must_be(key, bound.expected, value))

    def _check_distinct(self, points: Sequence[Point]) -> None:
        """Raise ConfigError if two points would be the same run: both would train one model."""
        seen: dict[tuple[str, str], Point] = {}
        for point in points:
            first = seen.setdefault((point.config.output_dir, point.run_id), point)
            if first is not point:
                raise ConfigError(
                    f"points {first.number} ({first.label}) and {point.number} ({point.label}) are the same run, "
                    f"{point.run_id}: what they differ in makes no other run. Give each a `name`, or leave one out."
                )

    def _take_over_earlier(self, points: Sequence[Point]) -> None:
        """Keep what earlier processes of this sweep measured: the time that its points took."""
        earlier = self._record.earlier()
        for point in points:
            if known := earlier.get(point.run_id):
                point.seconds = float(known.get("seconds") or 0.0)

    def _is_sound(self, point: Point) -> bool:
        """Whether a point may start; one with faults is told at once and counts as failed."""
        faults = validate(point.config)
        if not is_blocked(faults):
            return True
        point.status, point.code, point.error = PointStatus.failed, EXIT_USER_ERROR, str(faults[0])
        print_line(f"[{point.number}] {point.label}: failed: {point.error}")
        return False

    def _open_search(self) -> PointSource:
        from ava_exp.sweeping.search import Search, dimensions

        def make_point(overrides: list[str], choices: dict[str, str], trial: int) -> Point:
            whole = [*self._definition.common, *overrides]
            run = to_run_config(self._composer.compose(whole))
            point = Point(
                number=len(self._record.points),
                overrides=whole,
                choices=choices,
                run_id=identity(run),
                config=run,
                trial=trial,
            )
            self._record.points.append(point)
            return point

        search = Search(
            self._settings.optuna,
            self._settings.objective,
            dimensions(self._settings.optuna.space, self._composer),
            make_point,
            name=self._record.id,
            folder=self._record.root,
        )
        self._take_over_earlier(search.earlier())
        return search

    def _open_tracker(self) -> SweepTracker | None:
        config = self._sample.config
        if not isinstance(config.tracker, MLflowConfig):
            return None
        tracker = SweepTracker(config.tracker, self._record.id, Path(config.output_dir))
        tracker.start({"definition": str(to_plain(config)["sweep"]), "command": self._record.command})
        return tracker

    def _tags(self, point: Point) -> list[str]:
        is_tracked = isinstance(point.config.tracker, MLflowConfig)
        return [f"++tracker.tags.sweep={self._record.id}"] if is_tracked else []

    def _exit_code(self, is_stopped: bool) -> int:
        points = self._record.points
        if is_stopped or of_status(points, PointStatus.interrupted):
            return EXIT_RESUMABLE
        codes = [point.code for point in self._failed()]
        if not codes:
            return EXIT_OK
        return EXIT_USER_ERROR if all(code == EXIT_USER_ERROR for code in codes) else EXIT_FAILURE

    def _conclude(self, code: int, tell: Tell) -> None:
        """Compare, report, and say again what failed."""
        points, objective = self._record.points, self._settings.objective
        self._record.save()
        if any(point.value is not None for point in points):
            from ava_exp.sweeping.report import write_report

            tell(as_text(rows(points, objective)))
            write_report(self._record, objective)
            tell(f"Report: {self._record.report}")
        for point in self._failed():
            complain(f"[{point.number}] {point.label} failed: {point.error}. Log: {self._record.log(point)}")
        if code == EXIT_RESUMABLE:
            left = len(unfinished(points))
            complain(f"the sweep was stopped; {left} of {len(points)} points are left. The same command goes on.")
        elif code != EXIT_OK:
            complain(f"{len(self._failed())} of {len(points)} points failed. The same command tries again.")
        elif self._at_work():
            tell("The same command looks again: it reports what has finished and submits what is missing.")

    def _failed(self) -> list[Point]:
        """Return what failed now; a search does not repeat what failed in earlier processes."""
        return [point for point in of_status(self._record.points, PointStatus.failed) if point.code is not None]

    def _results(self) -> dict[str, float]:
        """Return what the parent run in the tracker gets: the best group's objective and counts."""
        points, objective = self._record.points, self._settings.objective
        counts = {status.value: float(len(of_status(points, status))) for status in PointStatus}
        groups = [group for group in grouped(points, objective.is_maximized) if group.values]
        best = {f"best/{objective.value}": groups[0].mean} if groups else {}
        return best | {f"points/{name}": count for name, count in counts.items() if count}


def print_line(text: str) -> None:
    """Say something at once, also to a file or a pipe."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Say what went wrong, on standard error."""
    print(f"ava_exp: {text}", file=sys.stderr, flush=True)


def _check_jobs(definition: Definition, points: Sequence[Point], is_handed_over: bool) -> None:
    """Raise ConfigError for points that cannot be jobs as they are asked for."""
    launchers = [point.config.launcher for point in points]
    jobs = [launcher for launcher in launchers if isinstance(launcher, SlurmLauncherConfig)]
    if not jobs:
        return
    if len(jobs) < len(launchers):
        raise ConfigError("`launcher` must be the same for all points of a sweep.")
    stage = points[0].config.stage
    if stage.computes and not stage.trains:
        raise ConfigError(must_be("launcher", f"local in a sweep of `stage={stage.name}`, which runs here", "slurm"))
    if definition.settings.devices:
        raise ConfigError(must_be("sweep.devices", "empty with `launcher=slurm`", definition.settings.devices))
    who = "a search" if definition.settings.optuna.space else "`hydra/launcher`" if is_handed_over else None
    if who is not None and not all(launcher.wait for launcher in jobs):
        expected = f"true with {who}, which needs to know how a point ended"
        raise ConfigError(must_be("launcher.wait", expected, False))
