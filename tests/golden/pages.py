"""Tables that are written into pages of the documentation, between comments that name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells of a row are as many as its header's."""
    lines = [[*header], ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def filled(page: str, tables: dict[str, str]) -> str:
    """Return the page with its tables written anew, each between `<!-- name -->` and `<!-- end -->`."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(start)
        assert rest, f"the page has no {start!r}"
        page = before + start + table + end + rest.partition(end)[2]
    return page
