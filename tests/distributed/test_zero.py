"""DeepSpeed's stages of ZeRO: what happens to one rank, and checkpoints that any other back end goes on from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE
from tests.distributed.group import Command, Fault, run_in_group
from tests.distributed.ranks import start_ranks
from tests.distributed.test_data_parallel import DETERMINISTIC, TWO, steps_of, weights_of
from tests.faults.harness import NUM_STEPS, Experiment, observed

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

STAGES = {"zero0": "fp32", "zero1": "mixed_bf16", "zero2": "fp32", "zero3": "mixed_bf16", "zero3_offload": "fp32"}
"""With the precision that the test of each is in; all of them are compared with one process elsewhere."""


def test_a_signal_and_a_loss_that_is_none(tmp_path: Path) -> None:
    """A signal stops all ranks at one step, from which they go on bit for bit; after a step that is skipped they go on
    as if it had been none."""
    commands, runs = [], {}
    for stage, precision in STAGES.items():
        settings = (*TWO, "mod=random", f"distributed={stage}", f"precision={precision}")
        whole, stopped, skipping = runs[stage] = [
            Experiment(output_dir=tmp_path / stage / name, overrides=settings) for name in ("whole", "stopped", "skips")
        ]
        commands += [
            Command(overrides=whole.command),
            Command(overrides=stopped.command, fault=Fault(rank=1, step=5, action="SIGUSR2")),
            Command(overrides=stopped.command),
            Command(overrides=skipping.command, fault=Fault(rank=1, step=5, action="nan")),
        ]
    ends = run_in_group(2, commands)
    expected = [EXIT_OK, EXIT_RESUMABLE, EXIT_OK, EXIT_OK] * len(STAGES)
    assert [[ended.code for ended in each] for each in ends] == [[code] * 2 for code in expected], ends
    reference = steps_of(runs["zero0"][2])
    for stage, (whole, stopped, skipping) in runs.items():
        assert observed(stopped.folder.root) == observed(whole.folder.root)
        assert [step["skipped"] for step in steps_of(skipping)] == [number == 5 for number in range(1, NUM_STEPS + 1)]
        for step, other in zip(steps_of(skipping), reference, strict=True):
            if not step["skipped"]:
                tolerance = 2e-5 if STAGES[stage] == "fp32" else 0.02
                assert step["loss"] == pytest.approx(other["loss"], rel=tolerance), stage


def test_a_run_goes_on_with_any_other_back_end(tmp_path: Path) -> None:
    """The same sequences in the same order, and the weights of one process that did it all."""
    shapes = ("zero2", "fsdp2", "zero3", "ddp", "zero1", "zero3_offload", "zero0")
    length = f"budget.steps={3 * len(shapes) + 3}"
    one = Experiment(output_dir=tmp_path / "one", overrides=(*DETERMINISTIC, length, "training.batch_size=4"))
    one.finish()
    other = Experiment(output_dir=tmp_path / "other", overrides=(*DETERMINISTIC, length, *TWO))
    ends = run_in_group(
        2,
        [
            Command(overrides=[*other.command, f"distributed={shape}"], fault=Fault(rank=0, step=3, action="SIGTERM"))
            for shape in shapes
        ],
    )
    assert [[ended.code for ended in each] for each in ends] == [[EXIT_RESUMABLE] * 2] * len(shapes), ends
    ((ended,),) = run_in_group(1, [Command(overrides=[*other.command, "hardware.num_devices=1", "distributed=zero3"])])
    assert ended.code == EXIT_OK, ended.error
    for step, expected in zip(steps_of(other), steps_of(one), strict=True):
        assert (step["sample_crc32"], step["tokens"]) == (expected["sample_crc32"], expected["tokens"])
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-6)
    for name, weight in weights_of(one).items():
        assert (weights_of(other)[name] - weight).abs().max() <= 2e-5, name


def test_what_deepspeed_is_not_given() -> None:
    ended = start_ranks(2, [], module="tests.distributed.zero_worker").wait(120)
    assert ended.codes == [0, 0], str(ended)
    assert [out.splitlines()[-1] for out in ended.outs] == ["done", "done"]
