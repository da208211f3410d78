"""Points for one of Hydra's launchers (`hydra/launcher=…`): it gets them all at once, and we read what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from ava_exp.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord, is_finished, objective_of
from ava_exp.tracking.redaction import redact_text

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""Hydra's default, which runs points one after the other in this process: we do that ourselves."""
Launch = Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]]
"""Runs the points with these overrides, wherever that is, and returns when all have ended."""


def is_chosen(config: DictConfig) -> bool:
    """Whether a configuration chooses a launcher that is not Hydra's default."""
    return str(config.hydra.launcher.get("_target_")) != BASIC


def launch_points(
    record: SweepRecord, points: Sequence[Point], launch: Launch, extra: Callable[[Point], list[str]]
) -> None:
    """Hand over the points that are not finished, and note how each has ended."""
    left = [point for point in points if point.status is PointStatus.waiting and not is_finished(point)]
    for point in points:
        if point.status is PointStatus.waiting and point not in left:
            point.status = PointStatus.finished
    returns = launch([[*point.overrides, *extra(point)] for point in left]) if left else []
    for point, returned in zip(left, returns, strict=True):
        point.attempts += 1
        point.code, point.error = ending(returned)
        known = {EXIT_OK: PointStatus.finished, EXIT_RESUMABLE: PointStatus.interrupted}
        point.status = known.get(point.code, PointStatus.failed)
    for point in points:
        folder = point.folder
        point.root = str(folder.root) if folder else None
        point.value = objective_of(point, record.objective) if point.status is PointStatus.finished else None
    record.save()


def ending(returned: JobReturn) -> tuple[int, str]:
    """Return a point's exit code, and what went wrong."""
    if returned.status is not JobStatus.COMPLETED:
        error = redact_text(str(returned._return_value).strip().splitlines()[-1]) if returned._return_value else ""
        return EXIT_FAILURE, error or "the launcher reports no reason"
    code = returned.return_value
    if isinstance(code, int) and code != EXIT_OK:
        return code, f"exit code {code}"
    return EXIT_OK, ""
