"""Faults in configurations: typos, contradictions, names that are paths, and hostile files.

Everything runs as a program of its own, from a copy of the project whose `conf/` an attacker may write to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[2]


class Checkout:
    """A copy of the project, and a working folder beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "project"
        self.work = root / "work"
        self.work.mkdir()
        shutil.copytree(ROOT / "ava_exp", self.root / "ava_exp", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conf", "sweeps", "launchers"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "conf" / "local" / "default.yaml").unlink(missing_ok=True)

    def write(self, path: str, text: str) -> None:
        (self.root / "conf" / path).write_text(f"# @package _global_\n{text}\n")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{self.root}{os.pathsep}{self.root / 'launchers'}"}
        command = [sys.executable, "-m", "ava_exp", *arguments]
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)

    def refuses(self, *arguments: str) -> str:
        """Run, and return the one line that it must be refused with; nothing must have been written."""
        done = self.run(*arguments)
        assert done.returncode == EXIT_USER_ERROR, done.stderr
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert list(self.work.iterdir()) == []
        return done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# 32: typos


@pytest.mark.parametrize("before", [[], ["--cfg", "job"], ["-m"]], ids=["run", "cfg", "multirun"])
@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("modle=small", "did you mean `model` or `mod`?"),
        ("model=smal", "did you mean `small` or `cpu_small`?"),
        ("optimizer.learning_rat=1e-3", "did you mean `optimizer.learning_rate`"),
        ("+optimizer.learning_rat=1e-3", "did you mean `optimizer.learning_rate`"),
        ("optimizer.learning_rate=abc", "`optimizer.learning_rate` must be a number, but is 'abc' instead."),
        ("~optimizer.learning_rate", "a key cannot be removed"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(
    checkout: Checkout, before: list[str], override: str, suggestion: str
) -> None:
    assert suggestion in checkout.refuses(*before, override)


def test_a_typo_in_a_file_is_refused_with_the_file(checkout: Checkout) -> None:
    checkout.write("local/default.yaml", "optimizer: {learning_rat: 1e-3}")
    line = checkout.refuses("stage=validate")
    assert "in `local/default`" in line
    assert "did you mean `optimizer.learning_rate`" in line


# 33: contradictions


def test_one_report_lists_every_contradiction(checkout: Checkout) -> None:
    (checkout.work / "taken").write_text("a file in the folder's place")
    wrong = {
        "model.num_heads": "model.num_heads=3",
        "sparsity.router.moe_top_k": "sparsity.router.moe_top_k=9",
        "data.sequence_length": "data.sequence_length=4096",
        "data.validation_fraction": "data.validation_fraction=1",
        "optimizer.learning_rate": "optimizer.learning_rate=-1",
        "precision.training": "precision=mixed_fp16",
        "output_dir": "output_dir=taken",
    }
    done = checkout.run("hardware=cpu", *wrong.values())
    assert done.returncode == EXIT_USER_ERROR
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    for key in wrong:
        assert any(f"`{key}` must be" in line for line in lines[1:]), key
    assert lines[1].split()[0] == "critical"  # the gravest first
    assert [path.name for path in checkout.work.iterdir()] == ["taken"]


# 34: names that are paths


@pytest.fixture
def secret(checkout: Checkout) -> Path:
    """A file that would compose, where no option may come from."""
    path = checkout.root / "secret.yaml"
    path.write_text("# @package _global_\nseed: 4711\n")
    return path


@pytest.mark.parametrize("group", ["experiment", "model", "sweep", "hydra/launcher"])
@pytest.mark.parametrize("shape", ["../../secret", "x/../../../secret", "'../../secret'", "{root}/secret"])
def test_an_option_outside_its_folder_is_refused(checkout: Checkout, secret: Path, group: str, shape: str) -> None:
    line = checkout.refuses("--cfg", "job", f"{group}={shape.format(root=secret.parent)}")
    assert "not a path" in line


def test_a_link_out_of_the_folder_is_refused(checkout: Checkout, secret: Path) -> None:
    (checkout.root / "conf" / "experiment" / "linked.yaml").symlink_to(secret)
    (checkout.root / "conf" / "borrowed").symlink_to(secret.parent)
    assert "leads out of" in checkout.refuses("--cfg", "job", "experiment=linked")
    assert "leads out of" in checkout.refuses("--cfg", "job", "borrowed=secret")


@pytest.mark.parametrize("entry", ["/experiment: ../../secret", "override /model: ../../secret", '/data: "a\\0b"'])
def test_a_file_that_includes_from_outside_is_refused(checkout: Checkout, secret: Path, entry: str) -> None:
    checkout.write("experiment/mine.yaml", f"defaults:\n  - {entry}")
    assert "not a path" in checkout.refuses("--cfg", "job", "experiment=mine")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "{folder}", "+secret=x"],
        ["--config-path", "{folder}"],
        ["--config-name", "../secret"],
        ["hydra.searchpath=[file://{folder}]"],
    ],
)
def test_another_folder_is_refused(checkout: Checkout, secret: Path, arguments: list[str]) -> None:
    checkout.refuses("--cfg", "job", *(argument.format(folder=secret.parent) for argument in arguments))


@pytest.mark.parametrize("name", ["../up", "/absolute", "a/b", ".hidden", "..", "'a b'"])
def test_a_run_name_that_is_a_path_is_refused(checkout: Checkout, name: str) -> None:
    done = checkout.run(f"name={name}")
    assert done.returncode == EXIT_USER_ERROR
    assert "`name` must be letters" in done.stderr
    assert list(checkout.work.iterdir()) == []


# 37: hostile targets

PLAIN_HYDRA = (
    "import hydra\n"
    "hydra.main(version_base='1.3', config_path={folder!r}, config_name={name!r})(lambda config: None)()\n"
)


def test_plain_hydra_would_execute_what_is_refused_below(tmp_path: Path) -> None:
    """The attack is real: without our checks the same texts open a file for writing."""
    marker = tmp_path / "marker"
    script = PLAIN_HYDRA.format(folder=None, name=None)
    override = f"+hydra.callbacks.x={{_target_: builtins.open, file: {marker}, mode: w}}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, override], cwd=tmp_path, check=True)
    assert marker.exists()


@pytest.mark.parametrize("target", ["builtins.open", "os.system", "torch.load", "subprocess.Popen"])
@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x={{{payload}}}",
        "+hydra={{callbacks: {{x: {{{payload}}}}}}}",
        "hydra.launcher.x={{{payload}}}",
        "+tracker={{{payload}}}",
        "stage={{{payload}}}",
        "model._target_={target}",
        "hydra.sweeper.params={{model: {{{payload}}}}}",
    ],
)
def test_a_target_on_the_command_line_is_refused(checkout: Checkout, override: str, target: str) -> None:
    payload = f"_target_: {target}, file: marker, mode: w"
    assert "`_target_` is not accepted" in checkout.refuses(override.format(payload=payload, target=target))


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {PAYLOAD}}}",
        "hydra: {launcher: {PAYLOAD}}",
        "tracker: {PAYLOAD}",
        "data: {paths: [{PAYLOAD}]}",
        "tracker: {tags: {PAYLOAD}}",
    ],
)
@pytest.mark.parametrize("place", ["local/default.yaml", "experiment/ava_small.yaml", "config.yaml"])
def test_a_target_in_a_file_is_refused(checkout: Checkout, place: str, text: str) -> None:
    text = text.replace("PAYLOAD", "_target_: builtins.open, file: marker, mode: w")
    checkout.write(place, text)
    assert "`_target_` is not accepted" in checkout.refuses("experiment=ava_small", "stage=validate")


def test_a_logging_factory_in_a_file_is_refused(checkout: Checkout) -> None:
    factory = "{'()': builtins.open, file: marker, mode: w}"
    logging = f"hydra: {{job_logging: {{version: 1, root: {{level: INFO}}, formatters: {{x: {factory}}}}}}}"
    checkout.write("local/default.yaml", logging)
    assert "of Hydra's own settings" in checkout.refuses("stage=validate")


def test_a_tagged_object_in_yaml_is_refused(checkout: Checkout) -> None:
    checkout.write("local/default.yaml", "seed: !!python/object/apply:builtins.open [marker, w]")
    assert "could not determine a constructor" in checkout.refuses("stage=validate")


def test_a_pickled_job_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    job = tmp_path / "job.pickle"
    job.write_bytes(b"cbuiltins\nopen\n(Vmarker\nVw\ntR.")
    assert "not accepted" in checkout.refuses("--experimental-rerun", str(job))


def test_the_copy_itself_works(checkout: Checkout) -> None:
    """Or the refusals above could come from anything."""
    done = checkout.run("experiment=ava_small", "stage=validate")
    assert (done.returncode, done.stdout) == (EXIT_OK, "no faults\n")
