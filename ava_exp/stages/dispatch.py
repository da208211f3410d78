"""Does what a configuration says, for a program; the command line adds its own printing."""

from __future__ import annotations

from ava_exp.config.run import RunConfig
from ava_exp.config.validate import raise_if_fatal, validate


def run(config: RunConfig) -> int:
    """Validate a run, do its stage in this process, and return the exit code, one of `ava_exp.errors`.

    Call it in the main thread: while training, SIGTERM and SIGINT ask to save and stop.

    Raises:
        UserError: something that the user can mend; for a configuration the message holds every fault.
    """
    raise_if_fatal(validate(config))
    return int(config.stage.component()(config))
