"""Data, tokenizer or code that changed since a checkpoint: refused by name, unless the user says otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_USER_ERROR
from ava_exp.stages import assembly
from ava_exp.tokenizer.bpe import BPETrainer
from ava_exp.training.checkpoint import read_checkpoint, write_checkpoint
from tests.faults.faults import kill_at_step
from tests.faults.harness import SYNCHRONOUS, Ended, Experiment, uninterrupted


@pytest.fixture
def inputs(tmp_path: Path, experiment: Experiment) -> Path:
    """A corpus and a tokenizer of the experiment's own, with which it was killed in its fifth step."""
    folder = tmp_path / "inputs"
    shutil.copytree(experiment.harness.folder / "corpus", folder / "corpus")
    write_tokenizer(folder, "some text to begin with " * 9)
    experiment.overrides = (
        SYNCHRONOUS,
        f"data.paths=[{folder / 'corpus'}]",
        "tokenizer=file",
        f"tokenizer.path={folder / 'tokenizer.json'}",
    )
    assert experiment.run(kill_at_step(5)).killed
    return folder


def write_tokenizer(folder: Path, text: str) -> None:
    BPETrainer(vocab_size=280, min_frequency=2).make([text]).save(folder / "tokenizer.json")


def change_data(experiment: Experiment, inputs: Path) -> None:
    with (inputs / "corpus" / "00.txt").open("a") as file:
        file.write("one more sentence\n")


def change_tokenizer(experiment: Experiment, inputs: Path) -> None:
    write_tokenizer(inputs, "another text altogether, another text altogether " * 9)


def change_code(experiment: Experiment, inputs: Path) -> None:
    """As if the checkpoint came from other code; that the hash follows the code is shown below."""
    (checkpoint,) = experiment.checkpoints
    snapshot = read_checkpoint(checkpoint)
    snapshot.state["fingerprints"]["code"] = "0" * 64
    shutil.rmtree(checkpoint)
    write_checkpoint(checkpoint.parent, snapshot)


def change_all(experiment: Experiment, inputs: Path) -> None:
    for change in (change_data, change_tokenizer, change_code):
        change(experiment, inputs)


CHANGES = [
    (change_data, "data changed"),
    (change_tokenizer, "tokenizer changed"),
    (change_code, "code changed"),
    (change_all, "data and tokenizer and code changed"),
]


def refusal(ended: Ended) -> str:
    (line,) = (line for line in ended.err.splitlines() if line.startswith("ava_exp: "))
    return line


@pytest.mark.parametrize(("change", "sentence"), CHANGES, ids=["data", "tokenizer", "code", "all"])
def test_20_what_changed_is_named_and_refused_until_it_is_allowed(
    experiment: Experiment, inputs: Path, change: Callable[[Experiment, Path], None], sentence: str
) -> None:
    change(experiment, inputs)
    metrics = experiment.folder.metrics.read_bytes()
    refused = experiment.run()
    assert refused.code == EXIT_USER_ERROR
    assert refusal(refused).startswith(f"ava_exp: {sentence} since the checkpoint was made")
    assert "resume=never" in refusal(refused) and "allow_changed_inputs=true" in refusal(refused)
    assert ("step", "") not in refused.operations
    assert experiment.folder.metrics.read_bytes() == metrics
    allowed = experiment.run(also=["allow_changed_inputs=true"])
    assert allowed.code == 0
    assert f"WARNING: {sentence} since the checkpoint was made" in allowed.err
    assert "Going on from step 3" in allowed.out


def test_20_once_allowed_the_new_inputs_are_the_run_s_own(experiment: Experiment, inputs: Path) -> None:
    change_data(experiment, inputs)
    assert experiment.run(kill_at_step(5), also=["allow_changed_inputs=true"]).killed
    again = experiment.run()
    assert again.code == 0 and "Going on from step 6" in again.out and "changed" not in again.err


def test_20_changed_back_it_goes_on(experiment: Experiment, inputs: Path) -> None:
    original = (inputs / "tokenizer.json").read_bytes()
    change_tokenizer(experiment, inputs)
    assert experiment.run().code == EXIT_USER_ERROR
    (inputs / "tokenizer.json").write_bytes(original)
    assert experiment.run().code == 0


def test_20_a_new_attempt_takes_the_new_inputs(experiment: Experiment, inputs: Path) -> None:
    change_all(experiment, inputs)
    ended = experiment.run(also=["resume=never"])
    assert ended.code == 0 and "Going on" not in ended.out


def test_20_touching_files_changes_nothing(experiment: Experiment) -> None:
    assert experiment.run(kill_at_step(5)).killed
    for path in (experiment.harness.folder / "corpus").iterdir():
        path.touch()
    assert experiment.finish() == uninterrupted()


def test_20_every_checkpoint_names_its_inputs(experiment: Experiment) -> None:
    experiment.finish()
    for checkpoint in experiment.checkpoints:
        fingerprints = json.loads((checkpoint / "state.json").read_text())["fingerprints"]
        assert sorted(fingerprints) == ["code", "data", "tokenizer"]
        assert all(len(value) == 64 for value in fingerprints.values())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, whose fingerprint is taken instead."""
    original = Path(assembly.__file__).parents[1]
    copy = tmp_path / "ava_exp"
    shutil.copytree(original, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(assembly, "__file__", str(copy / "stages" / "assembly.py"))
    return copy


@pytest.mark.parametrize("file", ["nn/ffn.py", "optim/update.py", "training/step.py", "data/loader.py", "new"])
def test_20_the_fingerprint_follows_the_code_that_decides_numbers(package: Path, file: str) -> None:
    before = assembly.code_fingerprint()
    path = package / ("losses/new.py" if file == "new" else file)
    path.write_text((path.read_text() if path.exists() else "") + "\n# changed\n")
    assert assembly.code_fingerprint() != before


def test_20_the_fingerprint_does_not_follow_the_rest(package: Path) -> None:
    before = assembly.code_fingerprint()
    for file in ("tracking/view.py", "cli.py", "errors.py"):
        (package / file).write_text("# changed\n")
    assert assembly.code_fingerprint() == before
