"""Points that Optuna chooses: what it may choose, what it learns, what it gives up, and how it goes on."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ava_exp.config.points import PointComposer
from ava_exp.config.sweep import Objective, OptunaConfig
from ava_exp.errors import ConfigError
from ava_exp.sweeping.record import Point, PointStatus
from ava_exp.sweeping.search import Evaluations, Search, dimensions

optuna = pytest.importorskip("optuna")
MakePoint = Callable[..., Point]
SPACE = {"optimizer.learning_rate": "tag(log, interval(1e-4, 1e-1))", "model.norm": "rms,layer"}


@pytest.fixture(scope="module")
def composer() -> PointComposer:
    return PointComposer()


@pytest.fixture
def open_search(composer: PointComposer, make_point: MakePoint, tmp_path: Path) -> Callable[..., Search]:
    """Open the search of one sweep, anew at every call, as further processes of it do."""

    def make(overrides: list[str], choices: dict[str, str], trial: int) -> Point:
        point = make_point(**choices)
        point.overrides, point.trial = overrides, trial
        return point

    def open_it(folder: str = "sweep", space: dict[str, str] = SPACE, **settings: object) -> Search:
        (tmp_path / folder).mkdir(exist_ok=True)
        config = OptunaConfig(space=space, **settings)  # type: ignore[arg-type]
        suggestions = dimensions(space, composer)
        return Search(
            config, Objective.bits_per_byte, suggestions, make, name="tests-01234567", folder=tmp_path / folder
        )

    return open_it


def end(search: Search, point: Point, value: float | None, status: PointStatus = PointStatus.finished) -> None:
    point.status, point.value = status, value
    search.ended(point)


def choose(search: Search, count: int) -> list[dict[str, str]]:
    """Run `count` points whose objective is the distance of the learning rate from 1e-2, in powers of ten."""
    choices = []
    for _ in range(count):
        point = search.next()
        assert point is not None
        choices.append(point.choices)
        end(search, point, abs(math.log10(float(point.choices["optimizer.learning_rate"])) + 2))
    return choices


def test_points_are_drawn_from_the_space_and_end(open_search: Callable[..., Search]) -> None:
    search = open_search(num_trials=12)
    points = choose(search, 12)
    assert all(1e-4 <= float(point["optimizer.learning_rate"]) <= 1e-1 for point in points)
    assert {point["model.norm"] for point in points} == {"rms", "layer"}
    assert search.next() is None


def test_a_seed_gives_the_same_points(open_search: Callable[..., Search]) -> None:
    first, same, other = (choose(open_search(name, seed=seed), 8) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == same != other


def test_it_learns(open_search: Callable[..., Search]) -> None:
    rates = [float(c["optimizer.learning_rate"]) for c in choose(open_search(num_trials=40, num_startup_trials=10), 40)]
    distance = [abs(math.log10(rate) + 2) for rate in rates]
    assert sum(distance[-15:]) / 15 < 0.6 * sum(distance[:10]) / 10


def test_a_search_goes_on_and_does_not_repeat_itself(open_search: Callable[..., Search]) -> None:
    before = choose(open_search(num_trials=10), 4)
    search = open_search(num_trials=10)
    earlier = search.earlier()
    assert [point.choices for point in earlier] == before
    assert {point.status for point in earlier} == {PointStatus.finished}
    after = choose(search, 6)
    assert search.next() is None
    assert not [point for point in after if point in before]


def test_a_point_that_was_interrupted_comes_first(open_search: Callable[..., Search]) -> None:
    search = open_search()
    point = search.next()
    assert point is not None
    end(search, point, None, PointStatus.interrupted)
    again = open_search()
    resumed = again.next()
    assert resumed is not None
    assert (resumed.choices, resumed.trial) == (point.choices, point.trial)
    end(again, resumed, 1.0)
    assert [(p.trial, p.value) for p in open_search().earlier()] == [(0, 1.0)]


def test_a_point_of_another_folder_is_left_to_it(open_search: Callable[..., Search], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    mine, theirs = open_search("mine", storage=storage), open_search("theirs", storage=storage)
    first = mine.next()
    assert first is not None
    second = open_search("theirs", storage=storage).next()
    assert second is not None
    assert second.trial != first.trial
    assert theirs.earlier() == []


def test_a_failed_point_is_known_to_have_failed(open_search: Callable[..., Search]) -> None:
    search = open_search()
    for status in (PointStatus.failed, PointStatus.pruned):
        point = search.next()
        assert point is not None
        end(search, point, None, status)
    assert [point.status for point in open_search().earlier()] == [PointStatus.failed, PointStatus.pruned]


def test_what_is_worse_than_the_median_is_pruned(
    open_search: Callable[..., Search], finish_run: Callable[..., object]
) -> None:
    search = open_search(num_startup_trials=3, num_warmup_evaluations=1, num_trials=9)
    for level in (1.0, 1.1, 1.2):
        point = search.next()
        assert point is not None
        finish_run(point, level, (level + 3, level + 2, level + 1))
        assert not search.should_prune(point)
        end(search, point, level)
    good, bad = search.next(), search.next()
    assert good is not None and bad is not None
    finish_run(good, 0.5, (3.0, 2.0, 1.0))
    finish_run(bad, 9.0, (9.0, 9.0, 9.0))
    assert not search.should_prune(good)
    assert search.should_prune(bad)


def test_nothing_is_pruned_where_that_is_off(
    open_search: Callable[..., Search], finish_run: Callable[..., object]
) -> None:
    search = open_search(num_startup_trials=1, num_warmup_evaluations=0, pruning=False)
    for level in (1.0, 1.0, 9.0):
        point = search.next()
        assert point is not None
        finish_run(point, level, (level, level, level))
        assert not search.should_prune(point)
        end(search, point, level)


@pytest.mark.parametrize(
    ("text", "low", "high", "is_whole"),
    [("int(interval(1, 8))", 1, 8, True), ("range(2, 9, 2)", 2, 8, True), ("interval(0, 2)", 0, 2, False)],
)
def test_numbers_are_whole_where_that_is_asked_for(
    composer: PointComposer, text: str, low: float, high: float, is_whole: bool
) -> None:
    suggest = dimensions({"x": text}, composer)["x"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    texts = [suggest(study.ask()) for _ in range(60)]
    assert all(("." not in text) == is_whole for text in texts)
    assert low <= min(map(float, texts)) < max(map(float, texts)) <= high
    if "range" in text:
        assert set(texts) == {"2", "4", "6", "8"}


def test_numbers_are_short_and_inside_of_their_bounds(composer: PointComposer) -> None:
    suggest = dimensions({"x": "interval(0.12344, 0.12346)"}, composer)["x"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {suggest(study.ask()) for _ in range(30)} == {"0.12344", "0.12346"}, "rounded, they would be outside"
    wide = dimensions({"y": "tag(log, interval(1e-5, 1))"}, composer)["y"]
    assert all(float(f"{float(text):.4g}") == float(text) for text in (wide(study.ask()) for _ in range(30)))


@pytest.mark.parametrize(
    "text", ["3", "interval(2, 1)", "tag(log, interval(0, 1))", "[1,2]", "range(1,2)", "interval(1, 1)"]
)
def test_what_leaves_no_choice_is_refused(composer: PointComposer, text: str) -> None:
    with pytest.raises(ConfigError, match=r"`sweep\.optuna\.space\.seed` must be"):
        dimensions({"seed": text}, composer)


def test_a_storage_that_cannot_be_used_is_one_line(open_search: Callable[..., Search]) -> None:
    with pytest.raises(ConfigError, match=r"`sweep\.optuna\.storage` must be a database") as caught:
        open_search(storage="nonsense://x")
    assert "\n" not in str(caught.value)


def test_without_optuna_it_is_said_how_to_get_it(
    open_search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'ava_exp\[sweep\]'"):
        open_search()


# Evaluations


def line(step: int, value: float, **more: object) -> str:
    return json.dumps({"kind": "eval", "step": step, "loss": value, **more}) + "\n"


def test_evaluations_are_read_once_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    seen = Evaluations(path, "loss")
    assert seen.read() == []
    path.write_text('{"kind": "train", "step": 1, "loss": 9}\n' + line(10, 3.0))
    assert seen.read() == [(1, 3.0)]
    assert seen.read() == []
    with open(path, "a") as file:
        file.write(line(20, 2.5) + line(30, 2.0).rstrip("\n"))
    assert seen.read() == [(2, 2.5)], "the third is still being written"
    with open(path, "a") as file:
        file.write("\n" + line(30, 1.9, final=True) + line(40, 0.0).replace("loss", "other"))
    assert seen.read() == [(3, 2.0)]


def test_a_file_that_was_cut_back_is_not_told_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(10, 3.0) + line(20, 2.0))
    seen = Evaluations(path, "loss")
    assert len(seen.read()) == 2
    shorter = tmp_path / "shorter"
    shorter.write_text(line(10, 3.0))
    shorter.replace(path)
    assert seen.read() == []
    with open(path, "a") as file:
        file.write(line(20, 2.0) + line(30, 1.0))
    assert seen.read() == [(3, 1.0)]
