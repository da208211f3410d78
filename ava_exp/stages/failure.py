"""What is told when a run fails: by the rank on which it did, and by those that cannot go on without it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from ava_exp.errors import OtherRankError, UserError
from ava_exp.parallel.ranks import Ranks
from ava_exp.runtime import peak_memory_bytes
from ava_exp.tracking.folder import RunFolder
from ava_exp.training.checkpoint import newest_good_checkpoint, step_of

HEARD_WITHIN_S = 5.0
"""Who fails says so before its connections close; a file system of several machines may take a while to show it."""
NO_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")
NO_CONTACT = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def forget_failure(folder: RunFolder) -> None:
    """Remove what an earlier process of the run has told."""
    folder.failure.unlink(missing_ok=True)


def explain(error: BaseException, folder: RunFolder, ranks: Ranks) -> BaseException:
    """Return what is to be raised where `error` was, and let the other ranks know of it, or learn it from them."""
    if _is_of_memory(error):
        error = _out_of_memory(error, ranks)
    if ranks.num_ranks == 1:
        return error
    if not _is_of_contact(error):
        _tell(f"{type(error).__name__}: {error}", folder, ranks)
        return error
    told = _heard(folder)
    if told is None:
        sentence = f"rank {ranks.rank} lost contact with the others, and none of them said why."
    else:
        sentence = f"rank {told['rank']} failed: {told['error']}"
    return OtherRankError(f"{sentence} {_rest(folder)}")


def _is_of_memory(error: BaseException) -> bool:
    words = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    return words or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _is_of_contact(error: BaseException) -> bool:
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in NO_CONTACT)


def _out_of_memory(error: BaseException, ranks: Ranks) -> UserError:
    who = f"rank {ranks.rank}" if ranks.num_ranks > 1 else "the run"
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return UserError(
        f"{who} ran out of memory, with {peak_memory_bytes(device) / 2**30:.2f} GiB in use at the most: {first_line}. "
        "Lower `training.batch_size` and raise `training.gradient_accumulation_steps` as much, or set "
        "`training.recompute=full`."
    )


def _tell(text: str, folder: RunFolder, ranks: Ranks) -> None:
    """Leave word, unless another rank did before."""
    with suppress(OSError):
        descriptor = os.open(folder.failure, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"rank": ranks.rank, "error": text}, file)


def _heard(folder: RunFolder) -> dict[str, Any] | None:
    """Return what the rank that failed has told, as soon as it is there; None if it told nothing."""
    deadline = time.monotonic() + HEARD_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):  # it may be half written
            told: dict[str, Any] = json.loads(folder.failure.read_text(encoding="utf-8"))
            return told
        time.sleep(0.05)
    return None


def _rest(folder: RunFolder) -> str:
    """Return what is left of the run, in a sentence."""
    checkpoint, _ = newest_good_checkpoint(folder.checkpoints)
    step = "the start" if checkpoint is None else f"step {step_of(checkpoint)}"
    return f"The same command goes on from {step}."
