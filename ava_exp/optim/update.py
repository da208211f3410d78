"""One update of the weights in any precision: gradients in, clipped, applied; or refused when they are not finite.

With mixed precision the model holds a 16-bit working copy and the optimizer fp32 master weights
[micikevicius2018mixed] §3.1: gradients are accumulated in fp32 on the masters, which are rounded back after a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ava_exp.optim.groups import parameter_groups
from ava_exp.optim.stochastic import StandIns


@dataclass(kw_only=True, slots=True)
class LossScale:
    """Loss scale [micikevicius2018mixed] §3.2 for fp16, adapted while training; elsewhere 1, which never moves."""

    scale: float = 1.0
    scale_factor: float = 2.0
    scale_window: int = 2000
    min_scale: float = 1.0
    dynamic: bool = False
    good_steps: int = 0

    def observe(self, finite: bool) -> None:
        """Shrink after an overflow, grow after `scale_window` steps without one."""
        if not self.dynamic:
            return
        if not finite:
            self.scale, self.good_steps = max(self.min_scale, self.scale / self.scale_factor), 0
            return
        self.good_steps += 1
        if self.good_steps == self.scale_window:
            self.scale, self.good_steps = self.scale * self.scale_factor, 0


class Updater:
    """Owns the optimizer, its master weights and the loss scale of one model.

    `wide_states` computes updates and keeps optimizer states in fp32 for 16-bit weights whose rounding is forgotten.
    `stochastic_rounding` computes them in fp32 for bf16 weights and states, portion by portion, and rounds by chance.
    """

    is_sharded = False
    """Whether `weights` and states are this rank's parts of the whole."""
    holds_model = True
    """Whether the model itself is whole on this rank."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        weight_decay: float,
        master_weights: bool,
        wide_states: bool = False,
        stochastic_rounding: bool = False,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.loss_scale = loss_scale or LossScale()
        self.draw: Callable[[], AbstractContextManager[None]] = nullcontext
        """The context in which random bits are drawn."""
        self.model_parameters = dict(model.named_parameters())
        self._model = model
        self.wide = master_weights or wide_states
        self.forget_masters = wide_states and not master_weights
        self.weights: dict[str, Tensor] = self._held()
        self.stand_ins = StandIns(self.weights) if stochastic_rounding else None
        held = self.weights if self.stand_ins is None else self.stand_ins.parameters
        groups = parameter_groups(model, weight_decay)
        self.group_names: list[list[str]] = [group.pop("names") for group in groups]
        for group, names in zip(groups, self.group_names, strict=True):
            group["params"] = [held[name] for name in names]
        self.optimizer = build_optimizer(groups)
        self.peak_learning_rate: float = self.optimizer.param_groups[0]["lr"]

    def _held(self) -> dict[str, Tensor]:
        """Return what the optimizer updates: the parameters, or fp32 masters of them."""
        if not self.wide:
            return dict(self.model_parameters)
        return {name: nn.Parameter(p.detach().float()) for name, p in self.model_parameters.items()}

    def whole(self, name: str, part: Tensor, *, everywhere: bool = False) -> Tensor:
        """Return what `part` is of the weight `name`, or of a state of its shape. Where ranks have parts, all of them
        call this; the first alone gets it, unless it is wanted `everywhere`."""
        return part

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return the part that this rank has of the weight `name`, or of a state of its shape."""
        return whole

    def whole_weights(self, *, everywhere: bool = False) -> dict[str, Tensor]:
        """Return all weights, put together as `whole` does."""
        return {name: self.whole(name, weight, everywhere=everywhere) for name, weight in self.weights.items()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What the model's state has besides parameters, as it is now: wrappers for several ranks replace buffers."""
        state = self._model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name not in self.model_parameters}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After a backward pass: add 16-bit gradients to the masters' fp32 ones and free them."""
        if not self.wide:
            return
        for name, parameter in self.model_parameters.items():
            if parameter.grad is None:
                continue
            master = self.weights[name]
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def apply(self, learning_rate: float, max_norm: float) -> tuple[float, bool]:
        """Unscale, clip to `max_norm` (global L2) and update; return the norm before clipping, and whether it was done.

        Nothing changes but the loss scale when the norm is not finite.
        """
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = self._norm(gradients) / self.loss_scale.scale
        finite = bool(norm - norm == 0)
        if finite:
            factor = min(1.0, max_norm / (norm + 1e-6)) / self.loss_scale.scale
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self._step()
        for weight in self.weights.values():
            weight.grad = None
        self.loss_scale.observe(finite)
        return norm, finite

    def _norm(self, gradients: list[Tensor]) -> float:
        """Return the L2 norm of all gradients of the model."""
        return torch.nn.utils.get_total_norm(gradients).item()

    def _step(self) -> None:
        if self.stand_ins is not None:
            with self.draw():
                self.stand_ins.step(self.optimizer)
            return
        self.optimizer.step()
        self.round_masters()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Copy the masters into the model's 16-bit weights; without `master_weights` they take the rounding over."""
        if not self.wide:
            return
        rounded: list[Tensor] = list(self.model_parameters.values())
        masters = list(self.weights.values())
        torch._foreach_copy_(rounded, masters)
        if self.forget_masters:
            torch._foreach_copy_(masters, rounded)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's tensors by 'weight name/state name', put together as `whole` does, and its numbers for
        JSON."""
        state = self.optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for index, name in enumerate(self._names()):
            for key, value in state.get(index, {}).items():
                if not isinstance(value, Tensor):
                    numbers[f"{name}/{key}"] = value
                    continue
                tensors[f"{name}/{key}"] = self.whole(name, value) if value.ndim else value
        return tensors, numbers

    def load_optimizer_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore what `optimizer_state` returned; hyperparameters stay those of the configuration."""
        state: dict[int, dict[str, Any]] = {}
        index_of = {name: index for index, name in enumerate(self._names())}
        for path, value in {**tensors, **numbers}.items():
            name, _, key = path.rpartition("/")
            is_part = isinstance(value, Tensor) and value.ndim
            state.setdefault(index_of[name], {})[key] = self.cut(name, value) if is_part else value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        if self.stand_ins is not None:
            self.stand_ins.narrow_states(self.optimizer)

    def _names(self) -> list[str]:
        return [name for names in self.group_names for name in names]
