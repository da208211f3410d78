"""Configuration of pipelines: stages that follow one another, each with what the ones before it have made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

STEP_NAME = re.compile(r"[a-z0-9_]+")
REFERENCE = re.compile(r"step:(?P<name>[^@]*)(?P<rest>@.*)?")
"""What stands for the run of an earlier step: `step:NAME`, or one of its checkpoints, `step:NAME@STEP`."""


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """Steps of `stage=pipeline`. `folder` and `step` are set by a pipeline for each of them."""

    steps: dict[str, list[str]] = field(default_factory=dict)
    """By name, in order: what a step has besides the overrides of the command line."""
    folder: str | None = None
    """Where the pipeline keeps what its steps have made."""
    step: str | None = None
    """Which of them this is."""


def pipeline_faults(pipeline: PipelineConfig) -> Iterator[tuple[str, str, object]]:
    """Yield (key, what it must be, what it is) for values that do not go together."""
    for name in pipeline.steps:
        if not STEP_NAME.fullmatch(name):
            yield "pipeline.steps", "named by small letters, digits and `_`", name
    if (pipeline.folder is None) != (pipeline.step is None):
        yield "pipeline.step", "given by a pipeline, with `pipeline.folder`", pipeline.step


def references(values: Mapping[str, object]) -> dict[str, re.Match[str]]:
    """Return those of a configuration's values, by key, that stand for the run of an earlier step."""
    matches = {key: REFERENCE.fullmatch(value) for key, value in values.items() if isinstance(value, str)}
    return {key: match for key, match in matches.items() if match is not None}
