"""What can be done to the experts of a trained model, and to its depth. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class SurgeryKind(Enum):
    """The operations; the trainer has a method of each name."""

    add_expert = "add_expert"
    open_expert = "open_expert"
    prune_expert = "prune_expert"
    restore_expert = "restore_expert"
    merge_experts = "merge_experts"
    adjust_capacity_factor = "adjust_capacity_factor"
    adjust_routing_temperature = "adjust_routing_temperature"
    enable_expert_dropout = "enable_expert_dropout"
    scale_load_balancing = "scale_load_balancing"
    adjust_mod_capacity = "adjust_mod_capacity"


SETTINGS = frozenset(
    {
        SurgeryKind.adjust_capacity_factor,
        SurgeryKind.adjust_routing_temperature,
        SurgeryKind.enable_expert_dropout,
        SurgeryKind.scale_load_balancing,
        SurgeryKind.adjust_mod_capacity,
    }
)
"""The operations that set a `value`."""


class Gate(Enum):
    """How a new expert meets the router: with a copy of its source's row, with half of its source's probability, or
    not at all until it is opened."""

    copy = "copy"
    split = "split"
    closed = "closed"


class NewState(Enum):
    """What the optimizer knows of a new expert: what it knows of the source, or nothing."""

    copy = "copy"
    zero = "zero"


@dataclass(kw_only=True, slots=True)
class SurgeryOperation:
    """One operation on one layer of experts, or on all of them; `adjust_mod_capacity` is on the whole model."""

    operation: SurgeryKind | None = None
    layer: int | None = None
    """A transformer layer, counted from 0; null is every layer that has experts."""
    expert: int | None = None
    """The one to copy (null: the most used), to open (null: the first closed one), to prune (null: the least used), to
    restore (null: the one pruned last), or the one of two to merge that keeps its place."""
    other: int | None = None
    """The expert that is merged into `expert`."""
    noise: float = 0.01
    """Standard deviation of what is added to a copy, in units of each tensor's own."""
    gate: Gate = Gate.copy
    new_state: NewState = NewState.copy
    value: float | None = None
    """What the operations that change a setting set it to; for `scale_load_balancing` a factor on the weight."""


def faults_of(operation: SurgeryOperation) -> Iterator[tuple[str, str, object]]:
    """Yield (field, what it must be, what it is) for what can be known without a model, and is no plain bound."""
    kind = operation.operation
    if kind is None:
        yield "operation", "one of " + ", ".join(f"`{member.name}`" for member in SurgeryKind), None
    if kind is SurgeryKind.merge_experts:
        for name in ("expert", "other"):
            if getattr(operation, name) is None:
                yield name, "given: two experts are merged", None
        if operation.expert is not None and operation.expert == operation.other:
            yield "other", f"another expert than {operation.expert}", operation.other
    if kind is SurgeryKind.adjust_mod_capacity and operation.layer is not None:
        yield "layer", "null: all layers that tokens may skip have one capacity", operation.layer
    if kind is None or kind not in SETTINGS:
        return
    if operation.value is None:
        yield "value", f"given: `{kind.name}` sets it", None
    elif kind is SurgeryKind.enable_expert_dropout and not 0 <= operation.value < 1:
        yield "value", "at least 0 and below 1, a probability", operation.value
    elif kind in (SurgeryKind.adjust_capacity_factor, SurgeryKind.adjust_routing_temperature) and operation.value <= 0:
        yield "value", "above 0", operation.value
    elif kind is SurgeryKind.adjust_mod_capacity and not 0 < operation.value <= 1:
        yield "value", "above 0 and at most 1, a share of tokens", operation.value
    elif operation.value < 0:
        yield "value", "0 or more", operation.value
