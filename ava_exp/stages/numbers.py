"""How the planner writes numbers and tables."""

from __future__ import annotations

from rich.table import Table


def table_of(title: str, *columns: str) -> Table:
    """Return an empty table: a column of names, and columns of numbers."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def rounded(number: float) -> str:
    """Return a number with two decimals, a large one with none."""
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def figure(number: float) -> str:
    """Return a number in at most seven characters, with three digits or those before the point: 0.12, 98.7, 1.83 M."""
    for unit, length in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= 0.9995 * length:
            return f"{figure(number / length)} {unit}"
    if number >= 99.95:
        return f"{number:,.0f}"
    if number >= 9.995:
        return f"{number:.1f}"
    return f"{number:.2f}" if number >= 0.1 or number == 0 else f"{number:.2g}"


def money(amount: float) -> str:
    """Return an amount with its cents; millions are rounded."""
    return f"{amount:,.2f}" if amount < 1e6 else short(amount)


def short(number: float) -> str:
    """Return a number in a few digits: 1.83 B."""
    for unit, length in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= length:
            return f"{number / length:.2f} {unit}"
    return f"{number:,.0f}"


UNITS_OF_TIME = (("years", 365.25 * 86_400), ("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def unit_of_time(seconds: float) -> tuple[str, float]:
    """Return the largest unit of which `seconds` has two, and how long it is."""
    return next((unit for unit in UNITS_OF_TIME if seconds >= 2 * unit[1]), UNITS_OF_TIME[-1])


def duration(seconds: float) -> str:
    """Return a duration in a unit that suits."""
    unit, length = unit_of_time(seconds)
    return f"{seconds / length:,.1f} {unit}"
