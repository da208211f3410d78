"""What `import ava_exp` offers, and that the Python shown in the documentation does what the pages say."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ava_exp

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
HEAVY = ("torch", "accelerate", "mlflow", "numpy", "matplotlib", "rich", "tokenizers")


def python_blocks(page: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the code of every Python block that is no excerpt of a file (`# ava_exp/...`)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if not match[1].startswith("# ava_exp/"):
            yield text.count("\n", 0, match.start(1)) + 1, match[1]


def documented_imports() -> dict[str, str]:
    """Return the module of each public name, as type checkers see it."""
    tree = ast.parse((ROOT / "ava_exp" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `data=stdlib` read one package of the standard library, so that preparing it takes no time."""
    whole = sysconfig.get_path
    folder = Path(whole("stdlib")) / "email"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder) if name == "stdlib" else whole(name))


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("page", [page for page in PAGES if any(python_blocks(page))])
def test_python_in_the_documentation_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in python_blocks(page):
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)  # noqa: S102 - the text of our own page


def test_pages_with_python_are_found() -> None:
    assert sum(1 for _ in python_blocks("docs/python_api.md")) >= 5
    assert any(python_blocks("README.md"))


@pytest.mark.parametrize("name", documented_imports())
def test_a_public_name_is_what_type_checkers_see(name: str) -> None:
    assert getattr(ava_exp, name) is getattr(importlib.import_module(documented_imports()[name]), name)
    assert name in dir(ava_exp)


def test_the_page_lists_every_name_and_no_other() -> None:
    table = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8").partition("\n## Names\n")[2]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(documented_imports())


def test_no_other_name_is_lazy() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Traner'"):
        _ = ava_exp.Traner  # type: ignore[attr-defined]
    public = {name for name in dir(ava_exp) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "ava_exp").iterdir()} | {
        "annotations",
        "importlib",
        "Any",
        "TYPE_CHECKING",
    }
    assert public - modules == set(documented_imports())


def test_importing_and_composing_bring_nothing_heavy() -> None:
    code = (
        "import sys, ava_exp\n"
        "faults = ava_exp.validate(ava_exp.compose(['model=large']))\n"
        "ava_exp.report(faults)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_run_refuses_what_validation_refuses() -> None:
    config = ava_exp.compose(["debug=default", "training.log_interval=0", "budget.steps=-1"])
    with pytest.raises(ava_exp.UserError, match=r"(?s)`budget.steps` must be.*`training.log_interval` must be"):
        ava_exp.run(config)
