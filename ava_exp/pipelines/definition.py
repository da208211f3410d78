"""Which steps a pipeline has: each an ordinary command line, composed and checked before the first one starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ava_exp.config.compose import composition_errors_in_one_line, to_run_config
from ava_exp.config.identity import to_plain
from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.overrides import check_overrides
from ava_exp.config.points import PointComposer
from ava_exp.config.run import RunConfig
from ava_exp.config.validate import raise_if_fatal, validate
from ava_exp.errors import ConfigError, did_you_mean
from ava_exp.stages.steps import StepFiles, references_of
from ava_exp.sweeping.record import definition_hash
from ava_exp.tracking.files import to_json, unwritable, write_atomically
from ava_exp.tracking.redaction import redact

AD_HOC = "pipeline"
"""The name of a pipeline whose steps are written on the command line."""
OWN_SECTIONS = ("stage", "pipeline")
"""What the command line says of these is about the pipeline, and not about its steps."""
NOT_WORK = ("hardware", "launcher", "distributed", "tracker", "sweep", "pipeline", "output_dir", "cache_dir")
"""Sections that do not make a step another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One stage of a pipeline."""

    name: str
    overrides: list[str]
    """A whole command line, which runs the step by itself."""
    config: RunConfig
    files: StepFiles

    @property
    def is_job(self) -> bool:
        return isinstance(self.config.launcher, SlurmLauncherConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Steps and the folder in which they leave what the next ones need."""

    root: Path
    steps: list[Step]

    @property
    def id(self) -> str:
        """The name of the folder: the pipeline's name and a hash of what its steps do."""
        return self.root.name

    @property
    def left(self) -> list[Step]:
        """The first step that is not finished, and all after it."""
        first = next((index for index, step in enumerate(self.steps) if not step.files.is_finished), len(self.steps))
        return self.steps[first:]

    def create(self) -> None:
        """Make the folder and write what the steps are. Raises RunFolderError where nothing can be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.root, error) from error
        content = {
            "command": shlex.join(["python", "-m", "ava_exp", *sys.argv[1:]]),
            "steps": {step.name: step.overrides for step in self.steps},
        }
        write_atomically(self.root / "pipeline.json", to_json(redact(content), indent=2) + "\n")


def define(config: RunConfig, overrides: Sequence[str]) -> Pipeline:
    """Return the pipeline of `config`, which `overrides` compose: every step has those that are not about the pipeline.

    Raises:
        ConfigError: a step cannot be composed, has faults, or refers to a step that does not come before it.
    """
    composer = PointComposer()
    with composition_errors_in_one_line():
        keys = {text: str(composer.parse(text).key_or_group) for text in overrides}
    common = [text for text in overrides if keys[text].split(".")[0] not in OWN_SECTIONS]
    composed: dict[str, tuple[list[str], RunConfig]] = {}
    for name, own in config.pipeline.steps.items():
        try:
            composed[name] = [*common, *own], _compose(composer, common, own, known=list(composed))
        except ConfigError as fault:
            raise ConfigError(f"in step `{name}`: {fault}") from fault
    if len({isinstance(each.launcher, SlurmLauncherConfig) for _, each in composed.values()}) > 1:
        raise ConfigError("`launcher` must be the same for all steps of a pipeline.")
    root = Path(config.output_dir) / "pipelines" / f"{_name(overrides)}-{_hash(composed)}"
    steps = [
        Step(
            name=name,
            overrides=[*texts, f"pipeline.folder='{root}'", f"pipeline.step={name}"],
            config=each,
            files=StepFiles(root, name),
        )
        for name, (texts, each) in composed.items()
    ]
    for step in steps:
        step.config.pipeline.folder, step.config.pipeline.step = str(root), step.name
    return Pipeline(root=root, steps=steps)


def _compose(composer: PointComposer, common: Sequence[str], own: Sequence[str], known: Sequence[str]) -> RunConfig:
    check_overrides(own, may_sweep=False)
    with composition_errors_in_one_line():
        config = to_run_config(composer.compose([*common, *own]))
    if not config.stage.computes:
        raise ConfigError(
            f"`stage={config.stage.name}` leaves nothing for the steps after it; give its command by itself."
        )
    if config.resume == "never":
        raise ConfigError("`resume=never` would begin anew each time that the pipeline goes on; leave it out.")
    for key, match in references_of(config).items():
        if match["name"] not in known:
            hint = did_you_mean(match["name"], known) if known else "it is the first."
            raise ConfigError(f"`{key}` must name an earlier step, but is {match[0]} instead; {hint}")
    raise_if_fatal(validate(config))
    return config


def _name(overrides: Sequence[str]) -> str:
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("pipeline=")]
    return chosen[-1] if chosen else AD_HOC


def _hash(composed: dict[str, tuple[list[str], RunConfig]]) -> str:
    steps: dict[str, Any] = {}
    for name, (_, config) in composed.items():
        steps[name] = {key: value for key, value in to_plain(config).items() if key not in NOT_WORK}
    return definition_hash({"steps": list(steps.items())})
