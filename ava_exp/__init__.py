"""Composable experiments with sparse language models.

The names below are what a program uses; `docs/python_api.md` shows them at work. Each is imported when it is first
asked for, so that `import ava_exp` and the command line start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "Architecture": "config.architecture",
    "compose": "config.compose",
    "BPEConfig": "config.data",
    "FileTokenizerConfig": "config.data",
    "FilesConfig": "config.data",
    "StdlibConfig": "config.data",
    "LossConfig": "config.loss",
    "GenerationSettings": "config.generation",
    "Activation": "config.model",
    "DenseConfig": "config.model",
    "GroupedAttentionConfig": "config.attention",
    "MixedActivation": "config.model",
    "MixtureOfHeadsConfig": "config.attention",
    "MultiLevelAttentionConfig": "config.attention",
    "MoEConfig": "config.model",
    "ModelConfig": "config.model",
    "Norm": "config.model",
    "RopeScaling": "config.model",
    "MultiTokenConfig": "config.prediction",
    "DeepSeekRouterConfig": "config.router",
    "DynamicRouterConfig": "config.router",
    "ExpertChoiceRouterConfig": "config.router",
    "HierarchicalRouterConfig": "config.router",
    "SinkhornRouterConfig": "config.router",
    "SoftRouterConfig": "config.router",
    "SwitchRouterConfig": "config.router",
    "TopKRouterConfig": "config.router",
    "TwoStageRouterConfig": "config.router",
    "RunConfig": "config.run",
    "AdamWConfig": "config.training",
    "ConstantConfig": "config.training",
    "CosineConfig": "config.training",
    "CosineRestartsConfig": "config.training",
    "InverseSqrtConfig": "config.training",
    "LinearConfig": "config.training",
    "WSDConfig": "config.training",
    "report": "config.validate",
    "validate": "config.validate",
    "BatchLoader": "data.loader",
    "EvaluationLoader": "data.loader",
    "prepare_data": "data.prepare",
    "UserError": "errors",
    "evaluate_language": "evaluation.language",
    "evaluate_by_position": "evaluation.positions",
    "generate": "generation.generate",
    "sample_tokens": "generation.sampling",
    "stream": "generation.sampling",
    "SpeculationStatistics": "generation.speculative",
    "speculate_tokens": "generation.speculative",
    "LossTerm": "losses.terms",
    "StepContext": "losses.terms",
    "build_losses": "losses.terms",
    "count_parameters": "models.arithmetic",
    "Decoder": "models.decoder",
    "build_model": "models.decoder",
    "ModelOutput": "nn.output",
    "Updater": "optim.update",
    "run": "stages.dispatch",
    "Trainer": "training.loop",
}
"""Where each public name lives, below `ava_exp`."""

if TYPE_CHECKING:
    from ava_exp.config.architecture import Architecture as Architecture
    from ava_exp.config.attention import GroupedAttentionConfig as GroupedAttentionConfig
    from ava_exp.config.attention import MixtureOfHeadsConfig as MixtureOfHeadsConfig
    from ava_exp.config.attention import MultiLevelAttentionConfig as MultiLevelAttentionConfig
    from ava_exp.config.compose import compose as compose
    from ava_exp.config.data import BPEConfig as BPEConfig
    from ava_exp.config.data import FilesConfig as FilesConfig
    from ava_exp.config.data import FileTokenizerConfig as FileTokenizerConfig
    from ava_exp.config.data import StdlibConfig as StdlibConfig
    from ava_exp.config.generation import GenerationSettings as GenerationSettings
    from ava_exp.config.loss import LossConfig as LossConfig
    from ava_exp.config.model import Activation as Activation
    from ava_exp.config.model import DenseConfig as DenseConfig
    from ava_exp.config.model import MixedActivation as MixedActivation
    from ava_exp.config.model import ModelConfig as ModelConfig
    from ava_exp.config.model import MoEConfig as MoEConfig
    from ava_exp.config.model import Norm as Norm
    from ava_exp.config.model import RopeScaling as RopeScaling
    from ava_exp.config.prediction import MultiTokenConfig as MultiTokenConfig
    from ava_exp.config.router import DeepSeekRouterConfig as DeepSeekRouterConfig
    from ava_exp.config.router import DynamicRouterConfig as DynamicRouterConfig
    from ava_exp.config.router import ExpertChoiceRouterConfig as ExpertChoiceRouterConfig
    from ava_exp.config.router import HierarchicalRouterConfig as HierarchicalRouterConfig
    from ava_exp.config.router import SinkhornRouterConfig as SinkhornRouterConfig
    from ava_exp.config.router import SoftRouterConfig as SoftRouterConfig
    from ava_exp.config.router import SwitchRouterConfig as SwitchRouterConfig
    from ava_exp.config.router import TopKRouterConfig as TopKRouterConfig
    from ava_exp.config.router import TwoStageRouterConfig as TwoStageRouterConfig
    from ava_exp.config.run import RunConfig as RunConfig
    from ava_exp.config.training import AdamWConfig as AdamWConfig
    from ava_exp.config.training import ConstantConfig as ConstantConfig
    from ava_exp.config.training import CosineConfig as CosineConfig
    from ava_exp.config.training import CosineRestartsConfig as CosineRestartsConfig
    from ava_exp.config.training import InverseSqrtConfig as InverseSqrtConfig
    from ava_exp.config.training import LinearConfig as LinearConfig
    from ava_exp.config.training import WSDConfig as WSDConfig
    from ava_exp.config.validate import report as report
    from ava_exp.config.validate import validate as validate
    from ava_exp.data.loader import BatchLoader as BatchLoader
    from ava_exp.data.loader import EvaluationLoader as EvaluationLoader
    from ava_exp.data.prepare import prepare_data as prepare_data
    from ava_exp.errors import UserError as UserError
    from ava_exp.evaluation.language import evaluate_language as evaluate_language
    from ava_exp.evaluation.positions import evaluate_by_position as evaluate_by_position
    from ava_exp.generation.generate import generate as generate
    from ava_exp.generation.sampling import sample_tokens as sample_tokens
    from ava_exp.generation.sampling import stream as stream
    from ava_exp.generation.speculative import SpeculationStatistics as SpeculationStatistics
    from ava_exp.generation.speculative import speculate_tokens as speculate_tokens
    from ava_exp.losses.terms import LossTerm as LossTerm
    from ava_exp.losses.terms import StepContext as StepContext
    from ava_exp.losses.terms import build_losses as build_losses
    from ava_exp.models.arithmetic import count_parameters as count_parameters
    from ava_exp.models.decoder import Decoder as Decoder
    from ava_exp.models.decoder import build_model as build_model
    from ava_exp.nn.output import ModelOutput as ModelOutput
    from ava_exp.optim.update import Updater as Updater
    from ava_exp.stages.dispatch import run as run
    from ava_exp.training.loop import Trainer as Trainer
else:  # type checkers read the imports above, and would take any name from a `__getattr__`

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
