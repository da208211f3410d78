"""How jobs get into the queue of SLURM: what is decided before, the copy of the code, arrays."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ava_exp
from ava_exp.config.identity import run_id
from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.schema import KINDS
from ava_exp.errors import UserError
from ava_exp.tracking.jobs import Job, JobFolder, Request, all_jobs, new_job
from ava_exp.tracking.metadata import git_state
from ava_launchers import slurm_commands
from ava_launchers.slurm_task import SlurmTask
from ava_launchers.snapshot import take_snapshot

if TYPE_CHECKING:
    import submitit

    from ava_launchers.slurm import SlurmLauncher

KIND = KINDS[SlurmLauncherConfig]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A job before it is submitted, with all that its starts have to agree on."""

    request: Request
    launcher: SlurmLauncher
    name: str
    run_folder: Path | None
    asked: list[str]
    """The overrides with what was decided now: the run's attempt, and the weights that it begins with."""

    @property
    def ranks_per_node(self) -> int:
        return self.launcher.ranks_per_node(self.request.config)

    def task(self, folder: JobFolder) -> SlurmTask:
        """Return what each task of the job calls."""
        num_ranks = self.ranks_per_node * self.launcher.num_nodes
        return SlurmTask(
            # Strictness comes before the user's own words, which may take it back.
            overrides=["hardware.strict=true", *self.asked, f"hardware.num_devices={num_ranks}"],
            grace_s=self.launcher.grace_s,
            hang_timeout_s=self.launcher.hang_timeout_s,
            max_requeues=self.launcher.max_requeues,
            ended=str(folder.root / "ended"),
            finished=str(self.request.finished.resolve()) if self.request.finished else None,
        )

    def parameters(self, name: str, folder: JobFolder) -> dict[str, Any]:
        """Return what submitit is told."""
        return self.launcher.parameters(self.request.config.hardware, self.ranks_per_node, name, folder)


def submit(
    requests: Sequence[Request], *, name: str | None = None, num_parallel: int = 1, in_turn: bool = False
) -> tuple[JobFolder, list[Job]]:
    """Submit jobs and return them in order. `name` is that of their folder, by default the first one's.

    Several are arrays, of which `num_parallel` jobs run at a time; or, `in_turn`, each waits for the one before it, and
    is cancelled when that has not ended well.

    Raises:
        UserError: this machine cannot submit, SLURM refuses, or a job trains one of the runs already.
    """
    slurm_commands.require()
    executor_class = _executor_class()
    settled = [settle(request) for request in requests]
    output_dir = Path(requests[0].config.output_dir)
    refuse_second_jobs(output_dir, [each.run_folder for each in settled if each.run_folder])
    name = name or settled[0].name
    folder = new_job(output_dir, name)
    take_snapshot(folder.snapshot)
    jobs: dict[int, Job] = {}
    try:
        groups = [[index] for index in range(len(settled))] if in_turn else _alike(settled, name, folder)
        for alike in groups:
            launcher, parameters = settled[alike[0]].launcher, settled[alike[0]].parameters(name, folder)
            if in_turn and jobs:
                parameters["additional_parameters"] |= _after(jobs[len(jobs) - 1])
            executor = executor_class(folder.logs, python=launcher.python)
            executor.update_parameters(array_parallelism=num_parallel, **parameters)
            ids = _submit(executor, [settled[index].task(folder) for index in alike])
            jobs |= {index: _job(settled[index], job_id) for index, job_id in zip(alike, ids, strict=True)}
            folder.write([jobs[index] for index in sorted(jobs)])
    except UserError:
        if not jobs:
            shutil.rmtree(folder.root)  # there is no job whose folder it could be
        raise
    return folder, [jobs[index] for index in sorted(jobs)]


def settle(request: Request) -> Settled:
    """Decide once what every start of a job has to agree on: the run's folder, and the weights it begins with."""
    from ava_exp.stages.steps import references_of

    config, launcher = request.config, request.config.launcher.build()
    if not config.stage.trains or references_of(config):  # what a step before it will have made is not known yet
        name = request.step or f"{config.name}-{config.stage.name}"
        return Settled(request=request, launcher=launcher, name=name, run_folder=None, asked=[*request.overrides])
    from ava_exp.stages.runs import choose_attempt, with_initial_weights

    resolved, initial = with_initial_weights(config)
    folder = choose_attempt(resolved)
    asked = [*request.overrides, *([f"init_from='{initial.name}'"] if initial else [])]
    if config.resume == "never":
        asked.append("resume=auto")  # the attempt exists from now on; another start is not another one
    assert folder.root.name.startswith(run_id(resolved))
    return Settled(
        request=request, launcher=launcher, name=folder.root.name, run_folder=folder.root.resolve(), asked=asked
    )


def _alike(settled: Sequence[Settled], name: str, folder: JobFolder) -> list[list[int]]:
    """Return the indices of jobs that ask the cluster for the same: those can be one array."""
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(settled):
        groups.setdefault(repr((each.launcher.python, each.parameters(name, folder))), []).append(index)
    return list(groups.values())


def _after(job: Job) -> dict[str, str]:
    return {"dependency": f"afterok:{job.id}", "kill-on-invalid-dep": "yes"}


def _job(settled: Settled, job_id: str) -> Job:
    return Job(
        id=job_id,
        name=settled.name,
        launcher=KIND,
        stage=settled.request.config.stage.name,
        run_folder=str(settled.run_folder) if settled.run_folder else None,
        overrides=settled.asked,
        directory=str(Path.cwd()),
        submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        step=settled.request.step,
        commit=_commit(),
    )


def refuse_second_jobs(output_dir: Path, run_folders: Sequence[Path]) -> None:
    """Raise UserError while another job trains one of these runs, or waits for its turn to."""
    same = {job.id: Path(job.run_folder) for _, job in all_jobs(output_dir) if job.run_folder}
    same = {job_id: folder for job_id, folder in same.items() if folder in run_folders}
    for job_id, state in slurm_commands.states(same, must_answer=True).items():
        if state in slurm_commands.ACTIVE:
            raise UserError(
                f"job {job_id} ({state}) trains {same[job_id].name} already. Wait for it, cancel it with "
                f"`scancel {job_id}`, or start a further attempt beside it with resume=never."
            )


def _executor_class() -> type[submitit.SlurmExecutor]:
    try:
        import submitit
    except ImportError as error:
        raise UserError("`launcher=slurm` needs submitit: `pip install 'ava_exp[slurm]'`.") from error
    return submitit.SlurmExecutor


def _submit(executor: submitit.SlurmExecutor, tasks: Sequence[SlurmTask]) -> list[str]:
    """Submit, and return the ids of the jobs: of an array, where they are several."""
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    try:
        with _outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is told below
            return [str(job.job_id) for job in executor.submit_array(tasks)]
    except (FailedSubmissionError, UncompletedJobError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"SLURM did not take the job: {reason}") from error


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that this process is a part of; the new one would take them for its own.

    What leads to the cluster stays. Outside of a job all stay: users have their defaults in `SBATCH_*`.
    """
    from submitit.helpers import clean_env, environment_variables

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}
    with clean_env(), environment_variables(**kept):
        yield


def _commit() -> str | None:
    state = git_state(Path(ava_exp.__file__).parent)
    return f"{state['commit']}{'+' if state['dirty'] else ''}" if state else None
