"""Surgery: changes to the experts of a live model, together with the state of its optimizer.

The router of a layer knows the first `num_experts` of its experts; those after them are closed. What a new expert
changes depends on its gate, with noise 0:

- `closed`: nothing, bit for bit, with every router and while training, too. The router computes what it did and the
  grouped products have the operands that they had; the expert gets a gradient of zero until it is opened. It differs
  from a logit of minus infinity in that no sum gets a further term, which may change its order and so its rounding.
- `split`: with `soft`, nothing up to rounding: source and copy have half of the source's probability each. Routers that
  choose experts would choose otherwise, and are refused.
- `copy`: with a renormalised top-1, nothing: tokens go to one of two equal experts. With any other router tokens choose
  both of them in place of another, or the probability of the others shrinks.

An expert that no token chooses can be pruned without a change, up to rounding, where weights are those of the chosen
alone (`topk`, `sinkhorn`, `two_stage` renormalised; `deepseek`). Elsewhere the others take over its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ava_exp.config.surgery import Gate, NewState, SurgeryKind, SurgeryOperation, faults_of
from ava_exp.data.loader import IGNORED, Batch
from ava_exp.errors import ConfigError, must_be
from ava_exp.losses.terms import CrossEntropy, StepContext
from ava_exp.models.decoder import Block, Decoder
from ava_exp.models.stacks import (
    EXPERTS,
    ROUTER_WEIGHT,
    inserted,
    mixed,
    moe_layers,
    noisy,
    rebuild,
    stack_names,
    without,
)
from ava_exp.nn.moe.hierarchical import HierarchicalRouter
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.soft import SoftRouter
from ava_exp.optim.update import Updater

LOG_GATE = "router.log_gate"

Deed = Callable[[], str]
"""Does what was found to be possible, and says what it has done."""


@dataclass(kw_only=True, slots=True)
class LayerChanges:
    """What a layer has become, as far as it is no longer what its configuration says."""

    built_with: int
    """Experts that the configuration gives the layer."""
    num_experts: int
    num_closed: int = 0
    capacity_factor: float | None = None
    routing_temperature: float | None = None
    whole_expert_dropout: float | None = None
    load_balancing_factor: float | None = None


@dataclass(kw_only=True, slots=True)
class PrunedExpert:
    """An expert that was taken away: its entry of every stack, in weights and in the optimizer's states."""

    layer: int
    expert: int
    closed: bool
    entries: dict[str, Tensor]


@dataclass(kw_only=True, slots=True, frozen=True)
class Parameters:
    """How many parameters a model has, and how many of them act on a token."""

    total: int
    active: int


@dataclass(kw_only=True, slots=True, frozen=True)
class SurgeryReport:
    """What was done. Losses are those of inference, in nats per token, on the batches that were given."""

    operation: str
    done: list[str]
    loss_before: float
    loss_after: float
    before: Parameters
    after: Parameters

    def record(self, step: int) -> dict[str, Any]:
        """Return a record of the metrics; `loss` is the one after."""
        return {
            "kind": "surgery",
            "step": step,
            "operation": self.operation,
            "done": self.done,
            "loss_before": self.loss_before,
            "loss": self.loss_after,
            "parameters_before": self.before.total,
            "parameters": self.after.total,
            "active_parameters_before": self.before.active,
            "active_parameters": self.after.active,
        }


class Surgeon:
    """Operates on one model and remembers what has to be known to build it again."""

    def __init__(self, model: Decoder, updater: Updater | None = None) -> None:
        self.model, self.updater = model, updater
        self.changes: dict[int, LayerChanges] = {}
        self.pruned: list[PrunedExpert] = []
        self.history: list[dict[str, Any]] = []
        """The step and the operation of everything that was done, in order."""

    def operate(
        self, operation: SurgeryOperation, batches: Sequence[Batch], *, step: int, device: torch.device | None = None
    ) -> SurgeryReport:
        """Do one operation between two steps, all of it or nothing. `batches` give the visits and the losses.

        Noise is drawn from torch's generator on the CPU, whose state a checkpoint keeps.
        Raises ConfigError for what the model does not allow.
        """
        for name, expected, value in faults_of(operation):
            raise ConfigError(must_be(name, expected, value))
        if operation.noise < 0:
            raise ConfigError(must_be("noise", "0 or more", operation.noise))
        assert operation.operation is not None and batches
        of_depth = operation.operation is SurgeryKind.adjust_mod_capacity
        chosen = [] if of_depth else self._layers(operation.layer)
        deed_of_depth = self._set_mod_capacity(operation) if of_depth else None
        device = device or torch.device("cpu")
        before = count_parameters_of(self.model)
        loss_before, visits = measure(self.model, batches, device)
        if deed_of_depth is not None:
            done = [deed_of_depth()]
        else:
            plan = _PLANS[operation.operation]
            deeds = [plan(self, index, operation, visits[index]) for index in chosen]
            done = [f"layer {index}: {deed()}" for index, deed in zip(chosen, deeds, strict=True)]
        self.history.append({"step": step, "operation": operation.operation.name, "done": done})
        return SurgeryReport(
            operation=operation.operation.name,
            done=done,
            loss_before=loss_before,
            loss_after=measure(self.model, batches, device)[0],
            before=before,
            after=count_parameters_of(self.model),
        )

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Return what a checkpoint needs besides the weights: values for JSON and tensors. None without any surgery."""
        if not self.history:
            return None, {}
        values = {
            "layers": {str(index): asdict(changes) for index, changes in self.changes.items()},
            "pruned": [{"layer": e.layer, "expert": e.expert, "closed": e.closed} for e in self.pruned],
            "history": list(self.history),
            "mod_capacity": self.model.adjusted_mod_capacity,
        }
        tensors = {f"{n}:{name}": entry for n, e in enumerate(self.pruned) for name, entry in e.entries.items()}
        return values, tensors

    def follow(self, values: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
        """Give the model the shape and the settings that `state` told of; the new entries are not filled.

        A layer that was built with another number of experts is left as it is: its weights will not fit.
        """
        if values is None:
            return
        layers = moe_layers(self.model)
        for key, saved in values["layers"].items():
            index, changes = int(key), LayerChanges(**saved)
            if index not in layers or layers[index].experts.num_experts != changes.built_with:
                continue
            size = changes.num_experts + changes.num_closed
            rebuild(self.model, self.updater, index, lambda _, stack, n=size: stack.new_zeros(n, *stack.shape[1:]))  # type: ignore[misc]
            self.changes[index] = changes
            _set_up(layers[index], changes)
        self.pruned = [
            PrunedExpert(**saved, entries=_below(tensors, f"{number}:"))
            for number, saved in enumerate(values["pruned"])
        ]
        self.history = list(values["history"])
        if (capacity := values.get("mod_capacity")) is not None:
            self.model.adjust_mod_capacity(capacity)

    def _layers(self, asked: int | None) -> list[int]:
        there = list(moe_layers(self.model))
        if not there:
            raise ConfigError("the model is dense: there are no experts to operate on.")
        if asked is not None and asked not in there:
            raise ConfigError(must_be("layer", f"one with experts ({', '.join(map(str, there))})", asked))
        return there if asked is None else [asked]

    def _set_mod_capacity(self, operation: SurgeryOperation) -> Deed:
        old, value = self.model.mod_capacity, operation.value
        if old is None:
            raise ConfigError("every token passes through every layer of the model. Train one with `mod=learned`.")
        assert value is not None

        def do() -> str:
            self.model.adjust_mod_capacity(value)
            return f"layers process {value:g} of the tokens, and processed {old:g}"

        return do

    def _changes_of(self, index: int) -> LayerChanges:
        layer = moe_layers(self.model)[index]
        built_with = layer.experts.num_experts
        return self.changes.setdefault(index, LayerChanges(built_with=built_with, num_experts=built_with))

    def _resize(
        self, index: int, change: Callable[[str, Tensor], Tensor], *, more: int = 0, more_closed: int = 0
    ) -> None:
        rebuild(self.model, self.updater, index, change)
        changes = self._changes_of(index)
        changes.num_experts += more
        changes.num_closed += more_closed
        _set_up(moe_layers(self.model)[index], changes)

    def _add_expert(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        layer = moe_layers(self.model)[index]
        _refuse_groups(index, layer)
        source = visits.index(max(visits)) if operation.expert is None else operation.expert
        _require_expert(index, source, 0, _size(layer))
        closed = operation.gate is Gate.closed
        if operation.gate is Gate.split and not isinstance(layer.router, SoftRouter):
            remedy = "A router that chooses experts would not choose as before."
            raise ConfigError(must_be("gate", "`copy` or `closed`, or the router `soft`", "split", remedy))
        position = _size(layer) if closed else layer.experts.num_experts
        keep_state = operation.new_state is NewState.copy and not closed

        def change(name: str, stack: Tensor) -> Tensor:
            entry = stack[source]
            if "/" in name:
                entry = entry if keep_state else torch.zeros_like(entry)
            elif name == ROUTER_WEIGHT or name.startswith(EXPERTS):
                entry = noisy(entry, operation.noise)
            elif name == LOG_GATE and operation.gate is Gate.split:
                stack, entry = stack.clone(), entry - math.log(2)
                stack[source] = entry
            return inserted(stack, position, entry)

        def do() -> str:
            self._resize(index, change, more=int(not closed), more_closed=int(closed))
            share = visits[source] / max(1, sum(visits)) if source < len(visits) else 0.0
            noise = f", noise {operation.noise:g}" if operation.noise else ""
            return (
                f"expert {position} is a copy of expert {source}, which had {share:.1%} of the visits"
                f"{noise}, gate {operation.gate.name}"
            )

        return do

    def _open_expert(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        layer = moe_layers(self.model)[index]
        num_experts = layer.experts.num_experts
        if not layer.experts.num_closed:
            raise ConfigError(f"layer {index} has no closed expert. Add one with `gate=closed`.")
        expert = num_experts if operation.expert is None else operation.expert
        _require_expert(index, expert, num_experts, _size(layer))

        def do() -> str:
            move = lambda _, stack: inserted(without(stack, expert), num_experts, stack[expert])  # noqa: E731
            self._resize(index, move, more=1, more_closed=-1)
            return f"expert {expert} is open" + (f", as expert {num_experts}" if expert != num_experts else "")

        return do

    def _prune_expert(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        layer = moe_layers(self.model)[index]
        expert = visits.index(min(visits)) if operation.expert is None else operation.expert
        _require_expert(index, expert, 0, _size(layer))
        closed = expert >= layer.experts.num_experts
        if not closed:
            _refuse_groups(index, layer)
            _require_enough(index, layer)

        def do() -> str:
            entries: dict[str, Tensor] = {}

            def change(name: str, stack: Tensor) -> Tensor:
                entries[name] = stack[expert].to("cpu", copy=True)
                return without(stack, expert)

            self._resize(index, change, more=-int(not closed), more_closed=-int(closed))
            self.pruned.append(PrunedExpert(layer=index, expert=expert, closed=closed, entries=entries))
            share = 0.0 if closed else visits[expert] / max(1, sum(visits))
            return f"expert {expert}, which had {share:.1%} of the visits, is kept outside of the model"

        return do

    def _restore_expert(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        layer = moe_layers(self.model)[index]
        here = [e for e in self.pruned if e.layer == index and operation.expert in (None, e.expert)]
        if not here:
            known = ", ".join(f"{e.expert} of layer {e.layer}" for e in self.pruned) or "none"
            raise ConfigError(
                must_be("expert", f"one that was pruned in layer {index} (pruned: {known})", operation.expert)
            )
        pruned = here[-1]
        if not pruned.closed:
            _refuse_groups(index, layer)
        first, last = (layer.experts.num_experts, _size(layer)) if pruned.closed else (0, layer.experts.num_experts)
        position = min(max(pruned.expert, first), last)

        def change(name: str, stack: Tensor) -> Tensor:
            entry = pruned.entries.get(name)  # a state that the optimizer had not begun to keep is zero
            return inserted(stack, position, torch.zeros_like(stack[0]) if entry is None else entry.to(stack))

        def do() -> str:
            self._resize(index, change, more=int(not pruned.closed), more_closed=int(pruned.closed))
            self.pruned.remove(pruned)
            return f"expert {pruned.expert} is back" + (f", as expert {position}" if position != pruned.expert else "")

        return do

    def _merge_experts(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        """Average weights, router rows and states by visits; in `soft`, probabilities add up.

        A row that is the mean of two gives tokens that wanted both the same wish. Where experts are chosen the merged
        one competes as one of the two did, not with the probability of both, which would draw further tokens.
        """
        layer = moe_layers(self.model)[index]
        kept, other = operation.expert, operation.other
        assert kept is not None and other is not None
        for expert in (kept, other):
            _require_expert(index, expert, 0, layer.experts.num_experts)
        _refuse_groups(index, layer)
        _require_enough(index, layer)
        total = visits[kept] + visits[other]
        share = visits[other] / total if total else 0.5

        def change(name: str, stack: Tensor) -> Tensor:
            stack = stack.clone()
            if name == LOG_GATE:
                stack[kept] = torch.logaddexp(stack[kept], stack[other])
            else:
                stack[kept] = mixed(stack[kept], stack[other], share)
            return without(stack, other)

        def do() -> str:
            self._resize(index, change, more=-1)
            return f"experts {kept} and {other} are one, weighted {1 - share:.1%} and {share:.1%}"

        return do

    def _set(self, index: int, operation: SurgeryOperation, visits: list[int]) -> Deed:
        layer, kind, value = moe_layers(self.model)[index], operation.operation, operation.value
        assert kind is not None
        name = _SETTINGS[kind]
        if kind is SurgeryKind.adjust_capacity_factor and layer.capacity is None:
            raise ConfigError(
                f"layer {index} has no capacity to adjust, since it drops nothing. "
                "Train on with `sparsity.capacity_factor` to limit its experts."
            )
        if kind is SurgeryKind.adjust_routing_temperature and not hasattr(layer.router, name):
            raise ConfigError(f"{type(layer.router).__name__} has no temperature.")
        old = _settings_of(layer)[name]

        def do() -> str:
            changes = self._changes_of(index)
            setattr(changes, name, value)
            _set_up(layer, changes)
            return f"{name} is {value:g}, and was {old:g}"

        return do


_SETTINGS = {
    SurgeryKind.adjust_capacity_factor: "capacity_factor",
    SurgeryKind.adjust_routing_temperature: "routing_temperature",
    SurgeryKind.enable_expert_dropout: "whole_expert_dropout",
    SurgeryKind.scale_load_balancing: "load_balancing_factor",
}

_PLANS: dict[SurgeryKind, Callable[[Surgeon, int, SurgeryOperation, list[int]], Deed]] = {
    SurgeryKind.add_expert: Surgeon._add_expert,
    SurgeryKind.open_expert: Surgeon._open_expert,
    SurgeryKind.prune_expert: Surgeon._prune_expert,
    SurgeryKind.restore_expert: Surgeon._restore_expert,
    SurgeryKind.merge_experts: Surgeon._merge_experts,
    **dict.fromkeys(_SETTINGS, Surgeon._set),
}
"""Each raises ConfigError for what is not possible, and returns what is left to do: nothing is done by half."""


@torch.no_grad()
def measure(model: Decoder, batches: Sequence[Batch], device: torch.device) -> tuple[float, dict[int, list[int]]]:
    """Return the mean loss of `batches` at inference, and the visits of every layer's experts."""
    was_training, term = model.training, CrossEntropy()
    model.eval()
    context = StepContext(num_tokens=sum(int((batch.labels != IGNORED).sum()) for batch in batches))
    loss = torch.zeros((), dtype=torch.float64, device=device)
    counts = [torch.zeros(layer.router.num_experts, dtype=torch.int64, device=device) for layer in model.moe_layers()]
    for batch in batches:
        output = model(batch.input_ids.to(device), **batch.masks_on(device))
        loss += term(output, batch.labels.to(device), context)
        for visits_E, routing in zip(counts, output.routings, strict=True):
            visits_E.add_(routing.counts)
    model.train(was_training)
    return loss.item(), dict(zip(moe_layers(model), (visits_E.tolist() for visits_E in counts), strict=True))


def count_parameters_of(model: Decoder) -> Parameters:
    """Count a built model as `count_parameters` counts a configuration, whatever surgery made of it."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = {index: _idle_parameters(layer) for index, layer in moe_layers(model).items()}
    skipped = 0.0
    for index, router in model.mod_layers().items():
        block = model.get_submodule(f"blocks.{index}")
        assert isinstance(block, Block)
        parts = [block.feed_forward_norm, block.feed_forward]
        parts += [block.attention_norm, block.attention] if block.skips_attention else []
        own = sum(parameter.numel() for part in parts for parameter in part.parameters())
        skipped += (1 - router.capacity) * (own - idle.get(index, 0.0))
    return Parameters(total=total, active=round(total - sum(idle.values()) - skipped))


def _idle_parameters(layer: MoELayer) -> float:
    """Return how many parameters of a layer do not act on a token that it processes."""
    experts = layer.experts
    idle = sum(entry.numel() for entry in _own_weights(layer)) * (_size(layer) - experts_per_token(layer.router))
    idle += sum(parameter.numel() for parameter in layer.residual.parameters()) if layer.residual else 0
    return idle + experts.num_closed * layer.router.weight.shape[1]


def experts_per_token(router: Router) -> float:
    """Return how many experts a token visits, or at most visits."""
    if isinstance(router, HierarchicalRouter):
        return math.prod(router.choices)
    for name in ("moe_top_k", "max_experts", "average_experts"):
        if hasattr(router, name):
            return min(float(getattr(router, name)), router.num_experts)
    return router.num_experts


def _own_weights(layer: MoELayer) -> list[Tensor]:
    """Return one expert's entries of the stacks of weights."""
    names = [name.removeprefix(EXPERTS) for name in stack_names(layer) if name.startswith(EXPERTS)]
    return [layer.experts.get_parameter(name)[0] for name in names]


def _size(layer: MoELayer) -> int:
    return layer.experts.num_experts + layer.experts.num_closed


def _set_up(layer: MoELayer, changes: LayerChanges) -> None:
    """Tell the modules of a layer how many experts there are, and the settings that were changed."""
    for module in (layer.experts, layer.router):
        module.num_experts, module.num_closed = changes.num_experts, changes.num_closed
    if isinstance(layer.router, HierarchicalRouter) and len(layer.router.branching) == 1:
        layer.router.branching = layer.router.num_nodes = [changes.num_experts]
    if layer.capacity is not None:
        layer.capacity.experts_per_token = experts_per_token(layer.router)
        layer.capacity.factor = _first(changes.capacity_factor, layer.capacity.factor)
    if changes.routing_temperature is not None:
        layer.router.routing_temperature = changes.routing_temperature  # type: ignore[assignment]
    layer.router.whole_expert_dropout = _first(changes.whole_expert_dropout, layer.router.whole_expert_dropout)
    layer.load_balancing_factor = _first(changes.load_balancing_factor, layer.load_balancing_factor)


def _settings_of(layer: MoELayer) -> dict[str, float]:
    return {
        "capacity_factor": layer.capacity.factor if layer.capacity else math.inf,
        "routing_temperature": getattr(layer.router, "routing_temperature", 1.0),
        "whole_expert_dropout": layer.router.whole_expert_dropout,
        "load_balancing_factor": layer.load_balancing_factor,
    }


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _require_expert(index: int, expert: int, start: int, stop: int) -> None:
    if not start <= expert < stop:
        raise ConfigError(must_be("expert", f"{start} to {stop - 1}, the experts of layer {index} it can be", expert))


def _require_enough(index: int, layer: MoELayer) -> None:
    """Refuse to take the last expert, or one that every token's choice needs."""
    router = layer.router
    needed = 1
    if isinstance(router, HierarchicalRouter):
        needed = router.choices[0]
    for name in ("moe_top_k", "average_experts"):
        needed = max(needed, math.ceil(getattr(router, name, 1)))
    if layer.experts.num_experts <= needed:
        raise ConfigError(
            f"layer {index} must keep at least {needed} experts, as many as a token visits, "
            f"but would have {layer.experts.num_experts - 1} instead. Add one first."
        )


def _refuse_groups(index: int, layer: MoELayer) -> None:
    """Refuse what would leave groups or branches of different sizes."""
    router = layer.router
    groups = getattr(router, "num_groups", 1)
    if isinstance(router, HierarchicalRouter) and len(router.branching) > 1:
        raise ConfigError(
            f"layer {index} must have as many experts as its tree {router.branching} has leaves; "
            "only a tree of one level can gain or lose one."
        )
    if groups > 1:
        raise ConfigError(
            f"layer {index} must have {groups} groups of as many experts each; "
            "only `num_groups=1` can gain or lose one."
        )
