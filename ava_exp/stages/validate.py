"""`stage=validate`: report every fault of the configuration, and do nothing else."""

from __future__ import annotations

from ava_exp.config.run import RunConfig
from ava_exp.config.validate import is_blocked, report, validate
from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR


def run(config: RunConfig) -> int:
    """Print the report. Returns EXIT_USER_ERROR if the run could not start."""
    faults = validate(config)
    print(report(faults))
    return EXIT_USER_ERROR if is_blocked(faults) else EXIT_OK
