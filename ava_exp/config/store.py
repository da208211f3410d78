"""Registers the typed schema of every group with Hydra, under `_schema/`, where they stay out of a group's options."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from ava_exp.config import (
    attention,
    data,
    distributed,
    launcher,
    loss,
    machine,
    mod,
    model,
    pipeline,
    prediction,
    router,
    run,
    stage,
    training,
)

SCHEMAS: dict[str, Any] = {
    "run": run.RunConfig,
    "stage/validate": stage.ValidateConfig,
    "stage/plan": stage.PlanConfig,
    "stage/prepare": stage.PrepareConfig,
    "stage/pretrain": stage.PretrainConfig,
    "stage/evaluate": stage.EvaluateConfig,
    "stage/extend_context": stage.ExtendContextConfig,
    "stage/generate": stage.GenerateConfig,
    "stage/surgery": stage.SurgeryConfig,
    "stage/pipeline": stage.PipelineStageConfig,
    "pipeline": pipeline.PipelineConfig,
    "model": model.ModelConfig,
    "attention/grouped": attention.GroupedAttentionConfig,
    "attention/multi_level": attention.MultiLevelAttentionConfig,
    "attention/mixture_of_heads": attention.MixtureOfHeadsConfig,
    "sparsity/dense": model.DenseConfig,
    "sparsity/moe": model.MoEConfig,
    "mod/none": mod.NoModConfig,
    "mod/learned": mod.LearnedModConfig,
    "mod/static": mod.StaticModConfig,
    "mod/random": mod.RandomModConfig,
    "prediction/next_token": prediction.NextTokenConfig,
    "prediction/multi_token": prediction.MultiTokenConfig,
    "loss": loss.LossConfig,
    "router/topk": router.TopKRouterConfig,
    "router/switch": router.SwitchRouterConfig,
    "router/soft": router.SoftRouterConfig,
    "router/expert_choice": router.ExpertChoiceRouterConfig,
    "router/sinkhorn": router.SinkhornRouterConfig,
    "router/deepseek": router.DeepSeekRouterConfig,
    "router/two_stage": router.TwoStageRouterConfig,
    "router/dynamic": router.DynamicRouterConfig,
    "router/hierarchical": router.HierarchicalRouterConfig,
    "data/stdlib": data.StdlibConfig,
    "data/files": data.FilesConfig,
    "tokenizer/bpe": data.BPEConfig,
    "tokenizer/file": data.FileTokenizerConfig,
    "optimizer/adamw": training.AdamWConfig,
    "schedule/cosine": training.CosineConfig,
    "schedule/cosine_with_restarts": training.CosineRestartsConfig,
    "schedule/linear": training.LinearConfig,
    "schedule/wsd": training.WSDConfig,
    "schedule/constant": training.ConstantConfig,
    "schedule/inverse_sqrt": training.InverseSqrtConfig,
    "precision": machine.PrecisionConfig,
    "hardware": machine.HardwareConfig,
    "distributed": distributed.DistributedConfig,
    "launcher/local": launcher.LocalLauncherConfig,
    "launcher/slurm": launcher.SlurmLauncherConfig,
    "tracker/none": machine.NoTrackerConfig,
    "tracker/mlflow": machine.MLflowConfig,
}


def register_schemas() -> None:
    """Make every schema known to Hydra; calling it twice changes nothing."""
    store = ConfigStore.instance()
    for path, node in SCHEMAS.items():
        group, _, name = f"_schema/{path}".rpartition("/")
        store.store(group=group, name=name, node=node)
