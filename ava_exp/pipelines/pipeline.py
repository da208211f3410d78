"""Does the steps of a pipeline, here or as jobs that wait for one another, and goes on at the first that is left."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, UserError
from ava_exp.pipelines.definition import Pipeline, Step, define
from ava_exp.sweeping.pool import POLL_S, Requests
from ava_exp.sweeping.start import LocalWork, Slot
from ava_exp.sweeping.table import NOTHING, as_text
from ava_exp.tracking.jobs import Job, Request, all_jobs, cluster, commands_for, pauses
from ava_exp.tracking.lock import RunLock
from ava_exp.tracking.text import format_seconds

IN_USE = "Wait for it, or stop it: the same command then goes on."
FINISHED, FAILED, STOPPED, LEFT = "finished", "failed", "stopped", "left"


def run(config: RunConfig) -> int:
    """Refuse: a program composes each step by itself and does it with `ava_exp.run`."""
    raise UserError("`stage=pipeline` is made of command lines: give it as one, or run each stage by itself.")


def run_pipeline(config: RunConfig, overrides: Sequence[str]) -> int:
    """Do what is left of the pipeline of `config`, which `overrides` compose, and return the exit code.

    Raises:
        UserError: a step is not possible, or another process works on this pipeline.
    """
    pipeline = define(config, overrides)
    pipeline.create()
    print_line(f"Pipeline folder: {pipeline.root}")
    with RunLock(pipeline.root / "pipeline.lock", IN_USE):
        if pipeline.steps[0].is_job:
            return Jobs(pipeline).run()
        return Chain(pipeline).run()


@dataclass(slots=True)
class Chain:
    """The steps as processes of this machine, one after the other."""

    pipeline: Pipeline
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> int:
        """Do what is left, until a step does not end well; return its exit code."""
        left, code = self.pipeline.left, EXIT_OK
        unfinished = ""
        for number, step in enumerate(self.pipeline.steps, start=1):
            place = f"[{number}/{len(self.pipeline.steps)}] {step.name}"
            if step not in left:
                print_line(f"{place}: was finished before")
                continue
            print_line(f"{place}: started")
            code = self._do(step)
            if code != EXIT_OK:
                unfinished = step.name
                break
            step.files.finished.touch()
        how = {unfinished: STOPPED if code == EXIT_RESUMABLE else FAILED}
        print_line(table(self.pipeline, how, self.seconds))
        if code == EXIT_RESUMABLE:
            complain(f"the pipeline was stopped in step `{unfinished}`. The same command goes on there.")
        elif code != EXIT_OK:
            complain(f"step `{unfinished}` failed with exit code {code}; the same command goes on there.")
        return code

    def _do(self, step: Step) -> int:
        """Run a step and hand on what this process is asked; return an exit code, 128 + N for signal N."""
        step.files.finished.unlink(missing_ok=True)
        started, num_stops = time.monotonic(), 0
        with Requests() as requests:
            work = LocalWork(step.overrides, None, Slot())
            while (code := work.poll()) is None:
                time.sleep(POLL_S)
                if requests.save:
                    requests.save = False
                    work.send(signal.SIGUSR1)
                if requests.num_stops > num_stops:
                    num_stops = requests.num_stops
                    work.send(signal.SIGTERM if num_stops == 1 else signal.SIGKILL)
        self.seconds[step.name] = time.monotonic() - started
        return EXIT_RESUMABLE if requests.num_stops and code != EXIT_OK else code if code >= 0 else 128 - code


@dataclass(slots=True)
class Jobs:
    """The steps as jobs of a cluster, each of which begins when the one before it has ended well."""

    pipeline: Pipeline

    def run(self) -> int:
        """Submit what is left, unless jobs are at it, and wait for them if that is wished; return the exit code."""
        launcher = self.pipeline.steps[0].config.launcher
        assert isinstance(launcher, SlurmLauncherConfig)
        states = self._states()
        if not any(cluster().is_active(state) for state in states.values()):
            self._submit(states)
        elif self.pipeline.left:
            print_line("Its jobs are at work or wait for their turn: nothing was submitted.")
        code = self._wait() if launcher.wait else EXIT_OK
        print_line(table(self.pipeline, {name: state.lower() for name, state in self._states().items()}, {}))
        if code == EXIT_OK and self.pipeline.left:
            print_line("The same command looks again, and goes on at the first step that failed.")
        return code

    def _submit(self, states: dict[str, str]) -> None:
        left = self.pipeline.left
        if not left:
            return
        for step in left:
            step.files.finished.unlink(missing_ok=True)
            if states.get(step.name) not in (None, "COMPLETED"):
                print_line(f"Step `{step.name}` ended {states[step.name]}; it is submitted again.")
        requests = [
            Request(config=step.config, overrides=step.overrides, step=step.name, finished=step.files.finished)
            for step in left
        ]
        folder, jobs = left[0].config.launcher.build().submit_chain(requests, self.pipeline.id)
        for step, job in zip(left, jobs, strict=True):
            print_line(f"Job {job.id} was submitted: step `{step.name}`.")
        print_line(f"  job folder  {folder.root}")
        lines = commands_for(folder.root.name, left[0].config.output_dir, logs_of=jobs[0].id)
        print_line("\n".join(lines))

    def _states(self) -> dict[str, str]:
        """Return the state of the newest job of every step that has one."""
        jobs: dict[str, Job] = {}
        for folder, job in all_jobs(Path(self.pipeline.steps[0].config.output_dir)):
            if folder.root.name.rpartition("-")[0] == self.pipeline.id and job.step is not None:
                jobs[job.step] = job
        known = cluster().states([job.id for job in jobs.values()], must_answer=True)
        return {step: known.get(job.id, "UNKNOWN") for step, job in jobs.items()}

    def _wait(self) -> int:
        told: dict[str, str] = {}
        for pause in pauses():
            states = self._states()
            for name, state in states.items():
                if told.get(name) != state:
                    print_line(f"Step `{name}`: {state}")
            told = states
            if not any(cluster().is_active(state) for state in states.values()):
                break
            time.sleep(pause)
        if not (left := self.pipeline.left):
            return EXIT_OK
        complain(f"step `{left[0].name}` ended {told.get(left[0].name)}; the same command goes on there.")
        return EXIT_FAILURE


def table(pipeline: Pipeline, how: dict[str, str], seconds: dict[str, float]) -> str:
    """Return the steps as lines: their stage, how they stand, the run that they work on."""
    rows = [["step", "stage", "status", "run", "time"]]
    for step in pipeline.steps:
        status = FINISHED if step.files.is_finished else how.get(step.name, LEFT)
        run = step.files.run
        time_taken = format_seconds(seconds[step.name]) if step.name in seconds else NOTHING
        rows.append([step.name, step.config.stage.name, status, run.name if run else NOTHING, time_taken])
    return as_text(rows)


def print_line(text: str) -> None:
    """Say something at once, also to a file or a pipe."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Say what went wrong, on standard error."""
    print(f"ava_exp: {text}", file=sys.stderr, flush=True)
