"""Checks a composed run, all rules at once and without torch: one report instead of one error a try."""

from __future__ import annotations

from ava_exp.config import machine_rules, rules
from ava_exp.config.faults import Fault, Severity, is_blocked, raise_if_fatal, report
from ava_exp.config.machine_rules import offload_faults, precision_faults
from ava_exp.config.run import RunConfig

__all__ = [
    "Fault",
    "Severity",
    "is_blocked",
    "offload_faults",
    "precision_faults",
    "raise_if_fatal",
    "report",
    "validate",
]


def validate(config: RunConfig) -> list[Fault]:
    """Return all faults of a run, the gravest first. Files and folders are looked at; nothing is left behind."""
    gravity = list(Severity)
    faults = [fault for rule in (*rules.RULES, *machine_rules.RULES) for fault in rule(config)]
    return sorted(faults, key=lambda fault: gravity.index(fault.severity))
