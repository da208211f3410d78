"""What came of a sweep: groups of seeds, importance, curves, the table and the page."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ava_exp.config.sweep import Objective
from ava_exp.sweeping.record import Point, PointStatus, SweepRecord
from ava_exp.sweeping.report import write_report
from ava_exp.sweeping.results import band, curve_of, grouped, importances
from ava_exp.sweeping.table import as_text, rows

MakePoint = Callable[..., Point]
BITS = Objective.bits_per_byte


def finished(point: Point, value: float) -> Point:
    point.status, point.value = PointStatus.finished, value
    return point


@pytest.fixture
def seeded(make_point: MakePoint) -> list[Point]:
    """Two routers with three seeds each."""
    values = {"topk": (2.0, 2.1, 2.2), "switch": (1.5, 1.6, 1.7)}
    return [
        finished(make_point(router=router, seed=str(seed)), value)
        for router, ofs in values.items()
        for seed, value in enumerate(ofs)
    ]


def test_seeds_are_one_group_the_best_first(seeded: list[Point]) -> None:
    best, second = grouped(seeded, is_maximized=False)
    assert (best.choices, best.mean, best.deviation) == ({"router": "switch"}, pytest.approx(1.6), pytest.approx(0.1))
    assert second.mean == pytest.approx(2.1)
    assert best.deviation == pytest.approx(statistics.stdev([1.5, 1.6, 1.7]))
    assert [group.label for group in grouped(seeded, is_maximized=True)] == ["router=topk", "router=switch"]


def test_groups_without_a_value_come_last(make_point: MakePoint) -> None:
    points = [make_point(router="a"), finished(make_point(router="b"), 3.0)]
    groups = grouped(points, is_maximized=False)
    assert [group.label for group in groups] == ["router=b", "router=a"]
    assert math.isnan(groups[1].mean)
    assert groups[0].deviation is None


# Importance


def naive_epsilon_squared(levels: Sequence[str], values: Sequence[float]) -> float:
    """The formula of the page, in plain loops."""
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    within = 0.0
    for level in set(levels):
        own = [value for other, value in zip(levels, values, strict=True) if other == level]
        within += sum((value - sum(own) / len(own)) ** 2 for value in own)
    return 1 - (len(values) - 1) / (len(values) - len(set(levels))) * within / total


def grid(make_point: MakePoint, value: Callable[[int, int, int], float], sizes: tuple[int, int, int]) -> list[Point]:
    return [
        finished(make_point(a=f"a{a}", b=f"b{b}", seed=str(seed)), value(a, b, seed))
        for a, b, seed in itertools.product(*map(range, sizes))
    ]


def test_importance_equals_the_formula(make_point: MakePoint) -> None:
    random = np.random.default_rng(0)
    points = grid(make_point, lambda a, b, seed: 2 * a + 0.3 * b + float(random.normal()), (3, 2, 4))
    values = [point.value or 0.0 for point in points]
    for importance in importances(points):
        levels = [point.choices[importance.key] for point in points]
        assert importance.share == pytest.approx(max(0.0, naive_epsilon_squared(levels, values)))


def test_what_alone_matters_explains_everything(make_point: MakePoint) -> None:
    found = {i.key: i.share for i in importances(grid(make_point, lambda a, b, seed: 5.0 * a, (2, 2, 2)))}
    assert found["a"] == pytest.approx(1.0)
    assert found["b"] == found["seed"] == 0.0


def test_what_does_nothing_explains_nothing_on_average(make_point: MakePoint) -> None:
    random = np.random.default_rng(1)
    levels = [f"l{i % 5}" for i in range(20)]
    shares = [naive_epsilon_squared(levels, list(random.normal(size=20))) for _ in range(400)]
    assert abs(statistics.fmean(shares)) < 0.03
    plain = 1 - (1 - statistics.fmean(shares)) * 15 / 19
    assert plain > 0.15, "eta squared would show a share where there is none"


def test_values_that_were_seen_once_have_no_importance(make_point: MakePoint) -> None:
    points = [finished(make_point(rate=str(rate)), rate) for rate in (1.0, 2.0)]
    assert [(i.key, i.share) for i in importances(points)] == [("rate", None)]


def test_many_numbers_are_put_into_bins(make_point: MakePoint) -> None:
    points = [finished(make_point(rate=str(0.1 * i), other=str(i % 2)), float(i)) for i in range(25)]
    found = {i.key: i for i in importances(points)}
    assert found["rate"].num_levels == 5
    assert found["rate"].share == pytest.approx(1.0, abs=0.1)
    assert found["other"].share == pytest.approx(0.0, abs=0.05)


def test_values_that_were_seen_again_are_not_put_together(make_point: MakePoint) -> None:
    """Two of three rates in one bin would hide that the middle one is best."""
    bits = {"3e-4": 2.9, "1e-3": 2.5, "3e-3": 2.7}
    points = [
        finished(make_point(rate=rate, seed=str(seed)), value + 0.001 * seed)
        for rate, value in bits.items()
        for seed in range(2)
    ]
    found = {i.key: i for i in importances(points)}
    assert found["rate"].num_levels == 3
    assert found["rate"].share == pytest.approx(1.0, abs=0.01)


def test_few_numbers_that_were_seen_once_are_not_put_into_bins(make_point: MakePoint) -> None:
    points = [finished(make_point(rate=str(0.1 * i)), float(i)) for i in range(8)]
    assert [i.share for i in importances(points)] == [None]


def test_equal_results_leave_nothing_to_explain(make_point: MakePoint) -> None:
    assert {i.share for i in importances(grid(make_point, lambda a, b, seed: 1.0, (2, 2, 2)))} == {0.0}
    assert importances([]) == []


# Curves


def test_a_band_is_mean_and_deviation_of_the_seeds(make_point: MakePoint, finish_run: Callable[..., object]) -> None:
    points = [make_point(seed=str(seed)) for seed in range(2)]
    finish_run(points[0], 1.0, (3.0, 2.0))
    finish_run(points[1], 2.0, (4.0, 3.0))
    tokens, mean, deviation = band(points, "bits_per_byte")
    assert tokens.tolist() == [100, 200, 300]
    assert mean.tolist() == [3.5, 2.5, 1.5]
    assert deviation.tolist() == pytest.approx([statistics.stdev((3.0, 4.0))] * 3)


def test_a_band_goes_as_far_as_the_shortest_curve(make_point: MakePoint, finish_run: Callable[..., object]) -> None:
    points = [make_point(seed=str(seed)) for seed in range(2)]
    finish_run(points[0], 1.0, (3.0, 2.0))
    finish_run(points[1], 2.0)
    tokens, mean, _ = band(points, "bits_per_byte")
    assert (tokens.tolist(), mean.tolist()) == ([100], [2.5])


def test_a_point_without_a_run_has_no_curve(make_point: MakePoint) -> None:
    assert [len(values) for values in curve_of(make_point(seed="0"), "bits_per_byte")] == [0, 0]
    assert [len(values) for values in band([make_point(seed="0")], "bits_per_byte")] == [0, 0, 0]


# The table


def test_the_table_has_a_row_for_every_group(seeded: list[Point], make_point: MakePoint) -> None:
    seeded[0].value, seeded[0].status = None, PointStatus.failed
    table = rows(seeded, BITS)
    assert table == [
        ["router", "seeds", "bits_per_byte", "status"],
        ["switch", "3 of 3", "1.6000 ± 0.1000", "finished"],
        ["topk", "2 of 3", "2.1500 ± 0.0707", "2 finished, 1 failed"],
    ]
    lines = as_text(table).splitlines()
    assert lines[0].split() == table[0]
    assert lines[1].startswith("──────  ")
    assert lines[2].index("3 of 3") == lines[0].index("seeds")


def test_a_point_alone_is_a_row(make_point: MakePoint) -> None:
    assert rows([finished(make_point(), 1.0)], BITS) == [["bits_per_byte", "status"], ["1.0000", "finished"]]


# The page


def test_the_page_says_what_came_of_it(
    record: SweepRecord, seeded: list[Point], finish_run: Callable[..., object]
) -> None:
    for point in seeded:
        finish_run(point, point.value, (4.0, 3.0))
    record.points = seeded
    write_report(record, BITS)
    text = record.report.read_text()
    assert "<code>router=switch</code> with 1.6000 ± 0.1000" in text
    assert "python -m ava_exp router=switch seed=0" in text
    assert text.count("data:image/png;base64,") == 3
    assert sorted(path.stem for path in (record.root / "figures").iterdir()) == [
        "curves",
        "importance",
        "parallel_coordinates",
    ]
    assert "epsilon squared" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "run-topk-2" in text


def test_the_page_doubts_a_difference_that_seeds_alone_make(record: SweepRecord, make_point: MakePoint) -> None:
    values = {"topk": (2.0, 3.0), "switch": (1.9, 2.9)}
    record.points = [
        finished(make_point(router=router, seed=str(seed)), value)
        for router, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    write_report(record, BITS)
    assert "The next is 0.1000 away, which is within what the seed alone changes (0.7071)." in record.report.read_text()


def test_the_page_of_clear_winners_does_not_doubt(record: SweepRecord, seeded: list[Point]) -> None:
    record.points = seeded
    write_report(record, BITS)
    assert "within what the seed alone changes" not in record.report.read_text()


def test_the_page_tells_errors_and_hides_secrets(record: SweepRecord, make_point: MakePoint) -> None:
    failed, good = make_point(router="<b>"), finished(make_point(router="topk"), 1.0)
    failed.status, failed.error = PointStatus.failed, "it <broke>"
    record.points = [failed, good]
    record.command = "python -m ava_exp tracker.uri=http://me:hunter2@host"
    write_report(record, BITS)
    text = record.report.read_text()
    assert "it &lt;broke&gt;" in text
    assert "router=&lt;b&gt;" in text
    assert "hunter2" not in text
    assert '<span class="status failed">' in text


def test_a_sweep_with_one_parameter_has_no_importance_figure(
    record: SweepRecord, make_point: MakePoint, finish_run: Callable[..., object]
) -> None:
    record.points = [finished(make_point(rate=rate), value) for rate, value in (("1e-4", 2.0), ("1e-2", 1.0))]
    for point in record.points:
        finish_run(point, point.value)
    write_report(record, BITS)
    assert sorted(path.stem for path in (record.root / "figures").iterdir()) == ["curves", "parallel_coordinates"]
    assert "every value was seen once" in record.report.read_text()


# The record


def test_a_record_is_read_back_by_run(record: SweepRecord, seeded: list[Point]) -> None:
    record.points = seeded
    seeded[0].error = "password=hunter2"
    record.save()
    earlier = record.earlier()
    assert list(earlier) == [point.run_id for point in seeded]
    assert earlier["run-switch-1"]["value"] == 1.6
    assert "hunter2" not in record.file.read_text()


def test_a_record_that_cannot_be_read_is_named(record: SweepRecord) -> None:
    record.file.write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json cannot be read"):
        record.earlier()
