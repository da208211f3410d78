"""Configuration of stages: what a command does with a composed run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig
from ava_exp.config.generation import GenerationSettings
from ava_exp.config.model import RopeScaling
from ava_exp.config.surgery import SurgeryOperation


@dataclass(kw_only=True, slots=True)
class StageConfig(ComponentConfig):
    """Base of every stage; `builds` names a function `(RunConfig) -> int` that returns the exit code."""

    name: ClassVar[str] = ""
    trains: ClassVar[bool] = False
    """Whether several processes can share the work."""
    computes: ClassVar[bool] = True
    """Whether it is worth a job on a cluster; False for what only tells something about a configuration."""


@dataclass(kw_only=True, slots=True)
class ValidateConfig(StageConfig):
    """Report every fault of the configuration, and do nothing else."""

    builds: ClassVar[str] = "ava_exp.stages.validate:run"
    name: ClassVar[str] = "validate"
    computes: ClassVar[bool] = False


@dataclass(kw_only=True, slots=True)
class PlanConfig(StageConfig):
    """Print parameters, FLOPs, memory, time and cost without allocating weights; of several devices also what each back
    end needs and sends."""

    builds: ClassVar[str] = "ava_exp.stages.plan:run"
    name: ClassVar[str] = "plan"
    computes: ClassVar[bool] = False

    assumed_mfu: float = 0.3
    """Model FLOPs utilisation: the share of the devices' peak that the training is taken to reach."""
    assumed_link_utilisation: float = 0.8
    """The share of the declared bandwidths that collectives are taken to reach."""
    assumed_overlap: float = 1.0
    """The share of the computing beside which communication may go on that does hide it."""
    expert_parallel: int | None = None
    """Ranks that experts are divided among; null is the most that divide both experts and devices."""


@dataclass(kw_only=True, slots=True)
class PrepareConfig(StageConfig):
    """Read the data source, train the tokenizer, write token shards."""

    builds: ClassVar[str] = "ava_exp.stages.prepare:run"
    name: ClassVar[str] = "prepare"


@dataclass(kw_only=True, slots=True)
class PipelineStageConfig(StageConfig):
    """Do the steps of `pipeline`, one after the other, and go on at the first that is not finished."""

    builds: ClassVar[str] = "ava_exp.pipelines.pipeline:run"
    name: ClassVar[str] = "pipeline"
    computes: ClassVar[bool] = False


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """Train, evaluate, report."""

    builds: ClassVar[str] = "ava_exp.stages.pretrain:run"
    name: ClassVar[str] = "pretrain"
    trains: ClassVar[bool] = True


class PositionBins(Enum):
    """Positions that are looked at together: sixteen stretches of one width, or each as long as all before."""

    equal = "equal"
    doubling = "doubling"


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(StageConfig):
    """Evaluate a trained run on its validation split. `run` null is the run that this command line trains.

    `sequence_length` null is the length that the run was trained on. Beyond the model's `max_position_embeddings` one
    has to say by `rope_scaling` what becomes of its positions; `none` leaves them as they are.
    """

    builds: ClassVar[str] = "ava_exp.stages.evaluate:run"
    name: ClassVar[str] = "evaluate"

    run: str | None = None
    max_tokens: int | None = None
    sequence_length: int | None = None
    rope_scaling: RopeScaling | None = None
    by_position: bool = False
    """Tell the perplexity at every place of the text, as a table, a JSON file and a figure in the run's folder."""
    position_bins: PositionBins = PositionBins.equal


@dataclass(kw_only=True, slots=True)
class ExtendContextConfig(StageConfig):
    """Teach a trained run to read longer texts: scale its positions, train on, compare before and after.

    What is trained is a run of its own. The model, its data, tokenizer, precision and optimizer are those of `run`.
    """

    builds: ClassVar[str] = "ava_exp.stages.extend_context:run"
    name: ClassVar[str] = "extend_context"

    run: str = "latest"
    sequence_length: int = 4096
    rope_scaling: RopeScaling = RopeScaling.yarn
    learning_rate: float | None = None
    """Null is 0.3 of the run's peak."""
    max_tokens: int | None = 100_000
    """Validation tokens that each measurement reads."""


@dataclass(kw_only=True, slots=True)
class GenerateConfig(GenerationSettings, StageConfig):
    """Continue `prompt`, or each line of `prompt_file`, with a trained run. `run` null is the run that this command
    line trains."""

    builds: ClassVar[str] = "ava_exp.stages.generate:run"
    name: ClassVar[str] = "generate"

    run: str | None = None
    prompt: str = "def __init__(self"
    prompt_file: str | None = None
    """Prompts, one a line, in place of `prompt`."""
    speculative: bool = False
    """Let the run's prediction heads draft: the same text in greedy decoding, the same distribution in sampling."""
    confidence_threshold: float | None = None
    """Draft while a head is at least as sure; null takes the run's `prediction.confidence_threshold`."""


@dataclass(kw_only=True, slots=True)
class SurgeryConfig(SurgeryOperation, StageConfig):
    """Change the experts of a trained run, and write what comes of it as a run of its own to go on from.

    `run` null is the run that this command line trains; `max_tokens` are those of the validation split on which the
    loss is measured before and after.
    """

    builds: ClassVar[str] = "ava_exp.stages.surgery:run"
    name: ClassVar[str] = "surgery"

    run: str | None = None
    max_tokens: int | None = 50_000
