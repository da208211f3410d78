"""Ranks compute what one process computes on the same global batches: every back end, kind of model, accumulation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.matrix import (
    ACCUMULATIONS,
    HEADER,
    IN_FP32,
    IN_MIXED,
    PAGE,
    Row,
    compare,
    rows,
    starts,
    train_all,
    train_reference,
)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains, once for all processes that run tests."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return train_reference(shared / "one_process")


@pytest.mark.parametrize(
    "start", starts(), ids=lambda start: "-".join([*(row.backend.value for row in start), str(start[0].num_ranks)])
)
def test_ranks_train_as_one_process_does(tmp_path: Path, reference: Path, start: list[Row]) -> None:
    for (row, training), ended in train_all(tmp_path, start).items():
        assert [each.code for each in ended] == [0] * row.num_ranks, f"{row}, {training}: {ended}"
        if row.num_ranks > 1 and training.kind == "experts":
            assert any(each.num_idle for each in ended), "an expert without tokens on one rank is what this is about"
    for row in start:
        for training, found in compare(tmp_path, reference, row).items():
            assert found.is_within(training.bound), f"{row}, {training}: {found}"


def test_the_page_has_every_back_end_within_its_bounds() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- matrix -->\n")[2].partition("\n<!-- end -->")[0]
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert header == [*HEADER]
    expected = [[str(row), str(row.num_ranks), str(steps)] for row in rows() for steps in ACCUMULATIONS]
    assert [line[:3] for line in lines] == expected
    for line in lines:
        for cell, bound in zip(line[3:], [IN_FP32] * 5 + [IN_MIXED], strict=True):
            numbers, weights = map(float, cell.split(",")) if cell else (0.0, 0.0)
            assert numbers <= bound.numbers and weights <= bound.weights, line
