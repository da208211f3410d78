"""Which optimizers may update a weight in parts: those for which each of its values is alone."""

from __future__ import annotations

import torch

from ava_exp.errors import ConfigError

ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""An update of others looks at a whole matrix, as Muon's and Adafactor's do, or at what nobody has looked at yet."""


def require_elementwise(optimizer: torch.optim.Optimizer, backend: str) -> None:
    """Raise ConfigError unless parts of a weight are updated as the whole would be."""
    if type(optimizer) not in ELEMENTWISE:
        name = type(optimizer).__name__
        sentence = f"{name} updates whole weights, but with `distributed={backend}` a rank has parts of them"
        raise ConfigError(f"{sentence}. Choose `distributed=ddp` or `distributed=zero0`, or another `optimizer`.")
