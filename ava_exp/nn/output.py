"""What a decoder returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ava_exp.nn.moe.routing import Routing


@dataclass(slots=True)
class ModelOutput:
    """`logits` (B, T, V) in the model's format; `routings` one entry for every mixture-of-experts layer."""

    logits: Tensor
    routings: list[Routing] = field(default_factory=list)
