"""The frame of every self-contained page: no scripts, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path


def page(title: str, sections: Iterable[str]) -> str:
    """Return a page of these sections; empty ones are left out."""
    style = resources.files("ava_exp.tracking").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(section for section in sections if section)}<footer>Made by ava_exp from the files beside this page.</footer>
</main>
</body>
</html>
"""


def figure_section(paths: Sequence[Path], captions: Mapping[str, str], heading: str = "Curves") -> str:
    """Return PNG files as a section, each with the caption of its name; empty when there are none."""
    figures = [
        f'<figure><img alt="{path.stem.replace("_", " ")}" src="data:image/png;base64,{_base64(path)}">'
        f"<figcaption>{escape(captions[path.stem])}</figcaption></figure>\n"
        for path in paths
    ]
    return f'<h2>{heading}</h2>\n<section class="figures">\n{"".join(figures)}</section>\n' if figures else ""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
