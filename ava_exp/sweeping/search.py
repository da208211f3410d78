"""Points that Optuna [akiba2019optuna] chooses, one after the other, from how the earlier ones went."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from ava_exp.config.points import PointComposer
from ava_exp.config.sweep import Objective, OptunaConfig
from ava_exp.errors import ConfigError, must_be
from ava_exp.sweeping.record import Point, PointStatus
from ava_exp.tracking.metrics import Record, parse_record

if TYPE_CHECKING:
    import optuna

OVERRIDES = "overrides"
OWNER = "owner"
"""Attributes of a trial: its point's overrides, and the folder of the sweep that runs it."""
SIGNIFICANT_DIGITS = 4
MakePoint = Callable[[list[str], dict[str, str], int], Point]
"""Makes a point of its own overrides, what it has chosen, and the number of its trial."""
Suggest = Callable[["optuna.trial.Trial"], str]


def dimensions(space: Mapping[str, str], composer: PointComposer) -> dict[str, Suggest]:
    """Return how each value is suggested, by key or group, as text. Raises ConfigError for what is no choice."""
    return {key: _dimension(key, composer.parse(f"{key}={text}"), text) for key, text in space.items()}


def _dimension(key: str, override: Override, text: str) -> Suggest:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return _interval(key, value)
    if isinstance(value, RangeSweep) and isinstance(value.range(), range):
        return _range(key, value)
    if override.is_discrete_sweep():
        options = list(override.sweep_string_iterator())
        return lambda trial: str(trial.suggest_categorical(key, options))
    expected = "`interval(low, high)`, `range(first, end)` or several values"
    raise ConfigError(must_be(f"sweep.optuna.space.{key}", expected, text))


def _interval(key: str, interval: IntervalSweep) -> Suggest:
    low, high, is_log = interval.start, interval.end, "log" in interval.tags
    if low is None or high is None or not low < high or (is_log and low <= 0):
        expected = "`interval(low, high)` with low below high, and above 0 with `tag(log, …)`"
        raise ConfigError(must_be(f"sweep.optuna.space.{key}", expected, f"interval({low}, {high})"))
    if isinstance(low, int) and isinstance(high, int):
        return lambda trial: str(trial.suggest_int(key, low, high, log=is_log))
    return lambda trial: _rounded(trial.suggest_float(key, low, high, log=is_log), low, high)


def _rounded(value: float, low: float, high: float) -> str:
    """Write a number with as many digits as matter: a command that people read. Inside of its bounds as it was."""
    return repr(min(high, max(low, float(f"{value:.{SIGNIFICANT_DIGITS}g}"))))


def _range(key: str, given: RangeSweep) -> Suggest:
    values = list(given.range())
    if len(values) < 2:
        raise ConfigError(must_be(f"sweep.optuna.space.{key}", "a range of several values", values))
    low, high, step = int(min(values)), int(max(values)), abs(int(given.step))
    return lambda trial: str(trial.suggest_int(key, low, high, step=step))


class Search:
    """A source of points. What Optuna knows is in its storage: a search that was interrupted goes on.

    Raises:
        ConfigError: Optuna is not installed, or its storage cannot be used.
    """

    def __init__(
        self,
        settings: OptunaConfig,
        objective: Objective,
        suggestions: Mapping[str, Suggest],
        make_point: MakePoint,
        *,
        name: str,
        folder: Path,
    ) -> None:
        self._settings, self._objective = settings, objective
        self.total = settings.num_trials
        self._suggestions, self._make_point = suggestions, make_point
        self._owner = f"{socket.gethostname()}:{folder.resolve()}"
        self._study = _open_study(settings, objective, name, folder)
        self._trials: dict[int, optuna.trial.Trial] = {}
        self._evaluations: dict[int, Evaluations] = {}
        self._reported: dict[int, int] = {}
        self._interrupted = deque(self._own_trials("RUNNING"))

    def earlier(self) -> list[Point]:
        """Return the points of this sweep that have ended, with how they went."""
        ended = {"COMPLETE": PointStatus.finished, "PRUNED": PointStatus.pruned, "FAIL": PointStatus.failed}
        points = []
        for frozen in sorted(self._own_trials(*ended), key=lambda trial: int(trial.number)):
            point = self._point_of(frozen)
            point.status = ended[frozen.state.name]
            point.value = frozen.value if point.status is PointStatus.finished else None
            points.append(point)
        return points

    def next(self) -> Point | None:
        import optuna

        if self._interrupted:
            frozen = self._interrupted.popleft()
            point = self._point_of(frozen)
            self._trials[frozen.number] = optuna.trial.Trial(self._study, frozen._trial_id)
            self._reported[frozen.number] = len(frozen.intermediate_values)
            return point
        if len(self._study.get_trials(deepcopy=False)) >= self._settings.num_trials:
            return None
        trial = self._study.ask()
        choices = {key: suggest(trial) for key, suggest in self._suggestions.items()}
        overrides = [f"{key}={text}" for key, text in choices.items()]
        trial.set_user_attr(OWNER, self._owner)
        trial.set_user_attr(OVERRIDES, json.dumps(choices))
        self._trials[trial.number] = trial
        return self._make_point(overrides, choices, trial.number)

    def ended(self, point: Point) -> None:
        from optuna.trial import TrialState

        if point.trial is None or point.status is PointStatus.interrupted:
            return  # Optuna goes on regarding it as running, and the next process of this sweep resumes it
        trial = self._trials.pop(point.trial)
        if point.status is PointStatus.pruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        elif point.value is None or point.status is PointStatus.failed:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, point.value)

    def should_prune(self, point: Point) -> bool:
        if not self._settings.pruning or point.trial not in self._trials:
            return False
        trial, folder = self._trials[point.trial], point.folder
        if folder is None:
            return False
        if point.trial not in self._evaluations:
            reported = self._reported.get(point.trial, 0)
            self._evaluations[point.trial] = Evaluations(folder.metrics, self._objective.value, reported)
        seen = self._evaluations[point.trial]
        is_new = False
        for number, value in seen.read():
            trial.report(value, number)
            is_new = True
        return is_new and bool(trial.should_prune())

    def close(self) -> None:
        """What runs or waits is left as it is."""

    def _own_trials(self, *states: str) -> list[Any]:
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if t.state.name in states and t.user_attrs.get(OWNER) == self._owner]

    def _point_of(self, frozen: Any) -> Point:
        choices = json.loads(frozen.user_attrs[OVERRIDES])
        return self._make_point([f"{key}={text}" for key, text in choices.items()], choices, frozen.number)


def _open_study(settings: OptunaConfig, objective: Objective, name: str, folder: Path) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("`sweep.optuna` needs Optuna: `pip install 'ava_exp[sweep]'`.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = settings.storage or f"sqlite:///{folder.resolve() / 'optuna.db'}"
    startup, warmup = settings.num_startup_trials, settings.num_warmup_evaluations
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize" if objective.is_maximized else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup),
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(must_be("sweep.optuna.storage", "a database that Optuna can use", reason)) from error
    # A sampler does not keep what it has drawn: with one seed a resumed search would draw the same points again.
    seed = settings.seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, constant_liar=True)
    return study


class Evaluations:
    """Reads what is new in a metrics file: a run's evaluations, numbered, without the last one on the whole split."""

    def __init__(self, path: Path, objective: str, told: int = 0) -> None:
        self._path, self._objective = path, objective
        self._inode: int | None = None
        self._position = 0
        self._seen: list[int] = []
        self._told = told

    def read(self) -> list[tuple[int, float]]:
        """Return (number, objective) of every evaluation that was not returned before."""
        new: list[tuple[int, float]] = []
        for record in self._new_records():
            if record["step"] in self._seen:
                continue
            self._seen.append(record["step"])
            if len(self._seen) > self._told:
                self._told = len(self._seen)
                new.append((self._told, float(record[self._objective])))
        return new

    def _new_records(self) -> list[Record]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._inode or state.st_size < self._position:  # the file was cut back
                self._inode, self._position, self._seen = state.st_ino, 0, []
            file.seek(self._position)
            lines = []
            while (line := file.readline()).endswith(b"\n"):
                self._position = file.tell()
                if b'"eval"' in line:
                    lines.append(line)
        records = [parse_record(line) for line in lines]
        return [r for r in records if r["kind"] == "eval" and not r.get("final") and self._objective in r]
