"""`launcher=slurm`: the same command as a job on a cluster, with a copy of the code as it is now."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ava_exp
from ava_exp.config.identity import run_id
from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.schema import KINDS
from ava_exp.errors import EXIT_FAILURE, EXIT_OK, UserError
from ava_exp.tracking.jobs import Job, JobFolder, all_jobs, new_job
from ava_exp.tracking.metadata import git_state
from ava_launchers import slurm_commands
from ava_launchers.slurm_task import SlurmTask
from ava_launchers.snapshot import take_snapshot

if TYPE_CHECKING:
    import submitit

KIND = KINDS[SlurmLauncherConfig]
POLL_S = 5.0


@dataclass(kw_only=True, slots=True)
class SlurmLauncher:
    """Submits a job with one task for each device; its configuration explains the fields."""

    num_nodes: int
    partition: str | None
    account: str | None
    time_limit_minutes: int | None
    warning_s: int
    memory_gib: float | None
    cpus_per_device: int | None
    gres_per_device: str | None
    setup: list[str]
    python: str | None
    sbatch_parameters: dict[str, str]
    srun_arguments: list[str]
    max_requeues: int
    wait: bool
    grace_s: float
    hang_timeout_s: float | None

    def launch(self, config: RunConfig, overrides: Sequence[str]) -> int:
        """Submit the stage of `config`, which `overrides` compose, and return at once, or when the job has ended.

        Raises:
            UserError: this machine cannot submit, SLURM refuses, or a job trains this run already.
        """
        slurm_commands.require()
        executor_class = _executor_class()
        name, run_folder, settled = self._settle(config)
        asked = [*overrides, *settled]
        refuse_second_job(Path(config.output_dir), run_folder)
        ranks_per_node = -(-config.hardware.num_devices // self.num_nodes) if config.stage.trains else 1
        # Strictness comes before the user's own words, which may take it back.
        command = ["hardware.strict=true", *asked, f"hardware.num_devices={ranks_per_node * self.num_nodes}"]
        folder = new_job(Path(config.output_dir), name)
        take_snapshot(folder.snapshot)
        executor = executor_class(folder.logs, python=self.python)
        executor.update_parameters(**self.parameters(config.hardware, ranks_per_node, name, folder))
        try:
            job_id = _submit(executor, self._task(command, folder))
        except UserError:
            shutil.rmtree(folder.root)  # there is no job whose folder it could be
            raise
        job = Job(
            id=job_id,
            name=name,
            launcher=KIND,
            stage=config.stage.name,
            run_folder=str(run_folder) if run_folder else None,
            overrides=asked,
            directory=str(Path.cwd()),
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=_commit(),
        )
        folder.write(job)
        _tell_what_next(config, folder, job)
        return self._wait(folder, job) if self.wait else EXIT_OK

    def _settle(self, config: RunConfig) -> tuple[str, Path | None, list[str]]:
        """Decide once what every start of the job has to agree on: the run's folder, and the weights it begins with.

        Return the job's name, the folder of a run that is trained, and the overrides that say so.
        """
        if not config.stage.trains:
            return f"{config.name}-{config.stage.name}", None, []
        from ava_exp.stages.runs import choose_attempt, with_initial_weights

        resolved, initial = with_initial_weights(config)
        folder = choose_attempt(resolved)
        settled = [f"init_from='{initial.name}'"] if initial else []
        if config.resume == "never":
            settled.append("resume=auto")  # the attempt exists from now on; another start is not another one
        assert folder.root.name.startswith(run_id(resolved))
        return folder.root.name, folder.root.resolve(), settled

    def _task(self, overrides: list[str], folder: JobFolder) -> SlurmTask:
        return SlurmTask(
            overrides=overrides,
            grace_s=self.grace_s,
            hang_timeout_s=self.hang_timeout_s,
            max_requeues=self.max_requeues,
            ended=str(folder.root / "ended"),
        )

    def parameters(self, hardware: HardwareConfig, ranks_per_node: int, name: str, folder: JobFolder) -> dict[str, Any]:
        """Return what submitit is told; None is the cluster's default."""
        on_gpus = hardware.device is DeviceType.cuda and self.gres_per_device is None
        return {
            "job_name": name,
            "partition": self.partition,
            "account": self.account,
            "time": self.time_limit_minutes,
            "nodes": self.num_nodes,
            "ntasks_per_node": ranks_per_node,
            "cpus_per_task": self.cpus_per_device,
            "gpus_per_node": ranks_per_node if on_gpus else None,
            "gres": f"{self.gres_per_device}:{ranks_per_node}" if self.gres_per_device else None,
            "mem": f"{int(self.memory_gib * 1024)}M" if self.memory_gib else None,
            "wckey": None,
            "stderr_to_stdout": True,
            "setup": [
                *self.setup,
                f"export PYTHONPATH='{folder.snapshot}'${{PYTHONPATH:+:$PYTHONPATH}}",
                "export PYTHONSAFEPATH=1  # or the folder that the job starts in would come before the snapshot",
            ],
            # When one task has failed, the others are not waited for.
            "srun_args": ["--kill-on-bad-exit=1", *self.srun_arguments],
            "additional_parameters": {
                "signal": f"USR2@{self.warning_s}",
                "requeue": True,
                **self.sbatch_parameters,
            },
        }

    def _wait(self, folder: JobFolder, job: Job) -> int:
        """Tell how the job fares until it has ended; return 0 only if it did what it was for."""
        told = ""
        while True:
            state = slurm_commands.states([job.id]).get(job.id, "UNKNOWN")
            if state != told:
                print(f"Job {job.id}: {state}", flush=True)
                told = state
            if state not in slurm_commands.ACTIVE:
                break
            time.sleep(POLL_S)
        if state == "COMPLETED":
            return EXIT_OK
        print(f"ava_exp: job {job.id} ended {state}; what it printed is in {folder.logs}.", file=sys.stderr)
        return EXIT_FAILURE


def refuse_second_job(output_dir: Path, run_folder: Path | None) -> None:
    """Raise UserError while another job trains the same run, or waits for its turn to."""
    if run_folder is None:
        return
    same = {job.id: job for _, job in all_jobs(output_dir) if job.run_folder == str(run_folder)}
    for job_id, state in slurm_commands.states(same).items():
        if state in slurm_commands.ACTIVE:
            raise UserError(
                f"job {job_id} ({state}) trains {run_folder.name} already. Wait for it, cancel it with "
                f"`scancel {job_id}`, or start a further attempt beside it with resume=never."
            )


def _executor_class() -> type[submitit.SlurmExecutor]:
    try:
        import submitit
    except ImportError as error:
        raise UserError("`launcher=slurm` needs submitit: `pip install 'ava_exp[slurm]'`.") from error
    return submitit.SlurmExecutor


def _submit(executor: submitit.SlurmExecutor, task: SlurmTask) -> str:
    """Submit, and return the job's id."""
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    try:
        with _outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is told below
            return str(executor.submit(task).job_id)
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


def _tell_what_next(config: RunConfig, folder: JobFolder, job: Job) -> None:
    where = "" if config.output_dir == "outputs" else f" --output-dir {config.output_dir}"
    command = "python -m ava_exp.runs"
    print(f"Job {job.id} was submitted.")
    if job.run_folder:
        print(f"  run folder  {job.run_folder}")
    print(f"  job folder  {folder.root}")
    for what in ("watch", "logs", "cancel"):
        print(f"  {what:<10}  {command} {what} {job.id}{where}")
    sys.stdout.flush()
