"""ZeRO: what is left on one of N devices when training state is divided among them. No torch, nothing allocated.

Stage 1 divides the optimizer states with the master weights, stage 2 the gradients as well, stage 3 the weights as well
[rajbhandari2020zero] §5. Activations and logits belong to a device's own sequences and are never divided. The paper's
savings of 4 and 8 times are limits for many devices; one device alone saves nothing, unless what its optimizer needs
lies in the host's memory [ren2021zerooffload] §3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ava_exp.models.arithmetic import PREDICTION_HEADS, ParameterBreakdown
from ava_exp.models.memory import MemoryEstimate

STAGES = (0, 1, 2, 3)


@dataclass(kw_only=True, slots=True, frozen=True)
class ZeroMemory:
    """Bytes for one of the devices: its own memory, and the host's."""

    device: MemoryEstimate
    gathered: int
    """Stage 3: what a device borrows from the others to have the weights of one whole layer while it computes there."""
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.device.total + self.gathered


def divide(
    whole: MemoryEstimate, *, stage: int, num_devices: int, layer_weights: int, offload_optimizer: bool = False
) -> ZeroMemory:
    """Divide the memory of one device that has everything. `layer_weights` is bytes of the weights of one layer.

    `offload_optimizer` keeps a device's share of optimizer states and master weights in the host's memory; stage 0 has
    no shares to keep there.
    """
    assert stage in STAGES and num_devices >= 1 and not (offload_optimizer and stage == 0)
    master_weights = _share(whole.master_weights, num_devices, divided=stage >= 1)
    optimizer = _share(whole.optimizer, num_devices, divided=stage >= 1)
    device = dataclasses.replace(
        whole,
        master_weights=0 if offload_optimizer else master_weights,
        optimizer=0 if offload_optimizer else optimizer,
        gradients=_share(whole.gradients, num_devices, divided=stage >= 2),
        weights=_share(whole.weights, num_devices, divided=stage >= 3),
    )
    return ZeroMemory(
        device=device,
        gathered=layer_weights - _share(layer_weights, num_devices, divided=stage >= 3),
        host=master_weights + optimizer if offload_optimizer else 0,
    )


def _share(size: int, num_devices: int, *, divided: bool) -> int:
    """Return what one device holds, rounded up: the last share may be shorter than the others."""
    return -(-size // num_devices) if divided else size


def layer_parameters(breakdown: ParameterBreakdown, num_layers: int) -> int:
    """Return the parameters of one layer, on average: everything but the embedding and all heads."""
    inside = sum(part.total for part in breakdown.parts if part.name not in ("embedding", "head", PREDICTION_HEADS))
    return -(-inside // num_layers)
