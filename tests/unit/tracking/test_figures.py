"""Figures from a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from ava_exp.errors import RunFolderError
from ava_exp.tracking import figures, plotting, router_figures
from ava_exp.tracking.figures import write_figures
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.tracking.plotting import read_history

Records = Callable[..., Iterator[dict[str, Any]]]
ALL = ["loss", "bits_per_byte", "optimisation", "throughput", "experts", "balance", "specialisation"]


def test_a_mixture_of_experts_has_every_figure(run_folder: RunFolder) -> None:
    paths = write_figures(run_folder)
    assert [path.name for path in paths] == [f"{name}.png" for name in ALL]
    for path in paths:
        picture = imread(path)
        assert picture.shape[1] == round(plotting.WIDTH * 180)
        assert picture[..., :3].std() > 0.03, f"{path.name} is blank"


def test_a_dense_run_stopped_before_its_first_evaluation(tmp_path: Path, fake_records: Records) -> None:
    folder = RunFolder(tmp_path).create()
    with MetricsFile(folder.metrics) as metrics:
        for record in list(fake_records(50, num_experts=0))[:3]:
            metrics.append(record)
    assert [path.stem for path in write_figures(folder)] == ["loss", "optimisation", "throughput"]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    assert write_figures(RunFolder(tmp_path).create()) == []


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_and_odd_shapes(tmp_path: Path, fake_records: Records) -> None:
    folder = RunFolder(tmp_path).create()
    with MetricsFile(folder.metrics) as metrics:
        for record in fake_records(3, num_layers=15, num_experts=1):
            if record["kind"] == "train" and record["step"] == 2:
                record |= {"loss": math.nan, "grad_norm": math.inf, "mfu": None, "expert_load": [[math.nan]] * 15}
            metrics.append(record)
    assert len(write_figures(folder)) == len(ALL)


def test_the_compressors_stand_beside_the_model(run_folder: RunFolder) -> None:
    (axis,) = figures.draw_bits_per_byte(read_history(run_folder)).axes
    legend = axis.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["this model", "this model (whole split)", "gzip -9 (1.71)", "xz (1.62)"]


def test_experts_are_drawn_by_layer_and_time(run_folder: RunFolder) -> None:
    history = read_history(run_folder)
    axes = [axis for axis in router_figures.draw_experts(history).axes if axis.images]
    assert [axis.get_title() or axis.get_title(loc="left") for axis in axes] == [f"layer {layer}" for layer in range(4)]
    picture = np.asarray(axes[2].images[0].get_array())
    expected = np.array([record["expert_load"][2] for record in history.routed]).T * 8
    np.testing.assert_allclose(picture, expected)


def test_routed_heads_are_drawn_as_experts_are(tmp_path: Path, fake_records: Records) -> None:
    folder = RunFolder(tmp_path).create()
    assert "heads.png" not in {path.name for path in write_figures(folder)}
    with MetricsFile(folder.metrics) as metrics:
        for record in fake_records(10, num_layers=2):
            if record["kind"] == "train":
                record["head_load"] = record.pop("expert_load")
            metrics.append(record)
    history = read_history(folder)
    axes = [axis for axis in router_figures.draw_heads(history).axes if axis.images]
    expected = np.array([record["head_load"][1] for record in history.headed]).T * 8
    np.testing.assert_allclose(np.asarray(axes[1].images[0].get_array()), expected)
    assert "heads.png" in {path.name for path in write_figures(folder)}


@pytest.mark.filterwarnings("error")
def test_layers_of_different_sizes_that_change_on_the_way(tmp_path: Path, fake_records: Records) -> None:
    folder = RunFolder(tmp_path).create()
    with MetricsFile(folder.metrics) as metrics:
        for record in fake_records(20, num_layers=3):
            load = record["expert_load"]
            record["expert_load"] = [load[0], load[1][:4], load[2][:5] if record["step"] < 10 else load[2]]
            if "source_load" in record:
                loads = record["source_load"]
                record["source_load"] = [loads[0], [row[:4] for row in loads[1]], loads[2]]
                record["churn"] = [0.5, 0.25, None]
            metrics.append(record)
    assert len(write_figures(folder)) == len(ALL)
    history = read_history(folder)
    axes = [axis for axis in router_figures.draw_experts(history).axes if axis.images]
    pictures = [np.ma.filled(np.ma.asarray(axis.images[0].get_array()), np.nan) for axis in axes]
    assert [picture.shape for picture in pictures] == [(8, 20), (4, 20), (8, 20)]
    grown = np.isfinite(pictures[2])
    assert grown[:5].all() and grown[5:, 9:].all() and not grown[5:, :9].any()


def test_specialisation_is_relative_to_all_text() -> None:
    nan = math.nan
    ratios = router_figures._ratios([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], [0.25, 0.75, 0.0])
    np.testing.assert_allclose(ratios, [[2.0, 2 / 3, nan], [nan, nan, nan]])


def test_balance_has_panels_for_what_happened(tmp_path: Path, fake_records: Records) -> None:
    def labels(*left_out: str) -> list[str]:
        folder = RunFolder(tmp_path / ("-".join(left_out) or "all")).create()
        with MetricsFile(folder.metrics) as metrics:
            for record in fake_records(30):
                metrics.append({name: value for name, value in record.items() if name not in left_out})
        return [axis.get_ylabel().split("\n")[0] for axis in router_figures.draw_balance(read_history(folder)).axes]

    always = ["Gini coefficient", "routing entropy"]
    assert labels() == [*always, "dropped visits", "dead experts", "churn since the"]
    assert labels("dropped_share", "churn") == [*always, "dead experts"]
    assert labels("dropped_share", "churn", "dead_experts") == always


def test_the_average_keeps_a_constant_and_leaves_gaps_out() -> None:
    values = np.full(500, 3.0)
    values[100:103] = math.nan
    np.testing.assert_allclose(plotting.smooth(values), 3.0)


def test_the_style_does_not_leak(run_folder: RunFolder) -> None:
    before = dict(matplotlib.rcParams)
    write_figures(run_folder)
    assert dict(matplotlib.rcParams) == before


def test_a_place_that_cannot_be_written_is_named(run_folder: RunFolder) -> None:
    (run_folder.figures / "loss.png").mkdir()
    with pytest.raises(RunFolderError, match=r"loss\.png cannot be written"):
        write_figures(run_folder)
