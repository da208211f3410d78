"""Signals set flags, and nothing but flags."""

from __future__ import annotations

import os
import signal

import pytest

from ava_exp.training.signals import SignalRequests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_remembered_and_told_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with SignalRequests() as requests:
        assert requests.stop is None
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert requests.stop is number
        assert not requests.save
    assert capfd.readouterr().err == f"{number.name}: saving after this step, then stopping.\n"


def test_a_save_is_asked_for_without_a_stop(capfd: pytest.CaptureFixture[str]) -> None:
    with SignalRequests() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.save and requests.stop is None
    assert capfd.readouterr().err == ""


def test_nobody_to_tell_is_no_error() -> None:
    kept = os.dup(2)
    os.close(2)
    try:
        with SignalRequests() as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.stop is signal.SIGTERM
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_the_handlers_of_before_come_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with SignalRequests():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
