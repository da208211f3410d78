"""Files below `conf/`: which are read, and what one may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.config import folders
from ava_exp.config.compose import compose
from ava_exp.config.source import FolderSource
from ava_exp.errors import ConfigError

GLOBAL = "# @package _global_\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_local_file_beats_an_experiment_and_the_command_line_beats_both(conf: Path) -> None:
    write(conf / "experiment" / "mine.yaml", f"{GLOBAL}seed: 1\ntraining: {{log_interval: 2}}\nbudget: {{steps: 3}}")
    write(conf / "local" / "default.yaml", f"{GLOBAL}seed: 4\ntraining: {{log_interval: 5}}")
    run = compose(["experiment=mine", "seed=6"])
    assert (run.seed, run.training.log_interval, run.budget.steps) == (6, 5, 3)


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {y: 1}}}",
        "hydra: {searchpath: ['file:///tmp']}",
        "hydra: {job_logging: {formatters: {x: {(): os.system}}}}",
        "hydra: {run: {dir: /tmp}}",
        "hydra: {launcher: '${model}'}",
        "hydra: null",
        "hydra: {sweeper: {params: {hydra.run.dir: /tmp}}}",
    ],
)
def test_a_file_does_not_configure_hydra(conf: Path, text: str) -> None:
    write(conf / "experiment" / "mine.yaml", GLOBAL + text)
    with pytest.raises(ConfigError, match="Hydra's own settings"):
        compose(["experiment=mine"])


@pytest.mark.parametrize("package", ["hydra.callbacks.x", "hydra", "hydra.job_logging", "_global_.hydra", "a.hydra"])
def test_a_file_does_not_place_itself_in_hydra(conf: Path, package: str) -> None:
    write(conf / "experiment" / "mine.yaml", f"# @package {package}\ny: 1")
    with pytest.raises(ConfigError, match=r"Hydra's own settings|is no place for settings"):
        compose(["experiment=mine"])


@pytest.mark.parametrize(
    ("header", "outer"),
    [
        ("# @package _global_", "defaults: [/data/inner@_global_]"),
        ("# @package hydra", "defaults: [/data/inner@job_logging]"),
        ("# @package hydra.launcher", "defaults: [/data/inner@_global_]"),
    ],
)
@pytest.mark.parametrize("inner", ["hydra: {job_logging: {handlers: {x: {class: builtins.open}}}}", "x: {hydra: {}}"])
def test_a_file_does_not_reach_hydra_through_another(conf: Path, header: str, outer: str, inner: str) -> None:
    write(conf / "data" / "inner.yaml", inner)
    write(conf / "experiment" / "mine.yaml", f"{header}\n{outer}")
    with pytest.raises(ConfigError, match=r"`hydra` stands at the top|is no place for settings|Hydra's own settings"):
        compose(["experiment=mine"])


@pytest.mark.parametrize(
    "entry",
    [
        "/data/files@hydra.callbacks.x",
        "override /hydra/callbacks: x",
        "/hydra/callbacks: x",
        "/data@hydra.x: files",
        "/data@_global_.x: files",
    ],
)
def test_a_defaults_list_does_not_configure_hydra(conf: Path, entry: str) -> None:
    write(conf / "experiment" / "mine.yaml", f"{GLOBAL}defaults:\n  - {entry}")
    with pytest.raises(ConfigError, match="would configure Hydra itself"):
        compose(["experiment=mine"])


def test_a_file_may_choose_a_launcher_and_sweep(conf: Path) -> None:
    settings = "hydra: {verbose: true, sweeper: {params: {seed: '1,2'}, max_batch_size: 1}}"
    write(
        conf / "experiment" / "mine.yaml", f"{GLOBAL}defaults: [override /hydra/launcher: basic]\n{settings}\nseed: 7"
    )
    assert compose(["experiment=mine"]).seed == 7


@pytest.mark.parametrize(
    "text",
    [
        "tracker: {_target_: os.system}",
        "tracker: {tags: {_target_: os.system}}",
        "hydra: {launcher: {_target_: os.system}}",
        "data: {paths: [{_target_: builtins.open}]}",
        "defaults: [{_target_: x}]",
    ],
)
def test_targets_are_refused_wherever_they_stand(conf: Path, text: str) -> None:
    write(conf / "experiment" / "mine.yaml", GLOBAL + text)
    with pytest.raises(ConfigError, match="`_target_` is not accepted"):
        compose(["experiment=mine"])


@pytest.mark.parametrize("option", ["../secret", "/secret", '"a\\0b"', "'${oc.env:HOME}'"])
@pytest.mark.parametrize("entry", ["override /model: {}", "/data: [stdlib, {}]"])
def test_a_defaults_list_names_options_and_not_paths(conf: Path, entry: str, option: str) -> None:
    write(conf.parent / "secret.yaml", "{}")
    write(conf / "experiment" / "mine.yaml", f"{GLOBAL}defaults:\n  - {entry.format(option)}")
    with pytest.raises(ConfigError, match="not a path"):
        compose(["experiment=mine"])


def test_a_link_out_of_the_folder_is_not_followed(conf: Path) -> None:
    write(conf.parent / "secret.yaml", f"{GLOBAL}seed: 1")
    (conf / "experiment" / "mine.yaml").symlink_to(conf.parent / "secret.yaml")
    with pytest.raises(ConfigError, match="leads out of"):
        compose(["experiment=mine"])


def test_a_link_inside_the_folder_is_followed(conf: Path) -> None:
    (conf / "model" / "same.yaml").symlink_to(conf / "model" / "small.yaml")
    assert compose(["model=same"]).model == compose(["model=small"]).model


@pytest.mark.parametrize("path", ["../secret", "model/../../secret", "/etc/passwd", "model/a\0b", "model\\..\\x"])
def test_the_source_itself_refuses_paths(path: str) -> None:
    source = FolderSource("main", "ava-exp://")
    for method in (source.is_config, source.is_group, source.load_config):
        with pytest.raises(ConfigError, match="not a path"):
            method(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {hidden_size: [\n", "default.yaml, line 3, column 1: "),
        ("model: {hidden_size: 1}\nmodel: {}\n", "default.yaml, line 3, column 1: found duplicate key model"),
        ("x: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("seed: \x01\n", "special characters are not allowed"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line_with_its_place(conf: Path, text: str, complaint: str) -> None:
    write(conf / "local" / "default.yaml", GLOBAL + text)
    with pytest.raises(ConfigError) as caught:
        compose()
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_named(conf: Path) -> None:
    (conf / "local" / "default.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"default\.yaml` is not UTF-8: .* at byte 9"):
        compose()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mdoel: {hidden_size: 1}", "in `local/default`: `mdoel` does not exist: did you mean `model` or `mod`?"),
        ("model: {hiden_size: 1}", "in `local/default`: `model.hiden_size` does not exist"),
        ("seed: many", "in `local/default`: `seed` must be a whole number, but is 'many' instead."),
    ],
)
def test_a_wrong_key_or_value_in_a_file_is_told_with_the_file(conf: Path, text: str, complaint: str) -> None:
    write(conf / "local" / "default.yaml", GLOBAL + text)
    with pytest.raises(ConfigError) as caught:
        compose()
    assert str(caught.value).startswith(complaint)


def test_folders_of_an_installed_package_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "ava_exp"
    monkeypatch.setattr(folders, "__file__", str(package / "config" / "folders.py"))
    assert folders.data_folder("conf") == tmp_path / "site" / "conf"
    (package / "_data" / "conf").mkdir(parents=True)
    assert folders.data_folder("conf") == package / "_data" / "conf"
