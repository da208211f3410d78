"""Parts of a weight are updated as the whole would be, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ava_exp.errors import ConfigError
from ava_exp.optim.elementwise import ELEMENTWISE, require_elementwise


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_halves_become_what_the_whole_becomes(kind: type[torch.optim.Optimizer]) -> None:
    whole = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    halves = [nn.Parameter(half.clone()) for half in whole.detach().flatten().chunk(2)]
    optimizers = [kind([weight], lr=0.1) for weight in (whole, *halves)]  # type: ignore[call-arg]
    for optimizer in optimizers:
        require_elementwise(optimizer, "zero2")
    for step in range(3):
        whole.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for half, gradient in zip(halves, whole.grad.flatten().chunk(2), strict=True):
            half.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(torch.cat([half.detach() for half in halves]), whole.detach().flatten(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor])
def test_what_looks_at_a_matrix_is_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind([nn.Parameter(torch.ones(4, 4))], lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(
        ConfigError, match=f"{kind.__name__} updates whole weights, but with `distributed=fsdp2` a rank"
    ):
        require_elementwise(optimizer, "fsdp2")
