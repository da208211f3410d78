"""The planner's table of back ends: what it says, where it says nothing, and that nothing is cut off."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR
from ava_exp.stages.numbers import figure

if TYPE_CHECKING:
    from tests.conftest import CommandLine

LARGE = ("model=b300", "hardware=32xh200", "budget.chinchilla_multiplier=20", "hardware.price_per_hour=12.5")


def planned(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, *arguments: str, columns: int = 100) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = command_line("~local", "stage=plan", *arguments)
    assert (outcome.code, outcome.err) == (EXIT_OK, "")
    return str(outcome.out)


def rows(text: str, name: str) -> list[list[str]]:
    """Return the cells after the name of every row of this name in the tables of back ends."""
    tables = text[text.index("Back ends on") :]
    lines = [line for line in tables.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [[cell.strip() for cell in line.split("│")[2:-1]] for line in lines]


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(
    "arguments",
    [
        LARGE,
        ("model=tiny", "hardware=h100", "hardware.num_devices=2", "budget.steps=1"),
        ("model=b300", "hardware=t4", "hardware.num_devices=1024", "training.gradient_accumulation_steps=64"),
    ],
    ids=["b300", "tiny", "far"],
)
def test_nothing_is_cut_off(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, columns: int, arguments: tuple[str, ...]
) -> None:
    text = planned(command_line, monkeypatch, *arguments, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text.replace("=…`", "")
    assert all(re.match(r"│ \S", line) for line in text.splitlines() if line.startswith("│")), "a cell was broken"


def test_back_ends_stand_side_by_side(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = planned(command_line, monkeypatch, *LARGE)
    assert "Back ends on 32 × h200 in mixed_bf16\n" in re.sub(" +\n", "\n", text)
    assert "Back ends on 32 × h200 in mixed_bf16, experts divided among 8" in text
    whole, divided = rows(text, "weights")
    assert whole == ["6,229", "", "6,229", "6,229", "195", "195"]
    assert divided[0] == "987"
    assert rows(text, "all-reduce")[0] == [figure(2 * 31 / 32 * 4 * 3344.1045504), "", "", "", "", ""]
    assert len(rows(text, "all-to-all")) == 1
    assert rows(text, "fits 141 GiB") == [["no"] * 6] * 2
    assert float(rows(text, "efficiency, %")[0][-1]) < 90
    assert all(len(set(row)) == 1 for row in rows(text, "steps"))
    assert len(rows(text, "cost")) == len(rows(text, "time, years")) == 2
    assert "Assumed: computing reaches 30% of the peak, communication 80% of the declared bandwidths" in text


def test_one_device_has_no_back_ends_to_choose_from(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Back ends" not in planned(command_line, monkeypatch, "hardware=h100")


def test_a_dense_model_has_no_experts_to_divide(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = planned(command_line, monkeypatch, "sparsity=dense", "hardware=8xh100")
    assert "divided" not in text and rows(text, "all-to-all") == []


def test_a_host_without_memory_of_its_own_offloads_nothing(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = planned(command_line, monkeypatch, "hardware=cpu", "hardware.num_devices=2", "sparsity=dense")
    assert len(rows(text, "buffers")[0]) == 5
    assert "offload" not in text
    assert rows(text, "efficiency, %") == []
    assert "give `hardware.peak_tflops.bf16=…` and" in text


def test_a_thousand_devices_fit_on_a_line(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = planned(command_line, monkeypatch, "model=b1", "hardware=h100", "hardware.num_devices=1024")
    assert "Back ends on 1,024 × h100 in mixed_bf16" in text
    assert rows(text, "fits 80 GiB")[0] == ["✓"] * 6


def test_experts_are_divided_as_one_says(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("model=b1", "hardware=8xh100")
    assert "divided among 8" in planned(command_line, monkeypatch, *arguments)
    assert "divided among 2" in planned(command_line, monkeypatch, *arguments, "stage.expert_parallel=2")
    assert "divided" not in planned(command_line, monkeypatch, *arguments, "stage.expert_parallel=1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("model=b1", "hardware=8xh100", "stage.expert_parallel=3"), "a divisor of the number of experts (8)"),
        (("model=b1", "hardware=4xh100", "stage.expert_parallel=8"), "a divisor of `hardware.num_devices` (4)"),
        (("sparsity=dense", "hardware=4xh100", "stage.expert_parallel=2"), "a divisor of the number of experts (1)"),
        (("model=b1", "hardware=4xh100", "stage.expert_parallel=0"), "at least 1"),
    ],
)
def test_experts_that_do_not_divide_are_refused(
    command_line: CommandLine, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = command_line("~local", "stage=plan", *arguments)
    assert outcome.code == EXIT_USER_ERROR
    assert f"`stage.expert_parallel` must be {expected}" in outcome.err


def test_assumptions_are_ones_own(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("model=b1", "hardware=8xh100", "sparsity=dense", "training.batch_size=1")
    slow = planned(command_line, monkeypatch, *arguments, "stage.assumed_link_utilisation=0.4")
    fast = planned(command_line, monkeypatch, *arguments)
    unhidden = planned(command_line, monkeypatch, *arguments, "stage.assumed_overlap=0")
    taken = [[float(cell) for cell in rows(text, "communication")[0]] for text in (slow, fast, unhidden)]
    assert taken[0][0] == pytest.approx(2 * taken[1][0], rel=0.01)
    assert taken[2] == taken[1]
    assert rows(unhidden, "not hidden")[0] == rows(unhidden, "communication")[0]
    assert "hides in 0% of the computing" in " ".join(unhidden.split())


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0.00"),
        (0.0012, "0.0012"),
        (0.0999, "0.1"),
        (0.5, "0.50"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.9, "99.9"),
        (99.97, "100"),
        (123_456, "123,456"),
        (999_499, "999,499"),
        (999_600, "1.00 M"),
        (17_775_733, "17.8 M"),
        (292_490_000, "292 M"),
        (999_600_000, "1.00 B"),
        (18.64e12, "18.6 T"),
    ],
)
def test_a_figure_has_seven_characters_at_most(number: float, expected: str) -> None:
    assert figure(number) == expected
    assert len(expected) <= 7
