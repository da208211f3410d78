"""The command line: parse, compose, validate, dispatch to a stage. Nothing heavy is imported until a stage needs it."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from ava_exp import __version__
from ava_exp.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_OTHER_RANK,
    EXIT_RESUMABLE,
    EXIT_USER_ERROR,
    ConfigError,
    OtherRankError,
    UserError,
)

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

_EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program whose reader went away: 128 + SIGPIPE."""
_CLOSED_FLAGS = ("config_dir", "config_path", "config_name", "experimental_rerun")
_PROGRAM = "ava-exp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `ava_exp.errors` lists the codes.

    A user's mistake is one line on stderr, or the list of all faults of a configuration that composes. Anything else
    that goes wrong is a bug and keeps its traceback.
    """
    try:
        code = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return _EXIT_BROKEN_PIPE


def _main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"ava_exp {__version__}")
        return EXIT_OK
    from ava_exp.config.compose import composition_errors_in_one_line
    from ava_exp.config.overrides import check_overrides

    with composition_errors_in_one_line():
        flags = _parse(arguments)
        if flags.help:
            return _print_help()
        if not flags.shell_completion:
            check_overrides(flags.overrides, may_sweep=flags.multirun)
            if not (flags.multirun or flags.cfg or flags.info or _is_rank()):
                _refuse_sweep(flags.overrides)
        in_order = _overrides_first(arguments, flags.overrides)
        return _run_hydra(["hydra.mode=RUN", *in_order] if _is_rank() else in_order)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Read the flags with Hydra's own parser, so that a closed flag is seen however it is abbreviated."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `--help` shows what can be written.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    for flag in _CLOSED_FLAGS:
        if getattr(flags, flag) is not None:
            raise ConfigError(f"`--{flag.replace('_', '-')}` is not accepted: a run is composed from `conf/` alone.")
    return flags


def _refuse_sweep(overrides: list[str]) -> None:
    """A sweep is several runs: without `-m` it would be one of them, with none of what varies."""
    for override in overrides:
        if override.startswith(("sweep=", "sweep.")):
            command = shlex.join(["python", "-m", "ava_exp", "-m", *overrides])
            raise ConfigError(f"`{override}` is about several runs: write `{command}`.")


def _overrides_first(arguments: list[str], overrides: list[str]) -> list[str]:
    """Return the arguments in an order that Hydra takes; between flags it refuses overrides."""
    flags = [argument for argument in arguments if argument != "--"]
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def _print_help() -> int:
    from ava_exp.config.help import help_text

    print(help_text())
    return EXIT_OK


def _run_hydra(arguments: list[str]) -> int:
    """Let Hydra compose and run one point, or many, or print what it was asked to print."""
    import hydra

    from ava_exp.config.source import CONFIG_NAME, register_source
    from ava_exp.config.store import register_schemas

    register_schemas()
    register_source()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing many lines and exiting with 1
    sys.argv = [_PROGRAM, *arguments]  # the name is what shell completion is installed for
    points = _Points()

    def task(config: DictConfig) -> int:
        return points.run(config)

    task.__module__ = "__main__"  # or Hydra reads options from the package of the function's module too
    try:
        hydra.main(version_base="1.3", config_path=None, config_name=CONFIG_NAME)(task)()
    except SystemExit as end:  # of Hydra, or of a sweep whose points had processes of their own
        return end.code if isinstance(end.code, int) else EXIT_OK
    return points.finish()


@dataclass(slots=True)
class _Points:
    """Runs each point that Hydra composes and remembers how it ended: Hydra would stop, or tell, only after the last.

    Nothing that goes wrong in one point keeps the next from running, but a request to stop ends them all.
    """

    codes: list[int] = field(default_factory=list)

    def run(self, config: DictConfig) -> int:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
        if hydra_config is not None and hydra_config.mode is RunMode.MULTIRUN:  # of Hydra's own sweeper
            print(f"── point {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}", flush=True)
        code = EXIT_RESUMABLE if EXIT_RESUMABLE in self.codes else _run_point(config)
        self.codes.append(code)
        return code

    def finish(self) -> int:
        """Say which of several points failed, and return the exit code of the whole command."""
        failed = [f"{number} (exit code {code})" for number, code in enumerate(self.codes) if code != EXIT_OK]
        if failed and len(self.codes) > 1:
            _complain(f"{len(failed)} of {len(self.codes)} points did not finish: {', '.join(failed)}.")
        if EXIT_RESUMABLE in self.codes:
            return EXIT_RESUMABLE
        return next((code for code in self.codes if code != EXIT_OK), EXIT_OK)


def _run_point(config: DictConfig) -> int:
    try:
        return _validate_and_run(config)
    except UserError as error:
        _complain(str(error))
        return EXIT_USER_ERROR
    except OtherRankError as error:
        _complain(str(error))
        return EXIT_OTHER_RANK
    except Exception:  # noqa: BLE001  (a bug in one point; told in full, and the next point runs)
        traceback.print_exc()
        return EXIT_FAILURE


def _validate_and_run(config: DictConfig) -> int:
    from ava_exp.config.compose import to_run_config
    from ava_exp.config.stage import PipelineStageConfig, ValidateConfig
    from ava_exp.config.validate import is_blocked, report, validate

    run = to_run_config(config)
    if not isinstance(run.stage, ValidateConfig):
        faults = validate(run)
        if faults:
            print(report(faults), file=sys.stderr, flush=True)
        if is_blocked(faults):
            return EXIT_USER_ERROR
    if isinstance(run.stage, PipelineStageConfig):
        from ava_exp.pipelines.pipeline import run_pipeline

        return run_pipeline(run, _overrides_of_this_point())
    if run.pipeline.step is not None:
        from ava_exp.stages.steps import with_step_runs

        run = with_step_runs(run)
    if run.launcher.takes(run.stage, run.hardware.num_devices) and not _is_rank():
        return int(run.launcher.build().launch(run, _overrides_of_this_point()))
    return int(run.stage.component()(run))


def _overrides_of_this_point() -> list[str]:
    """Return what composes this run on a command line; of a sweep's point Hydra writes `~group` as `~group=null`."""
    from hydra.core.hydra_config import HydraConfig

    from ava_exp.config.folders import group_names

    left_out = {f"~{group}=null": f"~{group}" for group in group_names()}
    return [left_out.get(override, override) for override in HydraConfig.get().overrides.task]


def _is_rank() -> bool:
    """Whether a launcher started this process: it is one of so many, and runs one point, whatever a sweep says."""
    return "WORLD_SIZE" in os.environ


def _complain(message: str) -> None:
    print(f"ava_exp: {message}", file=sys.stderr, flush=True)
