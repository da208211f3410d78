"""The documentation tells the truth: options, keys, commands, transcripts, recipes, figures, references and links."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ava_exp.config import router as router_configs
from ava_exp.config import schema, store
from ava_exp.config.compose import compose
from ava_exp.config.folders import group_names, option_names
from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR

if TYPE_CHECKING:
    from tests.conftest import CommandLine

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
CITATION = re.compile(r"\[([a-z]+\d{4}[^\]]*)\]")
SHOWS_ONLY = {"--help", "--cfg", "-sc"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield Block(page.name, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def arguments_of(line: str) -> list[str] | None:
    """Return the arguments of a line that calls this program, by itself or through make; None for any other line."""
    if re.match(r"make train ARGS=", line):
        return shlex.split(shlex.split(line)[2].removeprefix("ARGS="))
    match = re.match(r"(?:\S*python -m ava_exp|ava-exp)(?![.\w])(.*)", line)
    return shlex.split(match[1], comments=True) if match else None


COMMANDS = [
    pytest.param(arguments, id=f"{block.page}:{block.line + offset}")
    for block in BLOCKS
    if block.language in ("", "bash")
    for offset, line in enumerate(block.text.splitlines())
    if (arguments := arguments_of(line)) is not None
]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 25
    assert arguments_of('make train ARGS="model=tiny seed=1"') == ["model=tiny", "seed=1"]
    assert arguments_of(".venv/bin/python -m ava_exp 'a=[1, 2]' # why") == ["a=[1, 2]"]
    assert arguments_of("make train") is None


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_composes(arguments: list[str], command_line: CommandLine, program: CommandLine) -> None:
    run = command_line
    if {"-m", "--multirun"} & {*arguments}:
        arguments = [*arguments, "stage=validate"]
    elif "--info" in arguments:
        run = program  # Hydra then logs to this process's standard output for good
    elif not SHOWS_ONLY & {*arguments}:
        arguments = [*arguments, "--cfg", "job"]
    outcome = run(*arguments)
    assert outcome.code == EXIT_OK, outcome.err


TRANSCRIPTS = [
    pytest.param(arguments_of(command), expected, id=f"{block}: {command}")
    for block in BLOCKS
    if block.language == "console"
    for command, _, expected in (part.partition("\n") for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:])
]


@pytest.mark.parametrize(("arguments", "expected"), TRANSCRIPTS)
def test_every_transcript_is_real(
    arguments: list[str], expected: str, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = command_line(*arguments)
    assert [line.rstrip() for line in (outcome.out + outcome.err).splitlines()] == expected.splitlines()
    assert outcome.code == EXIT_USER_ERROR or {"stage=plan", "stage=validate"} & {*arguments}, "a transcript trains"


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in group_names() if group != "local" for option in option_names(group)],
)
def test_every_option_is_described(group: str, option: str) -> None:
    in_one_line = any(f"`{group}`" in line and f"`{option}`" in line for line in TEXT.splitlines())
    assert in_one_line or f"`{group}={option}`" in TEXT


@pytest.mark.parametrize("key", schema.all_keys())
def test_every_key_is_described(key: str) -> None:
    assert re.search(rf"[` ]{re.escape(key)}[`=]", TEXT)


def test_every_described_key_exists() -> None:
    sections = {key.partition(".")[0] for key in schema.all_keys() if "." in key}
    words = {*re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`", PROSE)}
    files = re.compile(r".*\.(py|md|yaml|json|jsonl|txt|log|html|css|safetensors|bin|db)")
    keys = {word for word in words if word.partition(".")[0] in sections and not files.fullmatch(word)}
    unknown = {key for key in keys if not schema.annotations_at(key) and not schema.is_in_mapping(key)}
    assert len(keys) > 80
    assert unknown == set()


YAML_FILES = [
    pytest.param(block, id=str(block))
    for block in BLOCKS
    if block.language == "yaml" and re.match(r"# (conf|sweeps)/(?!router/random)", block.text)
]
"""Blocks that begin with their path; the router's needs the code of its recipe."""


def write_yaml(block: Block, conf: Path) -> tuple[str, str]:
    """Write a block that begins with its path into a copy of `conf/`; return its group and its option."""
    path = conf.parent / block.text.partition("\n")[0].removeprefix("# ")
    path.write_text(block.text.partition("\n")[2], encoding="utf-8")
    return ("sweep" if path.parent.name == "sweeps" else path.parent.name), path.stem


@pytest.mark.parametrize("block", YAML_FILES)
def test_every_option_file_composes(block: Block, conf: Path, command_line: CommandLine) -> None:
    group, option = write_yaml(block, conf)
    outcome = command_line(f"{group}={option}", "--cfg", "job")
    assert outcome.code == EXIT_OK, outcome.err


def excerpt(language: str, path: str) -> Block:
    """Return the block of the architecture page that begins with the path of a file."""
    found = [
        b for b in BLOCKS if b.language == language and b.page == "architecture.md" and b.text.startswith(f"# {path}\n")
    ]
    assert len(found) == 1, path
    return found[0]


def test_the_recipe_for_a_router_works(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ava_exp.models.decoder import build_model

    module = types.ModuleType("ava_exp.nn.moe.random")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(router_configs, "RandomRouterConfig", None, raising=False)
    monkeypatch.setattr(store, "SCHEMAS", {**store.SCHEMAS})
    for path, target in (
        ("ava_exp/nn/moe/random.py", module),
        ("ava_exp/config/router.py", router_configs),
        ("ava_exp/config/store.py", store),
    ):
        code = "from __future__ import annotations\n" + excerpt("python", path).text
        exec(code, target.__dict__)  # noqa: S102 - the text of our own page
    write_yaml(excerpt("yaml", "conf/router/random.yaml"), conf)

    config = compose(["debug=default", "router=random", "sparsity.router.moe_top_k=3"])
    model = build_model(config.architecture)
    output = model(torch.arange(16)[None])
    assert [int(routing.counts.sum()) for routing in output.routings] == [3 * 16] * config.model.num_layers


def citations(text: str) -> set[str]:
    return {*CITATION.findall(text)}


def test_citations_and_references_agree() -> None:
    bibliography = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(.+),$", bibliography, re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "ava_exp").rglob("*.py"))
    assert citations("[vaswani2017attention] eq. 1, [x2020y §2]") == {"vaswani2017attention", "x2020y §2"}
    assert keys == sorted(set(keys))
    assert citations(code) == set(keys), "a key is cited without an entry, or the other way round"
    assert citations(TEXT) <= set(keys)


def test_every_reference_is_complete() -> None:
    entries = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8").split("\n@")[1:]
    assert len(entries) > 15
    for entry in entries:
        fields = set(re.findall(r"^  (\w+) *=", entry, re.MULTILINE))
        assert {"title", "author", "year"} <= fields, entry
        assert fields & {"eprint", "doi", "institution"}, entry


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    local = [target for target in targets if target and not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (page.parent / target).exists()] == []
