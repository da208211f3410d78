"""The shape of the code, read from its syntax: imports point downward, and some things are said in one place or never.

Every check is also shown code that breaks it, so that it is known to see.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    {"errors", "disk"},
    {"config"},
    {"data", "tokenizer", "retrieval"},
    {"nn"},
    {"losses", "optim"},
    {"models"},
    {"generation", "evaluation", "export", "tracking", "parallel", "runtime"},
    {"training"},
    {"alignment", "control"},
    {"stages"},
    {"sweeping", "pipelines"},
    {"cli", "runs", "__main__"},
)
"""Parts of `ava_exp`, lowest first. A part imports from its own layer and from those below it."""

ONLY_IN = {
    "mlflow": ("ava_exp/tracking/",),
    "accelerate": ("ava_exp/runtime.py", "ava_exp/parallel/"),
    "deepspeed": ("ava_exp/parallel/zero.py",),
    "submitit": ("launchers/",),
}
"""Where a library may be imported; nowhere else."""

MAY_TOUCH_THE_ENVIRONMENT = {
    "ava_exp/runtime.py",
    "ava_exp/parallel/start.py",  # is told of the other processes, and tells Accelerate and DeepSpeed
    "ava_exp/cli.py",  # sets HYDRA_FULL_ERROR: Hydra has no other way to be told to raise
    "ava_exp/sweeping/start.py",  # gives a point its GPU
    "ava_exp/tracking/mlflow_follower.py",  # sets what MLflow can be told in no other way
    "launchers/ava_launchers/rank.py",  # tells a process its place among the others
    "launchers/ava_launchers/slurm_commands.py",  # asks for whole lists of an array's jobs
    "launchers/ava_launchers/slurm_submission.py",  # hides a job's variables from the next one
    "launchers/ava_launchers/slurm_task.py",  # is told by SLURM
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "instantiate", "unsafe_load", "full_load", "system", "popen"}

SOURCES = sorted(path for folder in ("ava_exp", "launchers") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module, as written, with its line; `from a import b` is both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def part_of(file: str) -> str:
    return file.removeprefix("ava_exp/").removesuffix(".py").split("/")[0]


def upward_imports(file: str, tree: ast.AST) -> Iterator[str]:
    own = part_of(file)
    if own not in set().union(*LAYERS):
        return  # `__init__.py`, and launchers, which may import anything
    for module, line in imports(tree):
        package, _, rest = module.partition(".")
        part = rest.split(".")[0]
        is_part = package == "ava_exp" and part not in ("", "__version__")
        if is_part and layer_of(part) > layer_of(own):
            yield f"{file}:{line} imports {module} from above"


def heavy_imports_low_down(file: str, tree: ast.AST) -> Iterator[str]:
    """`errors` needs the standard library alone; `config` is instant, so nothing numerical."""
    if file == "ava_exp/errors.py":
        allowed = sys.stdlib_module_names
    elif file.startswith("ava_exp/config/"):
        allowed = sys.stdlib_module_names | {"ava_exp", "hydra", "omegaconf", "yaml"}
    else:
        return
    yield from (f"{file}:{line} imports {m}" for m, line in imports(tree) if m.split(".")[0] not in allowed)


def libraries_out_of_place(file: str, tree: ast.AST) -> Iterator[str]:
    for module, line in imports(tree):
        place = ONLY_IN.get(module.split(".")[0])
        if place and not file.startswith(place):
            yield f"{file}:{line} imports {module}, which belongs in {', '.join(place)}"


def environment_reads(file: str, tree: ast.AST) -> Iterator[str]:
    if file in MAY_TOUCH_THE_ENVIRONMENT:
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{file}:{node.lineno} uses os.{node.attr}"
    yield from (f"{file}:{line} imports {m}" for m, line in imports(tree) if m.removeprefix("os.") in names)


def unsafe_loading(file: str, tree: ast.AST) -> Iterator[str]:
    yield from (f"{file}:{line} imports {m}" for m, line in imports(tree) if m.split(".")[0] in UNSAFE_MODULES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        called = ast.unparse(node.func)
        bare = called in UNSAFE_CALLS or called.startswith(("os.system", "os.popen", "yaml.load", "yaml.unsafe"))
        if bare or called.endswith((".instantiate", ".unsafe_load", ".full_load")):
            yield f"{file}:{node.lineno} calls {called}"
        for name, allowed in (("weights_only", True), ("shell", False), ("allow_pickle", False)):
            if name in keywords and ast.unparse(keywords[name]) != str(allowed):
                yield f"{file}:{node.lineno} passes {name}={ast.unparse(keywords[name])}"
        if called == "torch.load" and "weights_only" not in keywords:
            yield f"{file}:{node.lineno} calls torch.load without weights_only=True"


Check = Callable[[str, ast.AST], Iterator[str]]
CHECKS: list[Check] = [
    upward_imports,
    heavy_imports_low_down,
    libraries_out_of_place,
    environment_reads,
    unsafe_loading,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_keeps_its_shape(check: Check) -> None:
    assert len(SOURCES) > 50
    assert [fault for path in SOURCES for fault in check(name_of(path), ast.parse(path.read_text()))] == []


def test_every_part_has_its_layer() -> None:
    parts = {part_of(name_of(path)) for path in SOURCES}
    known = set().union(*LAYERS) | {"__init__", "launchers"}
    assert parts <= known, f"give a layer to {parts - known}"


@pytest.mark.parametrize(
    ("check", "file", "code"),
    [
        (upward_imports, "ava_exp/nn/moe/topk.py", "from ava_exp.models.decoder import Decoder"),
        (upward_imports, "ava_exp/nn/moe/topk.py", "def f():\n    import ava_exp.training.loop"),
        (upward_imports, "ava_exp/config/run.py", "from ava_exp import data"),
        (upward_imports, "ava_exp/stages/plan.py", "from ava_exp.cli import main"),
        (heavy_imports_low_down, "ava_exp/config/model.py", "def f():\n    import torch"),
        (heavy_imports_low_down, "ava_exp/config/model.py", "from numpy import array"),
        (heavy_imports_low_down, "ava_exp/errors.py", "import omegaconf"),
        (libraries_out_of_place, "ava_exp/training/loop.py", "import mlflow.tracking"),
        (libraries_out_of_place, "ava_exp/training/loop.py", "from accelerate import Accelerator"),
        (libraries_out_of_place, "ava_exp/cli.py", "def f():\n    import submitit"),
        (environment_reads, "ava_exp/data/cache.py", "import os\nos.environ['X']"),
        (environment_reads, "ava_exp/data/cache.py", "from os import environ"),
        (environment_reads, "ava_exp/data/cache.py", "import os\nos.getenv('X')"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "import pickle"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "from pickle import loads"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "torch.load(path)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "torch.load(path, weights_only=False)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "load(path, weights_only=flag)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "np.load(path, allow_pickle=True)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "eval(text)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "subprocess.run(text, shell=True)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "os.system(text)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "hydra.utils.instantiate(config)"),
        (unsafe_loading, "ava_exp/training/checkpoint.py", "yaml.load(text)"),
    ],
)
def test_each_check_sees_what_it_is_for(check: Check, file: str, code: str) -> None:
    assert list(check(file, ast.parse(code)))


def test_what_is_allowed_is_not_refused() -> None:
    allowed = {
        "ava_exp/training/loop.py": "from ava_exp.runtime import Runtime\nmodel.eval()\nre.compile('x')",
        "ava_exp/tracking/mlflow_tracker.py": "import mlflow",
        "ava_exp/runtime.py": "import os\nfrom accelerate import Accelerator\nos.environ['X']",
        "ava_exp/config/compose.py": "from omegaconf import OmegaConf\nfrom ava_exp import __version__",
        "ava_exp/training/checkpoint.py": "torch.load(path, weights_only=True)\nsubprocess.run(['ls'], shell=False)",
    }
    for file, code in allowed.items():
        assert [fault for check in CHECKS for fault in check(file, ast.parse(code))] == []
