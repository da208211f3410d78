"""`RunConfig`: everything a run is."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import II, MISSING

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionConfig
from ava_exp.config.data import DataConfig, TokenizerConfig
from ava_exp.config.distributed import DistributedConfig
from ava_exp.config.launcher import LauncherConfig, LocalLauncherConfig
from ava_exp.config.loss import LossConfig
from ava_exp.config.machine import HardwareConfig, PrecisionConfig, TrackerConfig
from ava_exp.config.mod import ModConfig, NoModConfig
from ava_exp.config.model import ModelConfig, SparsityConfig
from ava_exp.config.pipeline import PipelineConfig
from ava_exp.config.prediction import NextTokenConfig, PredictionConfig
from ava_exp.config.stage import StageConfig
from ava_exp.config.sweep import SweepConfig
from ava_exp.config.training import (
    BudgetConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run, composed by Hydra or built in Python."""

    name: str = II("model.preset")
    seed: int = 0
    stage: StageConfig = MISSING
    model: ModelConfig = MISSING
    attention: AttentionConfig = MISSING
    sparsity: SparsityConfig = MISSING
    data: DataConfig = MISSING
    tokenizer: TokenizerConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    precision: PrecisionConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracker: TrackerConfig = MISSING
    launcher: LauncherConfig = field(default_factory=LocalLauncherConfig)
    mod: ModConfig = field(default_factory=NoModConfig)
    prediction: PredictionConfig = field(default_factory=NextTokenConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    init_from: str | None = None
    """The run whose weights this one starts from: a name, a path or `latest`, its newest checkpoint; or `NAME@STEP`."""
    resume: str = "auto"
    """`auto` goes on with this run if it was started, `never` starts a new attempt, a path starts from a checkpoint."""
    reset_optimizer: bool = False
    allow_changed_inputs: bool = False
    """Resume although data, tokenizer or code differ from what the checkpoint was made with."""
    output_dir: str = "outputs"
    cache_dir: str = "${output_dir}/cache"

    @property
    def architecture(self) -> Architecture:
        """What the decoder is made of."""
        return Architecture(self.model, self.attention, self.sparsity, self.mod, self.prediction)


NOT_IDENTITY = frozenset(
    {
        "stage",
        "budget",
        "tracker",
        "hardware",
        "sweep",
        "pipeline",
        "distributed",
        "launcher",
        "resume",
        "reset_optimizer",
        "allow_changed_inputs",
        "output_dir",
        "cache_dir",
    }
)
"""Top-level fields that do not make a run another run."""
