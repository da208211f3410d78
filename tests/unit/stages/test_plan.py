"""What the planner prints: the claims beside the truth, what fits, and how long it takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.errors import EXIT_OK
from ava_exp.models.arithmetic import count_parameters
from ava_exp.models.memory import estimate_memory
from ava_exp.stages.numbers import duration

if TYPE_CHECKING:
    from tests.conftest import CommandLine


@pytest.fixture
def planned(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """`stage=plan ARGUMENTS` on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> str:
        outcome = command_line("~local", "stage=plan", *arguments)
        assert (outcome.code, outcome.err) == (EXIT_OK, "")
        return outcome.out

    return run  # type: ignore[return-value]


def cells(text: str, row: str) -> list[str]:
    """Return the cells of a table's row, after its name."""
    (line,) = [line for line in text.splitlines() if re.match(rf"[│┃] {re.escape(row)} +[│┃]", line)]
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


def test_the_largest_preset_is_planned_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from ava_exp.cli import main; "
        "code = main(['stage=plan', 'model=b300', 'hardware=32xh200', 'hardware.price_per_hour=1']); "
        "sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_OK, done.stderr
    assert "3,344,104,550,400" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [(), ("model=b300", "hardware=32xh200", "budget.chinchilla_multiplier=20", "hardware.price_per_hour=12.5")],
    ids=["quick", "b300"],
)
def test_nothing_is_cut_off(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, columns: int, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = command_line("~local", "stage=plan", *arguments).out
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    inside = [line for line in text.splitlines() if line.startswith("│")]
    assert all(re.match(r"│ \S", line) for line in inside), "a cell was broken into two lines"


def test_claim_and_truth_stand_side_by_side(planned: CommandLine) -> None:
    text = str(planned("model=debug"))
    assert cells(text, "embedding") == ["6,432,896", "6,432,896"]
    assert cells(text, "all") == ["14,572,416", "13,392,768"]
    assert cells(text, "its source claims") == ["4,000,000", "500,000"]
    assert cells(text, "all / claim") == ["3.64", "26.79"]
    assert "No model with this vocabulary is so small: the embedding alone has 6.43 M parameters." in text
    assert "Its source claims 0.05 GB of memory (Any)" in text


def test_a_preset_without_claims_says_nothing_of_them(planned: CommandLine) -> None:
    text = str(planned())
    assert "claim" not in text


def test_half_a_claim_leaves_the_other_half_empty(planned: CommandLine) -> None:
    text = str(planned("model=gpu_base"))
    assert cells(text, "its source claims") == ["500,000,000", ""]
    assert cells(text, "all / claim") == ["1.02", ""]
    assert "so small" not in text


def test_the_claimed_memory_stands_beside_the_weights(planned: CommandLine) -> None:
    """[b30] 214.2 B parameters: 2 bytes in 16 bits, 20 with masters, both gradients and Adam."""
    text = " ".join(str(planned("model=b30")).split())
    assert "claims 120 GB of memory (4× A100 80GB): the weights in 16 bits are 428.47 GB" in text
    assert "with gradients and Adam in mixed precision 4,285 GB" in text


def test_memory_is_divided_among_the_devices(planned: CommandLine) -> None:
    arguments = ("model=gpu_base", "training.batch_size=1", "data.sequence_length=64")
    text = str(planned(*arguments, "hardware=8xh100"))
    parameters = 510_549_504
    config = compose(["~local", *arguments])
    whole = estimate_memory(
        config.architecture,
        precision=Precision.mixed_bf16,
        batch_size=1,
        sequence_length=64,
        on_cpu=False,
    )
    undivided = whole.activations + whole.logits
    layer = -(-(parameters - 50_257 * 768) // 12)
    expected = {
        "ZeRO-0": 20 * parameters,
        "ZeRO-1": 8 * parameters + 12 * parameters / 8,
        "ZeRO-2": 2 * parameters + 18 * parameters / 8,
        "ZeRO-3": 20 * parameters / 8 + 2 * layer * 7 / 8,
        "ZeRO-1, offload": 8 * parameters,
        "ZeRO-2, offload": 2 * parameters + 6 * parameters / 8,
        "ZeRO-3, offload": 8 * parameters / 8 + 2 * layer * 7 / 8,
    }
    for row, size in expected.items():
        assert cells(text, row)[1] == f"{(size + undivided) / 2**30:.2f} ✓", row
    assert cells(text, "host memory of offload")[1] == f"{12 * parameters / 8 / 2**30:.2f}"
    assert count_parameters(config.architecture).total == parameters


def test_one_device_has_no_stages_to_choose_from(planned: CommandLine) -> None:
    text = str(planned("hardware=h100"))
    assert len(cells(text, "all, at any ZeRO stage")) == len(cells(text, "ZeRO-1 to 3, offload")) == 4
    assert "ZeRO-2" not in text


@pytest.mark.parametrize("hardware", ["cpu", "m1_max"])
def test_shared_memory_has_nowhere_to_offload_to(planned: CommandLine, hardware: str) -> None:
    text = str(planned(f"hardware={hardware}"))
    assert cells(text, "all, at any ZeRO stage")
    assert "offload" not in text


def test_what_fits_is_marked(planned: CommandLine) -> None:
    """[b1] 20 bytes of 1.83 B parameters exceed 24 GiB; 8 bytes, with the optimizer on the host, do not."""
    batch = ("model=b1", "training.batch_size=1", "data.sequence_length=64")
    text = str(planned(*batch, "hardware=rtx3090"))
    assert ["✓" in cell for cell in cells(text, "all, at any ZeRO stage")] == [False, False, False, True]
    assert all("✓" in cell for cell in cells(text, "ZeRO-1 to 3, offload"))
    assert "✓ fits rtx3090 (24 GiB)." in text
    assert "Nothing fits rtx3090 (24 GiB)." in str(planned("model=b7", *batch[1:], "hardware=rtx3090"))
    unknown = str(planned(*batch, "hardware=cpu"))
    assert "✓" not in unknown and "fits" not in unknown


def test_time_follows_the_assumed_utilisation(planned: CommandLine) -> None:
    arguments = ("hardware=h100", "budget.tokens=1_000_000_000")
    slow, fast = (str(planned(*arguments, f"stage.assumed_mfu={mfu}")) for mfu in (0.2, 0.4))
    slow_rate, fast_rate = (int(cells(text, "bf16")[1].replace(",", "")) for text in (slow, fast))
    assert fast_rate == pytest.approx(2 * slow_rate, rel=1e-4)
    assert cells(slow, "bf16")[3] == "1.00 B"
    assert "at an assumed MFU of 0.4" in fast
    assert "cost" not in fast


def test_a_price_gives_a_cost(planned: CommandLine) -> None:
    text = str(planned("hardware=4xh100", "hardware.price_per_hour=2", "budget.seconds=3600"))
    assert cells(text, "format")[-1] == "cost"
    assert float(cells(text, "bf16")[-1]) == pytest.approx(8, rel=0.01)
    assert cells(text, "bf16")[-2] == "60.0 min"


def test_a_device_without_a_declared_peak_has_no_time(planned: CommandLine) -> None:
    assert "hardware=cpu declares no peak" in str(planned("hardware=cpu"))
    given = str(planned("hardware=cpu", "hardware.peak_tflops.bf16=0.9"))
    assert "Time on cpu at an assumed MFU of 0.3" in given
    assert cells(given, "bf16")[-1] == "200.0 s" or "min" in cells(given, "bf16")[-1]


def test_epochs_alone_give_a_rate_and_no_time(planned: CommandLine) -> None:
    text = str(planned("hardware=t4", "budget.epochs=2"))
    assert cells(text, "fp16")[2:] == ["", "", ""]
    assert "`budget.epochs` is left out" in text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, "0.5 s"), (119, "119.0 s"), (120, "2.0 min"), (7200, "2.0 h"), (172_800, "2.0 days"), (1e8, "3.2 years")],
)
def test_durations_are_told_in_a_unit_that_suits(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
