"""`launcher=slurm`: the same command as a job on a cluster, with a copy of the code as it is now."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_FAILURE, EXIT_OK
from ava_exp.tracking.jobs import Job, JobFolder, Request, commands_for, pauses
from ava_launchers import slurm_commands
from ava_launchers.slurm_submission import submit


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
        folder, (job,) = submit([Request(config=config, overrides=overrides)])
        print(f"Job {job.id} was submitted.")
        if job.run_folder:
            print(f"  run folder  {job.run_folder}")
        print(f"  job folder  {folder.root}")
        print("\n".join(commands_for(job.id, config.output_dir)), flush=True)
        return _wait(folder, job) if self.wait else EXIT_OK

    def submit_all(self, requests: Sequence[Request], name: str, num_parallel: int) -> tuple[JobFolder, list[Job]]:
        """Submit independent jobs as an array of which `num_parallel` run at a time; `name` is that of their folder.

        Jobs that ask the cluster for different things are arrays of their own. Raises UserError as `launch` does.
        """
        return submit(requests, name=name, num_parallel=num_parallel)

    def submit_chain(self, requests: Sequence[Request], name: str) -> tuple[JobFolder, list[Job]]:
        """Submit jobs of which each begins when the one before it has ended well; else it is cancelled."""
        return submit(requests, name=name, in_turn=True)

    def ranks_per_node(self, config: RunConfig) -> int:
        """Return how many tasks each node has; what does not train is one."""
        return -(-config.hardware.num_devices // self.num_nodes) if config.stage.trains else 1

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


def _wait(folder: JobFolder, job: Job) -> int:
    """Tell how the job fares until it has ended; return 0 only if it did what it was for."""
    told = ""
    for pause in pauses():
        state = slurm_commands.states([job.id], must_answer=True).get(job.id, "UNKNOWN")
        if state != told:
            print(f"Job {job.id}: {state}", flush=True)
            told = state
        if state not in slurm_commands.ACTIVE:
            break
        time.sleep(pause)
    if state == "COMPLETED":
        return EXIT_OK
    print(f"ava_exp: job {job.id} ended {state}; what it printed is in {folder.logs}.", file=sys.stderr)
    return EXIT_FAILURE
