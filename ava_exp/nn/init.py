"""All initialisation, in one place.

Every parameter draws from a generator seeded by the run's seed and the parameter's own name. Adding a module, or
replacing dense layers by experts, therefore leaves the start of everything else as it was.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight", "experts.down")
"""Parameters that write to the residual stream: two a layer, scaled down so that depth does not grow its variance."""


@torch.no_grad()
def initialize(model: nn.Module, seed: int, initializer_range: float, num_layers: int) -> None:
    """Fill all parameters: norms 1, biases and logits of mixtures 0, matrices normal, residual outputs scaled
    [radford2019gpt2] §2.3.

    What modules learn beside gradients starts at 0.
    """
    for name in model.state_dict().keys() - dict(model.named_parameters()).keys():
        model.get_buffer(name).zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "mixture.logits")):
            parameter.zero_()
        elif parameter.ndim == 1 or name.endswith("experts.norm"):
            parameter.fill_(1.0)
        else:
            scale = 1 / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            generator = torch.Generator().manual_seed(_seed_of(name, seed))
            values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
                0, scale * initializer_range, generator=generator
            )
            parameter.copy_(values)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
