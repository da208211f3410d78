"""Stacks: the tensors that have one entry for every expert of a layer, rebuilt together with the optimizer's states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ava_exp.errors import ConfigError
from ava_exp.models.decoder import Decoder
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.optim.update import Updater

ROUTER_WEIGHT = "router.weight"
EXPERTS = "experts."

Change = Callable[[str, Tensor], Tensor]
"""Maps a stack to a new one. It is called by the stack's name in the layer, as `experts.up`, and with the fp32 master
where there is one; then for every state that the optimizer keeps of it, as `experts.up/exp_avg`."""


def moe_layers(model: Decoder) -> dict[int, MoELayer]:
    """Return the layers that have experts, by their number among all layers."""
    layers = ((index, block.feed_forward) for index, block in enumerate(model.blocks))
    return {index: layer for index, layer in layers if isinstance(layer, MoELayer)}


def stack_names(layer: MoELayer) -> list[str]:
    """Return the names of a layer's stacks: what all experts share, a projection or the activation, is none."""
    experts = [f"{EXPERTS}{name}" for name in layer.experts.stacks()]
    buffers = [f"router.{name}" for name, buffer in layer.router.named_buffers() if buffer.ndim > 0]
    return [*experts, ROUTER_WEIGHT, *buffers]


@torch.no_grad()
def rebuild(model: Decoder, updater: Updater | None, index: int, change: Change) -> None:
    """Put `change` of every stack of a layer in its place. Weights keep their names, formats and optimizer groups.

    Raises ConfigError, before anything is changed, when the optimizer keeps something that is no stack.
    """
    layer = moe_layers(model)[index]
    prefix = f"blocks.{index}.feed_forward."
    for name in stack_names(layer):
        _check_states(updater, prefix + name)
    for name in stack_names(layer):
        parent, _, attribute = name.rpartition(".")
        module = layer.get_submodule(parent)
        old = getattr(module, attribute)
        is_parameter = isinstance(old, nn.Parameter)
        new = _replaced(updater, prefix + name, name, old, change) if is_parameter else change(name, old)
        setattr(module, attribute, new)


def _replaced(updater: Updater | None, path: str, name: str, old: nn.Parameter, change: Change) -> nn.Parameter:
    """Return the new model parameter, with its master and states in the updater's hands."""
    if updater is None:
        return nn.Parameter(change(name, old.detach()))
    old_weight = updater.weights[path]
    weight = nn.Parameter(change(name, old_weight.detach()))
    parameter = nn.Parameter(weight.detach().to(old.dtype)) if updater.wide else weight
    if updater.forget_masters:
        weight.copy_(parameter)
    updater.model_parameters[path], updater.weights[path] = parameter, weight
    old_held, held = (old_weight, weight) if updater.stand_ins is None else (updater.stand_ins.parameters[path],) * 2
    for group in updater.optimizer.param_groups:
        group["params"] = [held if other is old_held else other for other in group["params"]]
    if state := updater.optimizer.state.pop(old_held, None):
        updater.optimizer.state[held] = {
            key: change(f"{name}/{key}", value) if _is_stack(value, old_weight) else value
            for key, value in state.items()
        }
    return parameter


def _is_stack(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape


def _check_states(updater: Updater | None, path: str) -> None:
    if updater is None or path not in updater.weights:
        return
    weight = updater.weights[path]
    assert weight.grad is None and updater.model_parameters[path].grad is None, "surgery is done between two steps"
    held = weight if updater.stand_ins is None else updater.stand_ins.parameters[path]
    for key, value in updater.optimizer.state.get(held, {}).items():
        if isinstance(value, Tensor) and value.ndim > 0 and not _is_stack(value, weight):
            raise ConfigError(
                f"the optimizer keeps `{key}` of {path} in another shape than the weights, "
                "so that experts cannot be added or taken away. Go on with `reset_optimizer=true` first."
            )


def without(stack: Tensor, position: int) -> Tensor:
    """Return a stack without one entry."""
    return torch.cat([stack[:position], stack[position + 1 :]])


def inserted(stack: Tensor, position: int, entry: Tensor) -> Tensor:
    """Return a stack with one entry more."""
    return torch.cat([stack[:position], entry[None], stack[position:]])


def noisy(entry: Tensor, noise: float) -> Tensor:
    """Return an entry plus Gaussian noise of `noise` times its own standard deviation, the same on every device."""
    if noise == 0:
        return entry
    wide = entry.to(torch.promote_types(entry.dtype, torch.float32))
    drawn = torch.randn(entry.shape, dtype=torch.float32).to(wide)
    return (wide + noise * wide.std(correction=0) * drawn).to(entry.dtype)


def mixed(first: Tensor, second: Tensor, share_of_second: float) -> Tensor:
    """Return the weighted mean of two entries: exactly the first where both are equal."""
    wide = torch.promote_types(first.dtype, torch.float32)
    return torch.lerp(first.to(wide), second.to(wide), share_of_second).to(first.dtype)
