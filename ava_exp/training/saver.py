"""Takes snapshots of a run and writes them, off the training thread unless told otherwise."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ava_exp.errors import CheckpointError, must_be
from ava_exp.models.surgery import Surgeon
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.training.checkpoint import Snapshot, prune_checkpoints, write_checkpoint
from ava_exp.training.history import RoutingHistory
from ava_exp.training.state import TrainState

logger = logging.getLogger(__name__)

KEPT = "rank_"
"""Before a rank's number: the file of what it remembers beside its random state."""
SURGERY, PRUNED = "surgery", "pruned"
"""Where a checkpoint tells what surgery made of the model, and keeps the experts that were taken away."""
MAX_FAILURES_IN_A_ROW = 3
PAUSE_S = 1.0
"""Before a save that has just failed is repeated."""


class CheckpointSaver:
    """Writes at most one checkpoint at a time; a failed save keeps the older ones and is made up for by the next."""

    def __init__(
        self, checkpoints: Path, *, num_best: int, asynchronous: bool, saved: Callable[[float], None] | None = None
    ) -> None:
        """`saved` is called with the seconds that each save took."""
        self.checkpoints, self.num_best = checkpoints, num_best
        self._saved = saved or (lambda seconds: None)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer") if asynchronous else None
        self._writing: Future[None] | None = None
        self._unsaved: tuple[Snapshot, dict[int, float]] | None = None
        self._failures = 0
        self._error: OSError | None = None

    def save(self, snapshot: Snapshot, evaluations: dict[int, float]) -> None:
        """Write `snapshot`, whose tensors nobody changes any more, then remove checkpoints that need not be kept.

        Raises CheckpointError after three failures in a row.
        """
        self.wait()
        self._unsaved = (snapshot, dict(evaluations))
        if self._writer is not None:
            self._writing = self._writer.submit(self._write, *self._unsaved)
        else:
            self._write(*self._unsaved)
            self._raise_if_hopeless()

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError after three failures in a row."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
        self._raise_if_hopeless()

    def finish(self) -> None:
        """Return when the newest snapshot is on disk; no later save will make up for it, so a failed one is repeated.

        Raises CheckpointError after three failures in a row.
        """
        self.wait()
        while self._unsaved is not None:
            time.sleep(PAUSE_S)
            self._write(*self._unsaved)
            self._raise_if_hopeless()

    def _write(self, snapshot: Snapshot, evaluations: dict[int, float]) -> None:
        started = time.monotonic()
        try:
            write_checkpoint(self.checkpoints, snapshot)
        except OSError as error:
            self._failures, self._error = self._failures + 1, error
            logger.error("checkpoint at step %d was not saved: %s. Older ones are kept.", snapshot.step, error)
            return
        self._failures, self._unsaved = 0, None
        seconds = time.monotonic() - started
        self._saved(seconds)
        logger.info("checkpoint at step %d saved in %.2f s", snapshot.step, seconds)
        try:
            removed = prune_checkpoints(self.checkpoints, evaluations, self.num_best)
            logger.info("checkpoints removed: %s", removed)
        except OSError as error:
            logger.warning("an older checkpoint was not removed: %s", error)

    def _raise_if_hopeless(self) -> None:
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be saved in {self.checkpoints}: {self._error}. "
                "Make room there and give the same command again: it goes on from the newest one."
            )


def take_snapshot(
    updater: Updater,
    state: TrainState,
    extra: dict[str, Any],
    surgeon: Surgeon | None = None,
    *,
    copy: bool = True,
    drawn: Sequence[tuple[dict[str, Tensor], dict[str, Any]]] | None = None,
    kept: Sequence[dict[str, Tensor]] = (),
) -> Snapshot:
    """Gather everything resumable. With `copy` training can go on while it is written; without it needs no memory, and
    must be written before anything changes: a save that fails and is repeated is made up for by the next one. `drawn`
    are the random states of all ranks, this one's alone by default, `kept` what else each of them remembers.
    """
    optimizer_tensors, optimizer_numbers = updater.optimizer_state()
    state.loss_scale, state.loss_scale_good_steps = updater.loss_scale.scale, updater.loss_scale.good_steps
    drawn = drawn or [random_state()]
    weights = {**updater.whole_weights(), **updater.buffers}
    tensors = {
        "model": _copies(weights) if copy else weights,
        "optimizer": _copies(optimizer_tensors) if copy else optimizer_tensors,
        **{_random(rank): tensors for rank, (tensors, _) in enumerate(drawn)},
    }
    tensors |= {f"{KEPT}{rank}": tensors for rank, tensors in enumerate(kept) if tensors}
    if routing := state.routing.to_tensors():
        tensors["routing"] = routing
    surgery, pruned = surgeon.state() if surgeon is not None else (None, {})
    if surgery is not None:
        extra = {**extra, SURGERY: surgery}
    if pruned:
        tensors[PRUNED] = pruned
    return Snapshot(
        step=state.step,
        tensors=tensors,
        state={
            "train": state.to_json(),
            "optimizer": optimizer_numbers,
            **{_random(rank): numbers for rank, (_, numbers) in enumerate(drawn)},
            **extra,
        },
    )


def kept_by(ranks: Ranks, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return what this one of the `ranks` remembered; nothing where they were others, whose memory is of no use."""
    saved = {name: tensors for name, tensors in snapshot.tensors.items() if name.startswith(KEPT)}
    return saved[f"{KEPT}{ranks.rank}"] if len(saved) == ranks.num_ranks else {}


def _random(rank: int) -> str:
    """Return under which name a rank's random state is kept."""
    return f"random_{rank}" if rank else "random"


def restore_snapshot(
    snapshot: Snapshot,
    updater: Updater,
    *,
    reset_optimizer: bool,
    surgeon: Surgeon | None = None,
    ranks: Ranks | None = None,
) -> TrainState:
    """Put a snapshot back into a model and its optimizer. Raises CheckpointError when it does not fit them.

    With the model's `surgeon` the model gets the shape that surgery gave the saved one. Where others than the saved
    `ranks` go on, each but the first draws anew.
    """
    ranks = ranks or Ranks()
    restore_weights(snapshot, updater, surgeon)
    try:
        routing = RoutingHistory.from_tensors(snapshot.tensors.get("routing", {}))
        state = TrainState.from_json(snapshot.state["train"], routing)
        if not reset_optimizer:
            updater.load_optimizer_state(snapshot.tensors["optimizer"], snapshot.state["optimizer"])
            updater.loss_scale.scale, updater.loss_scale.good_steps = state.loss_scale, state.loss_scale_good_steps
        own = _random(ranks.rank)
        if own == "random" or own in snapshot.tensors:
            restore_random_state(snapshot.tensors[own], snapshot.state[own])
        else:
            seed_random_state(snapshot.step, ranks.rank)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint of step {snapshot.step} does not fit this run: {error!r}.") from error
    return state


def restore_weights(snapshot: Snapshot, updater: Updater, surgeon: Surgeon | None = None) -> None:
    """Put a snapshot's weights back, and nothing else. Raises CheckpointError when they do not fit the model."""
    if surgeon is not None:
        if updater.is_sharded and snapshot.state.get(SURGERY) is not None:
            raise CheckpointError(
                "this run's experts were operated on: go on with whole ones, with `distributed=ddp` and no "
                "`distributed.expert_parallel`."
            )
        follow_surgery(snapshot, surgeon)
    load_weights(snapshot, {**updater.weights, **updater.buffers}, updater.cut)
    updater.round_masters()


def follow_surgery(snapshot: Snapshot, surgeon: Surgeon) -> None:
    """Let a model as it was configured become one that the snapshot's weights fit. Raises CheckpointError."""
    try:
        surgeon.follow(snapshot.state.get(SURGERY), snapshot.tensors.get(PRUNED, {}))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint of step {snapshot.step} does not fit this run: {error!r}.") from error


@torch.no_grad()
def load_weights(
    snapshot: Snapshot, weights: dict[str, Tensor], cut: Callable[[str, Tensor], Tensor] = lambda _, whole: whole
) -> None:
    """Copy a snapshot's weights into `weights`, of each what `cut` makes of it. Raises CheckpointError naming what
    differs."""
    saved = snapshot.tensors.get("model", {})
    if saved.keys() != weights.keys():
        differing = sorted(saved.keys() ^ weights.keys())
        raise CheckpointError(
            f"the checkpoint holds another model: {len(differing)} weights differ, as {differing[0]}."
        )
    for name, weight in weights.items():
        own = cut(name, saved[name])
        if own.shape != weight.shape:
            expected = f"of shape {tuple(weight.shape)} for this model"
            raise CheckpointError(must_be(name, expected, tuple(own.shape), "The checkpoint is of another one."))
        weight.copy_(own)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every generator a run may draw from: torch's on each device, numpy's and Python's."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    return tensors, {"numpy": [kind, position, has_gauss, gauss], "python": [version, gauss_next]}


def seed_random_state(seed: int, rank: int = 0) -> None:
    """Start every generator that `random_state` returns: a run killed before its first checkpoint starts the same.

    Every rank starts elsewhere.
    """
    seed += rank * 0x9E3779B1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def restore_random_state(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put back what `random_state` returned; devices that are not here are left out."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda_{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda_{index}"], index)
    kind, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, gauss_next = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
