"""Which points a sweep has."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig

from ava_exp.config.points import PointComposer
from ava_exp.config.source import CONFIG_NAME
from ava_exp.errors import ConfigError
from ava_exp.sweeping.definition import AD_HOC, Definition, define, varying


@pytest.fixture(scope="module")
def composer() -> PointComposer:
    return PointComposer()


def defined(composer: PointComposer, *arguments: str, **params: str) -> Definition:
    config = composer._loader.load_configuration(CONFIG_NAME, list(arguments), RunMode.MULTIRUN)
    assert isinstance(config, DictConfig)
    return define(config, list(arguments), params, composer)


def test_all_combinations_the_last_changes_fastest(composer: PointComposer) -> None:
    definition = defined(composer, "seed=1,2", "debug=default", "model=tiny,small")
    assert definition.name == AD_HOC
    assert definition.points == [
        ["seed=1", "debug=default", "model=tiny"],
        ["seed=1", "debug=default", "model=small"],
        ["seed=2", "debug=default", "model=tiny"],
        ["seed=2", "debug=default", "model=small"],
    ]
    assert definition.common == ["debug=default"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("seed=choice(4,5)", ["seed=4", "seed=5"]),
        ("training.batch_size=null,2", ["training.batch_size=null", "training.batch_size=2"]),
        ("data.paths=[a],[b]", ["data.paths=[a]", "data.paths=[b]"]),
        ("model=glob(ti*)", ["model=tiny"]),
        ("model.norm=rms,layer", ["model.norm=rms", "model.norm=layer"]),
    ],
)
def test_several_values_are_written_as_hydra_has_them(composer: PointComposer, text: str, values: list[str]) -> None:
    assert defined(composer, text).points == [[value] for value in values]


def write(conf: Path, text: str) -> None:
    (conf.parent / "sweeps" / "mine.yaml").write_text(text)


def test_points_each_have_every_combination_of_the_grid(conf: Path) -> None:
    write(conf, "overrides: [budget.steps=5]\npoints: [[sparsity=dense], [router=switch, seed=7]]\ngrid: {seed: '0,1'}")
    definition = defined(PointComposer(), "sweep=mine", "model=tiny")
    assert definition.name == "mine"
    assert definition.points == [
        ["budget.steps=5", "seed=0", "sparsity=dense", "model=tiny"],
        ["budget.steps=5", "seed=1", "sparsity=dense", "model=tiny"],
        ["budget.steps=5", "router=switch", "seed=7", "model=tiny"],
    ]


def test_the_command_line_beats_the_file_and_multiplies_it(conf: Path) -> None:
    write(conf, "overrides: [budget.steps=5]\ngrid: {optimizer.learning_rate: '1e-3,2e-3'}")
    composer = PointComposer()
    assert defined(composer, "sweep=mine", "budget.steps=9", "optimizer.learning_rate=1").points == [
        ["budget.steps=9", "optimizer.learning_rate=1"]
    ]
    assert len(defined(composer, "sweep=mine", "seed=0,1,2").points) == 6


def test_settings_of_the_sweep_are_no_part_of_its_points(conf: Path) -> None:
    write(conf, "grid: {seed: '0,1'}")
    definition = defined(PointComposer(), "sweep=mine", "sweep.num_parallel=2")
    assert definition.settings.num_parallel == 2
    assert definition.points == [["seed=0"], ["seed=1"]]


def test_params_of_hydras_sweeper_are_a_grid(composer: PointComposer) -> None:
    assert defined(composer, "model=tiny", seed="1,2").points == [["seed=1", "model=tiny"], ["seed=2", "model=tiny"]]


@pytest.mark.parametrize("text", ["optimizer.learning_rate=interval(0,1)", "sweep.num_parallel=1,2", "sweep=a,b"])
def test_what_is_not_one_of_several_values_is_refused(composer: PointComposer, text: str) -> None:
    with pytest.raises(ConfigError, match=r"not one of several|one at a time"):
        defined(composer, text)


def test_nothing_else_varies_in_a_search(conf: Path) -> None:
    write(conf, "optuna: {space: {seed: '1,2'}}")
    with pytest.raises(ConfigError, match="nothing else varies, but `model` does"):
        defined(PointComposer(), "sweep=mine", "model=tiny,small")


def test_varying_is_what_some_point_has_otherwise(composer: PointComposer) -> None:
    points = [["a=1", "seed=0", "router=x"], ["a=1", "seed=1"], ["seed=1", "a=1", "~router"]]
    assert varying(points, composer) == [
        {"seed": "0", "router": "x"},
        {"seed": "1", "router": ""},
        {"seed": "1", "router": ""},
    ]
    assert varying([["seed=1"]], composer) == [{}]
