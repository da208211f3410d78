"""RMS norm with a backward of our own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.nn.norm import RMSNorm


def test_gradcheck() -> None:
    norm = RMSNorm(8, eps=1e-5).double()
    norm.weight.data.uniform_(0.5, 1.5)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
        return y

    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, norm.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_fp64_as_the_format_allows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 50, 64, generator=generator).to(dtype) for _ in range(2))
    norm = RMSNorm(64, eps=1e-5)
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    norm.to(dtype)
    leaves = [x.clone().requires_grad_(), norm.weight]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = norm(leaves[0])
    expected = F.rms_norm(exact[0], (64,), exact[1], 1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    bound = 4 * torch.finfo(dtype).eps
    for found, wanted in zip([y, *(p.grad for p in leaves)], [expected, *(p.grad for p in exact)], strict=True):
        assert found.dtype == dtype
        assert (found - wanted).norm() <= bound * wanted.norm()
