"""Compiled blocks train as others do, and the model is evaluated and writes as ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.matrix import difference
from tests.faults.harness import Experiment

SETTINGS = ("model.dropout=0", "optimizer.learning_rate=1e-3", "budget.steps=8")


@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")
@pytest.mark.parametrize("sparsity", [("sparsity=dense",), ("sparsity=moe",)])
def test_compiled_blocks_train_as_others(tmp_path: Path, sparsity: tuple[str, ...]) -> None:
    settings = (*sparsity, *SETTINGS)
    plain, compiled = (
        Experiment(output_dir=tmp_path / str(on), overrides=(*settings, f"training.compile={on}"))
        for on in (False, True)
    )
    plain.finish()
    compiled.finish()
    assert difference(compiled.folder, plain.folder).weights < 1e-4
    assert compiled.folder.samples.read_text() == plain.folder.samples.read_text()
