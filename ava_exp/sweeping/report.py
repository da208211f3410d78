"""One self-contained page about a sweep: the best point, all points, curves, importance, parallel coordinates."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

from ava_exp.config.sweep import Objective
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord, of_status
from ava_exp.sweeping.results import Group, Importance, grouped, importances, unfinished
from ava_exp.sweeping.table import NOTHING, rows, spread
from ava_exp.tracking.files import write_atomically
from ava_exp.tracking.page import figure_section, page
from ava_exp.tracking.redaction import redact_text
from ava_exp.tracking.text import format_seconds

CAPTIONS = {
    "curves": "Validation as training goes on: the mean over seeds, and one standard deviation to both sides. "
    "At most the ten best are drawn, and the first quarter is left out.",
    "importance": "How much of the differences between points each parameter explains by itself.",
    "parallel_coordinates": "Every line is a point: through what it chose, to what came of it. "
    "The darker, the better; the best are drawn on top.",
}
FEW_POINTS = 10
FORMULA = (
    "Importance is the share of the objective's variance that lies between the values of a parameter, as epsilon "
    "squared: with <i>n</i> finished points at <i>k</i> values, 1 − (<i>n</i> − 1) / (<i>n</i> − <i>k</i>) · "
    "<i>S</i><sub>within</sub> / <i>S</i><sub>all</sub>, where <i>S</i> are sums of squared differences from the mean "
    "of the points with the same value, and of all points; not below 0. It is the effect of one parameter alone: what "
    "only two together explain is in neither. Numbers that were seen less than twice each, as in a search, are put "
    "into √<i>n</i> bins of equal size, from nine points on."
)


def write_report(record: SweepRecord, objective: Objective) -> None:
    """Draw the figures of a sweep and write `report.html` into its folder. Raises RunFolderError."""
    from ava_exp.sweeping.figures import write_figures

    figures = write_figures(record.points, objective, record.root / "figures")
    write_atomically(record.report, render(record, objective, figure_section(figures, CAPTIONS, "Figures")))


def render(record: SweepRecord, objective: Objective, figures: str) -> str:
    """Return the page."""
    points = record.points
    return page(
        record.id,
        [
            _header(record),
            _best(points, objective),
            _numbers(points),
            _groups(points, objective),
            figures,
            _importances(importances(points), sum(point.value is not None for point in points)),
            _points(record, objective),
        ],
    )


def _header(record: SweepRecord) -> str:
    left = unfinished(record.points)
    status = "finished" if not left else "failed" if of_status(left, PointStatus.failed) else "stopped"
    return (
        f'<header>\n<h1>{escape(record.id)} <span class="status {status}">{status}</span></h1>\n'
        f'<code class="command">{escape(redact_text(record.command))}</code>\n</header>\n'
    )


def _best(points: Sequence[Point], objective: Objective) -> str:
    """Say which choice came out best, and how to run it again."""
    groups = [group for group in grouped(points, objective.is_maximized) if group.values]
    if not groups:
        return '<p class="card">No point has finished yet.</p>\n'
    best = groups[0]
    words = objective.value.replace("_", " ")
    of_seeds = f", mean of {len(best.values)} seeds" if len(best.values) > 1 else ""
    command = shlex.join(["python", "-m", "ava_exp", *best.points[0].overrides])
    return (
        f'<section class="card compression">\n<div><div class="figure-of-merit">{best.mean:.4g}</div>'
        f'<div class="soft">{escape(words)}{of_seeds}</div></div>\n'
        f"<div><p>Best of {len(groups)}: <code>{escape(best.label)}</code> with {spread(best)}.{_doubt(groups)}</p>"
        f'<code class="command">{escape(redact_text(command))}</code></div>\n</section>\n'
    )


def _doubt(groups: Sequence[Group]) -> str:
    """Warn where the second best is within what seeds alone make."""
    if len(groups) < 2 or groups[0].deviation is None:
        return ""
    distance = abs(groups[1].mean - groups[0].mean)
    deviation = max(groups[0].deviation, groups[1].deviation or 0.0)
    if distance > deviation:
        return ""
    return f" The next is {distance:.4f} away, which is within what the seed alone changes ({deviation:.4f})."


def _numbers(points: Sequence[Point]) -> str:
    counts = [(status.value, len(of_status(points, status))) for status in PointStatus]
    values = [("points", str(len(points))), *((name, str(count)) for name, count in counts if count)]
    values.append(("time of all points", format_seconds(sum(point.seconds for point in points))))
    cards = "".join(f"<div><span>{label}</span><b>{value}</b></div>\n" for label, value in values)
    return f'<section class="numbers">\n{cards}</section>\n'


def _groups(points: Sequence[Point], objective: Objective) -> str:
    head, *body = rows(points, objective)
    return f'<h2>Results</h2>\n<section class="card scroll">\n{_table(head, body)}</section>\n'


def _importances(shares: Sequence[Importance], num_finished: int) -> str:
    if not shares:
        return ""
    body = [[i.key, NOTHING if i.share is None else f"{i.share:.1%}", str(i.num_levels)] for i in shares]
    missing = any(importance.share is None for importance in shares)
    why = f" “{NOTHING}”: every value was seen once, so nothing tells its effect from chance." if missing else ""
    few = f" With {num_finished} finished points such shares mean little." if num_finished < FEW_POINTS else ""
    return (
        f'<h2>Importance</h2>\n<section class="card scroll">\n<p class="soft">{FORMULA}{why}{few}</p>\n'
        f"{_table(['parameter', 'importance', 'values'], body)}</section>\n"
    )


def _points(record: SweepRecord, objective: Objective) -> str:
    """Every point with its run, in the order in which they were started."""
    body = []
    for point in record.points:
        value = NOTHING if point.value is None else f"{point.value:.4f}"
        time = format_seconds(point.seconds) if point.seconds else NOTHING
        body.append([str(point.number), point.label, point.run_id, value, point.status.value, time, point.error])
    head = ["point", "choice", "run", objective.value, "status", "time", "error"]
    if not any(row[-1] for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    return (
        "<h2>Points</h2>\n<details><summary>every point and its run</summary>\n"
        f'<section class="card scroll">\n{_table(head, body)}</section></details>\n'
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in body)
    return f"<table>\n<tr>{titles}</tr>\n{lines}</table>\n"
