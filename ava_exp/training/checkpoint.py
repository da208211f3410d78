"""Checkpoint folders: written so that no crash can leave a bad one that looks good, read without running any code.

A folder is written as `step_N.tmp`: every file is fsynced, a manifest with the SHA-256 of each comes last, and the
folder is renamed when all of that is on disk. A folder without a manifest that verifies is no checkpoint. Tensors are
safetensors, everything else JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ava_exp.disk import sync
from ava_exp.errors import CheckpointError, must_be

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
PREFIX = "step_"
UNFINISHED, BAD, LEAVING = ".tmp", ".bad", ".old"
WRITE_BYTES = 2**26
"""Handed to the system at once: what a file's tensors take in memory while they are written."""
FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the formats that a run's state can have."""


@dataclass(kw_only=True, slots=True)
class Snapshot:
    """What a checkpoint holds: files of tensors, by file stem and then by tensor name, and one JSON document."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return checkpoints / f"{PREFIX}{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return finished checkpoint folders, oldest first. They are not verified yet."""
    if not checkpoints.is_dir():
        return []
    return sorted(filter(_has_name, checkpoints.iterdir()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(folder.name.removeprefix(PREFIX))


def write_checkpoint(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot; it exists once the last rename is on disk. Raises OSError, leaving no partial folder behind."""
    final = folder_of(checkpoints, snapshot.step)
    partial = final.with_name(final.name + UNFINISHED)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for stem, tensors in snapshot.tensors.items():
            _write_synced(partial / f"{stem}{TENSORS}", _safetensors(tensors))
        _write_synced(partial / STATE, [_json_bytes(snapshot.state)])
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        _write_synced(partial / MANIFEST, [_json_bytes({"format": FORMAT, "step": snapshot.step, "files": files})])
        sync(partial)
        replaced = None
        if final.exists():  # a bad one is kept for inspection; a good one, which a signal made, is replaced
            replaced = _free_name(final, BAD if verify_checkpoint(final) else LEAVING)
            os.rename(final, replaced)
        os.rename(partial, final)
        sync(checkpoints)
        if replaced is not None and LEAVING in replaced.name:
            shutil.rmtree(replaced, ignore_errors=True)  # what is left is swept when the run is next opened
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def verify_checkpoint(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder in a few words, or None when every byte is as it was written."""
    try:
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            actual = _describe(folder / name)
            if actual != expected:
                return f"{name} is not as it was written ({actual['bytes']} bytes, of {expected['bytes']})"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def read_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint after verifying it. Raises CheckpointError."""
    problem = verify_checkpoint(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} cannot be used: {problem}.")
    manifest = _read_manifest(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    name = STATE
    try:
        state = json.loads((folder / STATE).read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        for name in sorted(manifest["files"].keys() - {STATE}):
            tensors[Path(name).stem] = safetensors.torch.load_file(folder / name)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} cannot be read: {name} is malformed ({error}).") from error
    return Snapshot(step=manifest["step"], tensors=tensors, state=state)


def newest_good_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a sentence for each newer one that does not.

    Raises CheckpointError when there are checkpoints and none verifies: a run never starts over in silence.
    """
    problems: list[str] = []
    for folder in reversed(list_checkpoints(checkpoints)):
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder, problems
        problems.append(f"checkpoint {folder.name} is not used: {problem}")
    if problems:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} can be used: {'; '.join(problems)}. "
            "Restore one from a backup, or start a new attempt with `resume=never`."
        )
    return None, []


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user's path means: one itself, a run's folder, or its folder of checkpoints.

    Raises CheckpointError for anything else, a pickled file above all.
    """
    if not path.is_dir():
        state = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            must_be("resume", "`auto`, `never`, or a checkpoint or run folder of this program", f"{path} ({state})")
        )
    if (path / MANIFEST).is_file():
        if (problem := verify_checkpoint(path)) is not None:
            raise CheckpointError(f"{path} cannot be used: {problem}.")
        return path
    found, _ = newest_good_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise CheckpointError(must_be("resume", "a folder that holds a checkpoint", str(path)))
    return found


def weights_fingerprint(folder: Path) -> str:
    """Return eight hexadecimal digits that tell a checkpoint's weights from others. Raises CheckpointError."""
    try:
        return str(_read_manifest(folder)["files"][f"model{TENSORS}"]["sha256"])[:8]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} cannot be used: its {MANIFEST} cannot be read ({error}).") from error


def sweep_leftovers(checkpoints: Path) -> None:
    """Remove what an interrupted save or removal left behind. Only the owner of the run's lock may call this."""
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.name.startswith(PREFIX) and path.name.endswith((UNFINISHED, LEAVING)):
                shutil.rmtree(path)


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which did not verify: the run goes on from `step`, and they are not its own.

    Under their old name the newest of them would pass for the newest checkpoint when others are removed.
    """
    for folder in list_checkpoints(checkpoints):
        if step_of(folder) > step:
            os.rename(folder, _free_name(folder, BAD))


def prune_checkpoints(checkpoints: Path, evaluations: dict[int, float], num_best: int) -> list[int]:
    """Keep the newest checkpoint and `num_best` older ones; return the steps removed.

    Those with the lowest validation loss stay, then the newest: when the newest of all is damaged there is another.
    A folder is renamed before it is emptied, so that a crash leaves no half of a checkpoint under a checkpoint's name.
    """

    def rank(folder: Path) -> tuple[float, int]:
        loss = evaluations.get(step_of(folder), math.inf)
        return (math.inf if math.isnan(loss) else loss), -step_of(folder)

    removed = []
    for folder in sorted(list_checkpoints(checkpoints)[:-1], key=rank)[num_best:]:
        leaving = folder.with_name(folder.name + LEAVING)
        os.rename(folder, leaving)
        shutil.rmtree(leaving)
        removed.append(step_of(folder))
    return sorted(removed)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return a manifest that `write_checkpoint` wrote; other content raises ValueError, or whatever it comes to."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, and this version reads {FORMAT}")
    for name in manifest["files"]:
        if Path(name).name != name or (name != STATE and Path(name).suffix != TENSORS):
            raise ValueError(f"it names a file from outside: {name!r}")
    if STATE not in manifest["files"]:
        raise ValueError(f"{STATE} is missing from it")
    if type(manifest["step"]) is not int or (_has_name(folder) and manifest["step"] != step_of(folder)):
        raise ValueError(f"it is of step {manifest['step']!r}")
    return manifest


def _has_name(folder: Path) -> bool:
    return folder.name.startswith(PREFIX) and folder.name.removeprefix(PREFIX).isdecimal()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _free_name(path: Path, ending: str) -> Path:
    names = (path.with_name(f"{path.name}{ending}{count or ''}") for count in range(1000))
    return next(name for name in names if not name.exists())


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """Yield a safetensors file part by part; the library's own `save` holds all of it in memory, tensors included.

    The widest formats come first, as there, so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": FORMAT_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        values = tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, len(values), WRITE_BYTES):
            yield values[start : start + WRITE_BYTES].cpu().numpy().tobytes()


def _write_synced(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file and bring it to the disk; small parts are written together."""
    with path.open("xb") as file:
        waiting: list[bytes] = []
        for part in parts:
            waiting.append(part)
            if sum(map(len, waiting)) >= WRITE_BYTES:
                file.write(b"".join(waiting))
                waiting.clear()
        file.write(b"".join(waiting))
        file.flush()
        os.fsync(file.fileno())
