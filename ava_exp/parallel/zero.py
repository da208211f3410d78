"""DeepSpeed's ZeRO [rajbhandari2020zero]: optimizer states, gradients and weights that are cut over the ranks.

DeepSpeed wraps the objective, adds up gradients and makes the update; what a step is, what is skipped and what a
checkpoint holds stay as they are with one process. It is imported, which takes seconds, when it is asked for.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType
from ava_exp.errors import ConfigError
from ava_exp.models.decoder import Decoder
from ava_exp.optim.elementwise import require_elementwise
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import Alone

EngineOf = Callable[[torch.optim.Optimizer], Any]
"""Makes DeepSpeed's engine of an objective and the optimizer of its weights."""


def require(distributed: DistributedConfig, device: DeviceType) -> None:
    """Raise ConfigError where DeepSpeed cannot do what is asked for."""
    name = distributed.backend.value
    if find_spec("deepspeed") is None:
        raise ConfigError(f"`distributed={name}` needs DeepSpeed: `pip install 'ava_exp[deepspeed]'` (Linux alone).")
    if device not in (DeviceType.cpu, DeviceType.cuda):
        raise ConfigError(f"`distributed={name}` needs a CPU or CUDA. Choose another `hardware`, or `distributed=ddp`.")


def load(device: DeviceType) -> None:
    """Import DeepSpeed so that it compiles nothing to talk to others, and is heard only where something goes wrong."""
    import deepspeed.ops
    import deepspeed.utils

    if device is DeviceType.cpu:
        deepspeed.ops.__compatible_ops__ = {}  # else it compiles collectives of its own for half a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)


def settings(distributed: DistributedConfig) -> dict[str, Any]:
    """Return what DeepSpeed is told of a back end: gradients are added up in fp32, and nothing is compiled."""
    stage = distributed.backend.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small weights are put together with their blocks
    if distributed.backend is Backend.zero3_offload:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,  # whether; how much is said at each step
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def start_engine(ranks: Ranks, module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return DeepSpeed's engine, whose weights have the format in which it computes.

    Raises RuntimeError unless it is of the stage that was asked for and knows all ranks.
    """
    stage, dtype = ranks.backend.zero_stage, next(module.parameters()).dtype
    accelerator = Accelerator()  # each remembers one engine
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    # Without a division of states all of this is ours: DeepSpeed adds up what it is given.
    config["bf16"] = {"enabled": stage != 0 and dtype is torch.bfloat16, "check_grad_overflow": True}
    config["fp16"] = {"enabled": stage != 0 and dtype is torch.float16, "loss_scale": 1.0}
    engine, _ = accelerator.prepare(module, optimizer)
    from deepspeed import DeepSpeedEngine

    got = (type(engine), engine.zero_optimization_stage(), engine.dp_world_size)
    if got != (DeepSpeedEngine, stage, ranks.num_ranks):
        raise RuntimeError(f"asked for stage {stage} of {ranks.num_ranks} ranks, got {got}")
    return engine


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank has of one weight: `number` values from `start` on, which lie in `flat` from `offset` on."""

    start: int
    number: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the values in something of the shape of `flat`."""
        return flat.detach().narrow(0, self.offset, self.number)


class ZeroUpdater(Updater):
    """Lets DeepSpeed update weights of which each rank holds fp32 masters and optimizer states in part.

    Parts are flat: an optimizer that looks at the shape of a weight is refused.
    """

    is_sharded = True

    def __init__(
        self, model: nn.Module, *arguments: Any, engine_of: EngineOf, ranks: Ranks, device: torch.device, **options: Any
    ) -> None:
        super().__init__(model, *arguments, **options)
        require_elementwise(self.optimizer, ranks.backend.value)
        assert not self.wide and self.stand_ins is None, "DeepSpeed has masters of its own"
        self.ranks, self.device = ranks, device
        self.holds_model = ranks.backend.zero_stage != 3
        if not self.holds_model:
            _cut(model, device)
        self.engine = engine_of(self.optimizer)
        self.zero = self.engine.optimizer
        if not self.holds_model and isinstance(model, Decoder):
            _gather_head(self.engine.module, model)
        find = _part_of_flat if self.holds_model else _part_of_cut
        self.parts: dict[str, Part] = {}
        for names, group in zip(self.group_names, self.optimizer.param_groups, strict=True):
            for name in names:
                self.parts[name] = find(self.model_parameters[name], self.zero, group, ranks.rank)
        self.weights = {name: self.parts[name].of(self.parts[name].flat) for name in self.model_parameters}

    def collect_gradients(self) -> None:
        """DeepSpeed has done so."""

    @torch.no_grad()
    def apply(self, learning_rate: float, max_norm: float) -> tuple[float, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Stage 3 averages what is to be added up: one more factor by which gradients are not what they are.
        factor = self.loss_scale.scale / (1 if self.holds_model else self.ranks.num_ranks)
        self.zero.clip_grad = max_norm
        self.zero.custom_loss_scaler, self.zero.external_loss_scale = factor != 1.0, factor
        self.engine.step()
        self.zero.custom_loss_scaler = False
        finite = bool(self.engine.was_step_applied())
        self.loss_scale.observe(finite)
        return float(self.engine.get_global_grad_norm()), finite

    def whole(self, name: str, part: Tensor, *, everywhere: bool = False) -> Tensor:
        parameter = self.model_parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(math.prod(shape), dtype=part.dtype, device=self.device)
        whole.narrow(0, self.parts[name].start, part.numel()).copy_(part)
        dist.all_reduce(whole.view(torch.uint8))  # bytes, so that nothing is rounded, and -0 stays what it is
        return whole.view(shape) if everywhere or self.ranks.is_first else whole.new_empty(0)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        if name not in self.parts or whole.ndim == 0:
            return whole
        part = self.parts[name]
        return whole.flatten().narrow(0, part.start, part.number)

    @torch.no_grad()
    def round_masters(self) -> None:
        """Copy the masters into the model's weights."""
        if self.holds_model:
            self.zero.update_lp_params()
            return
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for name in self._names():
            part = self.parts[name]
            for key, value in self.optimizer.state.get(part.flat, {}).items():
                if not isinstance(value, Tensor):
                    numbers[f"{name}/{key}"] = value
                else:
                    tensors[f"{name}/{key}"] = self.whole(name, part.of(value)) if value.ndim else value
        return tensors, numbers

    def load_optimizer_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        together = {**tensors, **numbers}
        names = {path.rpartition("/")[0] for path in together}
        if names and names != self.parts.keys():
            raise ValueError(f"weights that DeepSpeed updates together must all have states, but {len(names)} do")
        self.optimizer.state.clear()
        for path, value in together.items():
            name, _, key = path.rpartition("/")
            part = self.parts[name]
            state = self.optimizer.state[part.flat]
            if isinstance(value, Tensor) and value.ndim:
                part.of(state.setdefault(key, torch.zeros_like(part.flat))).copy_(self.cut(name, value))
            elif isinstance(value, Tensor):
                known = state.setdefault(key, value.to(self._counter_device(part.flat), copy=True))
                if not torch.equal(known.cpu(), value.cpu()):
                    raise ValueError(f"weights that DeepSpeed updates together differ in `{key}`, as {name}")
            else:
                state[key] = value

    def _counter_device(self, flat: Tensor) -> torch.device:
        """Return where torch's optimizers look for their count of steps."""
        beside = any(self.optimizer.defaults.get(key) for key in ("fused", "capturable"))
        return flat.device if beside else torch.device("cpu")


def _part_of_flat(parameter: nn.Parameter, zero: Any, group: dict[str, Any], rank: int) -> Part:
    """Return what this rank updates of a weight that all have: one rank's values lie in a row, across weights."""
    (flat,) = group["params"]
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Part(0, 0, flat, 0)
    own, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Part(own.start, own.numel, flat, place.start)


def _part_of_cut(parameter: nn.Parameter, zero: Any, group: dict[str, Any], rank: int) -> Part:
    """Return what this rank has of a weight that is cut evenly, where the last part may be padded."""
    index, offset, number = zero.grad_position[zero.get_param_id(parameter)]
    size: int = parameter.ds_numel  # type: ignore[attr-defined]
    start = min(rank * number, size)
    return Part(start, min(number, size - start), zero.fp32_partitioned_groups_flat[index], offset)


def _cut(model: nn.Module, device: torch.device) -> None:
    """Cut the weights of a model over the ranks, one by one: the device need not hold the whole, wherever it is."""
    from deepspeed.runtime.zero.partition_parameters import Init

    config, dtype = Accelerator().state.deepspeed_plugin.deepspeed_config, next(model.parameters()).dtype
    kept_at = config["zero_optimization"].get("offload_param", {}).get("device")
    Init(module=model, dtype=dtype, config_dict_or_path=config, remote_device=kept_at)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if isinstance(model, Decoder):
        _gather_by_block(model)


def _gather_by_block(model: Decoder) -> None:
    """Let stage 3 put whole blocks together, whatever they do inside: ranks may differ in what they skip of one."""
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for block in (*model.blocks, *model.prediction_heads):
        set_z3_leaf_module(block, True)


def _gather_head(objective: nn.Module, model: Decoder) -> None:
    """Let stage 3 put the head together for the losses, too, which are no part of the model."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    register_external_parameter(objective, model.embedding.weight if model.head is None else model.head.weight)


class Zero(Alone):
    """DeepSpeed cuts optimizer states, from stage 2 on gradients, and with stage 3 weights over the ranks."""

    updater: ZeroUpdater

    def __init__(self, updater: ZeroUpdater) -> None:
        super().__init__(updater.engine, updater)
        self.ranks = updater.ranks

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        self.updater.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        if self.updater.holds_model:
            loss.register_hook(self._require_all_weights)  # type: ignore[no-untyped-call]
        self.updater.engine.backward(loss, scale_wrt_gas=False)

    def _require_all_weights(self, _: Tensor) -> None:
        """Stages 1 and 2 add gradients up in the order in which they come: without one, others would get mixed up."""
        from deepspeed.runtime.utils import count_used_parameters_in_backward

        parameters = self.updater.model_parameters
        if count_used_parameters_in_backward(parameters.values()) < len(parameters):
            idle = [name for name, each in parameters.items() if not count_used_parameters_in_backward([each])]
            name = self.ranks.backend.value
            raise ConfigError(
                f"with `distributed={name}` all weights must take part in a micro-batch, but {', '.join(idle[:3])} did "
                "not: longer or more sequences in a micro-batch help, as `distributed=zero3` does."
            )

    def verify(self) -> None:
        whole = self.updater.model_parameters if self.updater.holds_model else {}
        self._verify_alike({**whole, **self.updater.buffers})


class ZeroCopies(Alone):
    """Stage 0: a copy of the model on every rank; DeepSpeed adds up their gradients, in fp32 at least."""

    def __init__(self, engine: Any, updater: Updater, ranks: Ranks) -> None:
        super().__init__(engine, updater)
        self.ranks, self._engine = ranks, engine
        engine.set_gradient_accumulation_boundary(False)  # nothing of its own accord
        updater.draw = ranks.draw_alike

    @contextmanager
    def accumulate(self, is_last: bool) -> Iterator[None]:
        yield
        self.updater.collect_gradients()
        if is_last:
            self._add_up()

    def _add_up(self) -> None:
        weights = list(self.updater.weights.values())
        is_used = self.ranks.largest([weight.grad is not None for weight in weights])
        used = [weight for weight, by_any in zip(weights, is_used, strict=True) if by_any]
        for weight in used:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        self._engine.buffered_allreduce_fallback(grads=[weight.grad for weight in used])

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def verify(self) -> None:
        self._verify_alike(self.updater.weights | self.updater.buffers)


def probe(accelerator: Accelerator, ranks: Ranks) -> None:
    """Raise RuntimeError unless a step of a small model comes out as it must: libraries drop things without a word."""
    size = ranks.num_ranks + 1  # which cannot be cut evenly
    module = nn.Linear(size, size, bias=False).to(accelerator.device)
    nn.init.zeros_(module.weight)

    def start(optimizer: torch.optim.Optimizer) -> Any:
        return start_engine(ranks, module, optimizer)

    options: dict[str, Any] = {"weight_decay": 0.0, "master_weights": False}
    if ranks.backend.zero_stage == 0:
        updater = Updater(module, _descent, **options)
        strategy: Zero | ZeroCopies = ZeroCopies(start(updater.optimizer), updater, ranks)
    else:
        updater = ZeroUpdater(module, _descent, engine_of=start, ranks=ranks, device=accelerator.device, **options)
        strategy = Zero(updater)
    inputs = torch.full((1, size), float(ranks.rank + 1), device=accelerator.device)
    with strategy.accumulate(is_last=True):
        strategy.backward(strategy.objective(inputs).sum())
    norm, _ = updater.apply(1.0, math.inf)
    weight = updater.whole("weight", updater.weights["weight"], everywhere=True)
    expected = size * (size - 1) / 2
    if abs(norm - size * expected) > 1e-3 or not torch.allclose(weight, torch.tensor(-expected).to(weight)):
        raise RuntimeError(f"gradients are not added up over the ranks: {weight.flatten()[0]} instead of {-expected}")


def _descent(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)
