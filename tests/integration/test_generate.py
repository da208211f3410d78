"""Text from a trained run on the command line: every option, several prompts, faults in one line, Ctrl-C."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from tests.faults.harness import Ended, Experiment

GENERATE = ("stage.run=latest", "stage.prompt='w01 w02'", "stage.max_new_tokens=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A finished run."""
    experiment = Experiment(output_dir=tmp_path_factory.mktemp("generate") / "outputs", draw=False)
    experiment.finish()
    return experiment


def generated(experiment: Experiment, *settings: str, option: str = "generate") -> Ended:
    return experiment.run(also=[f"stage={option}", *GENERATE, *(f"stage.{setting}" for setting in settings)])


def written(experiment: Experiment, *settings: str, option: str = "generate") -> str:
    ended = generated(experiment, *settings, option=option)
    assert ended.code == EXIT_OK, ended.err
    return ended.out


def test_every_option_changes_the_text(trained: Experiment) -> None:
    plain = written(trained)
    assert plain == written(trained) and plain.startswith("w01 w02")
    settings = (
        "temperature=0",
        "temperature=3",
        "top_k=1",
        "top_p=0.01",
        "repetition_penalty=3",
        "generation_seed=1",
        "max_new_tokens=4",
    )
    assert all(written(trained, setting) != plain for setting in settings)
    assert written(trained, "temperature=0") == written(trained, "top_k=1")
    greedy = written(trained, "temperature=0", "max_new_tokens=30")
    assert greedy != written(trained, "temperature=0", "max_new_tokens=30", "no_repeat_ngram_size=2")


def test_presets(trained: Experiment) -> None:
    spelled_out = ("temperature=0.9", "top_p=0.92", "repetition_penalty=1.5", "no_repeat_ngram_size=3")
    assert written(trained, option="generate_varied") == written(trained, *spelled_out)
    beams = written(trained, option="generate_beam")
    assert beams == written(trained, "temperature=0", "num_beams=4")
    assert beams.startswith("── prompt 1, continuation 1, score -") and beams.count("──") == 1


def test_several_prompts_and_samples(trained: Experiment, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w01 w02\nw03\n\nw05 w00 w07\n")
    alone = written(trained).removesuffix("\n")
    out = written(trained, f"prompt_file='{prompts}'", "num_samples=2")
    parts = out.split("── ")[1:]
    assert [part.partition("\n")[0] for part in parts] == [
        f"prompt {prompt}, continuation {sample}" for prompt in (1, 2, 3, 4) for sample in (1, 2)
    ]
    assert parts[0].partition("\n")[2] == f"{alone}\n"
    assert parts[0].partition("\n")[2] != parts[1].partition("\n")[2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        (b"", "a file with a prompt on each line"),
        (b"\xff\xfe", "cannot be read"),
        (b"w01 " * 2**19, "at most 1048576 bytes"),
        (b"w01 " * 4000, "`prompt` must be between 1 and 1023 tokens"),
    ],
)
def test_a_wrong_file_is_one_line(trained: Experiment, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    ended = generated(trained, f"prompt_file='{prompts}'")
    assert ended.code == EXIT_USER_ERROR
    assert sentence in ended.err and ended.err.count("\n") == 1, ended.err


def test_ctrl_c_keeps_what_was_written_and_a_terminal_is_told_the_rate(trained: Experiment) -> None:
    """In a terminal of its own, for Ctrl-C comes from there."""

    def run(num_tokens: int, interrupt: bool) -> tuple[int, str]:
        settings = [*trained.command, "stage=generate", *GENERATE, f"stage.max_new_tokens={num_tokens}"]
        ours, its = pty.openpty()
        command = [sys.executable, "-m", "ava_exp", *settings]
        process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True)
        os.close(its)
        shown = b""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                shown += os.read(ours, 1000)
            except OSError:  # the terminal is closed: the program has ended
                break
            if interrupt and len(shown.partition(b"w01 w02")[2]) > 20:
                process.send_signal(signal.SIGINT)
                interrupt = False
        os.close(ours)
        return process.wait(timeout=30), shown.decode().replace("\r\n", "\n")

    code, shown = run(8, interrupt=False)
    assert code == EXIT_OK and "8 tokens in " in shown and " tokens/s" in shown.splitlines()[-1]
    code, shown = run(500, interrupt=True)
    text, _, rest = shown.rpartition("\nava_exp: interrupted.")
    assert code == EXIT_INTERRUPTED and rest.strip() == "" and "Traceback" not in shown
    assert len(text.partition("w01 w02")[2]) > 10
