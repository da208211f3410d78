"""What a run was made with: command, machine, versions, commit. Nothing is taken from the environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ava_exp
from ava_exp.tracking.redaction import redact

PACKAGES = (
    "ava-exp",
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "transformers",
    "mlflow",
    "matplotlib",
    "rich",
)
GIT_SECONDS = 5.0


def collect_metadata(command: Sequence[str]) -> dict[str, Any]:
    """Return a JSON-ready description of this process, with secrets hidden. Imports no package to learn its version."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(shlex.join(command)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(Path(ava_exp.__file__).parent),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that matter, those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """Return the processor's name, or its architecture where the system does not say more."""
    if platform.system() == "Darwin":  # where `platform.processor` says "arm", whatever the chip
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Return the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def git_state(package: Path) -> dict[str, Any] | None:
    """Return commit and whether files differ from it; None when `package` is not part of a checkout."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a very slow file system
        return None
    return result.stdout.strip() if result.returncode == 0 else None
