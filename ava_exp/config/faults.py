"""A fault of a configuration: how grave it is, what is wrong, how to mend it; and the report that lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ava_exp.config.run import RunConfig
from ava_exp.errors import ConfigError, must_be


class Severity(Enum):
    """`critical`: not possible on this machine; `error`: a contradiction; `warning`: runs, perhaps not as meant."""

    critical = "critical"
    error = "error"
    warning = "warning"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the value at `key`, and how to mend it."""

    severity: Severity
    key: str
    message: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.mend}".rstrip()


Rule = Callable[[RunConfig], Iterable[Fault]]
"""One thing that is checked; it tells every fault that it sees."""


def error(key: str, expected: str, actual: Any, mend: str = "") -> Fault:
    """Return a fault of severity error, in the sentence that every value error uses."""
    return Fault(Severity.error, key, must_be(key, expected, actual), mend)


def is_blocked(faults: Iterable[Fault]) -> bool:
    """Whether a run with these faults must not start."""
    return any(fault.severity is not Severity.warning for fault in faults)


def raise_if_fatal(faults: Iterable[Fault]) -> None:
    """Raise ConfigError with every fault that must keep a run from starting; warnings pass."""
    fatal = [str(fault) for fault in faults if fault.severity is not Severity.warning]
    if fatal:
        raise ConfigError("\n".join(fatal))


def report(faults: list[Fault]) -> str:
    """Return the faults as lines, each with its severity, below a line that counts them."""
    if not faults:
        return "no faults"
    numbers = {severity.value: sum(fault.severity is severity for fault in faults) for severity in Severity}
    heading = "faults: " + ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
    return "\n".join([heading, *(f"  {fault.severity.value:<9}{fault}" for fault in faults)])
