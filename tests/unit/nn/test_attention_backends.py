"""Which back end computes attention: what `auto` chooses, what is logged, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from ava_exp.config.attention import AttentionBackend
from ava_exp.errors import ConfigError
from ava_exp.nn.attention.cache import Held
from ava_exp.nn.attention.softmax import PLAIN_LENGTH, SoftmaxAttention
from tests.unit.nn import attention_reference as cases
from tests.unit.nn.attention_reference import GROUPED, build, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "num_keys", "length", "expected"),
    [
        ("cpu", PLAIN_LENGTH, 8, AttentionBackend.plain),
        ("cpu", PLAIN_LENGTH + 1, 8, AttentionBackend.sdpa),
        ("cpu", PLAIN_LENGTH + 1, 1, AttentionBackend.plain),
        ("cuda", 16, 8, AttentionBackend.sdpa),
        ("mps", 16, 8, AttentionBackend.sdpa),
    ],
)
def test_auto_goes_by_device_and_length(device: str, num_keys: int, length: int, expected: AttentionBackend) -> None:
    assert (
        SoftmaxAttention(AttentionBackend.auto, tells=False).choose(torch.device(device), num_keys, length) is expected
    )


def test_every_choice_is_logged_once_and_by_one_layer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    layers = [SoftmaxAttention(AttentionBackend.auto, tells=number == 0) for number in range(3)]
    for num_keys in (8, 16, 600, 700):
        for layer in layers:
            layer.choose(CPU, num_keys, 8)
    assert caplog.messages == [
        "attention over 8 keys on cpu: plain, chosen by `attention.backend=auto`",
        "attention over 600 keys on cpu: sdpa, chosen by `attention.backend=auto`",
    ]
    caplog.clear()
    SoftmaxAttention(AttentionBackend.math, tells=True).choose(CPU, 8, 8)
    assert caplog.messages == ["attention over 8 keys on cpu: math"]


def attend(backend: AttentionBackend, dropout: float = 0.0, requires_grad: bool = True) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, 2, 6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(requires_grad)
    return SoftmaxAttention(backend, tells=False)(q, Held(k, v, 0), dropout=dropout)


@pytest.mark.parametrize(
    ("backend", "dropout", "message"),
    [
        (
            AttentionBackend.memory_efficient,
            0.0,
            (
                "`attention.backend` cannot be `memory_efficient` here: torch has no such kernel for float32, "
                "16 channels a head on this CPU. Use `auto`."
            ),
        ),
        (
            AttentionBackend.flash,
            0.1,
            (
                "`attention.backend` cannot be `flash` here: torch has no such kernel for float32, 16 channels a head, "
                "dropout 0.1 on this CPU. Use `auto`."
            ),
        ),
        (
            AttentionBackend.flex,
            0.0,
            (
                "`attention.backend` cannot be `flex` here: torch's flexible product trains on a CUDA device only, "
                "and this is CPU. Use `auto`."
            ),
        ),
        (
            AttentionBackend.flex,
            0.1,
            (
                "`attention.backend` cannot be `flex` here: torch's flexible product has no dropout, but "
                "`attention.attention_dropout` is above 0. Use `auto`."
            ),
        ),
    ],
)
def test_what_cannot_serve_is_refused_in_one_line(backend: AttentionBackend, dropout: float, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        attend(backend, dropout)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "backend", [each for each in AttentionBackend if each is not AttentionBackend.memory_efficient]
)
def test_all_that_serve_agree(backend: AttentionBackend) -> None:
    with torch.no_grad():
        y, plain = (attend(choice, requires_grad=False) for choice in (backend, AttentionBackend.plain))
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [AttentionBackend.flash, AttentionBackend.math, AttentionBackend.sdpa])
def test_gradients_agree(backend: AttentionBackend) -> None:
    x, gradients = cases.some_input(), []
    for choice in (backend, AttentionBackend.plain):
        layer = build(GROUPED(backend=choice))
        gradients.append(torch.autograd.grad(run(layer, x).square().sum(), list(layer.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_other_errors_are_not_disguised() -> None:
    q, k = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 8)
    with pytest.raises(RuntimeError):
        SoftmaxAttention(AttentionBackend.math, tells=False)(q, Held(k, k, 0))
