"""Bytes that ranks send to one another, and how long that takes: closed forms, without torch, nothing sent.

Collectives are taken as rings [patarasuk2009bandwidth], one within each node and others between nodes. Bandwidth alone
is counted: the latency of a message is left out, which for many ranks and few bytes is too little. Tests send small
vectors around simulated rings and count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Collective(Enum):
    """What ranks do together; `host_copy` is what a rank does with the memory of its host."""

    all_reduce = "all-reduce"
    reduce_scatter = "reduce-scatter"
    all_gather = "all-gather"
    all_to_all = "all-to-all"
    host_copy = "host copies"


class Work(Enum):
    """The computing beside which a transfer may go on; `none` is waited for."""

    none = "none"
    forward = "forward"
    backward = "backward"


SHARE_OF_COMPUTE = {Work.none: 0.0, Work.forward: 1 / 3, Work.backward: 2 / 3}
"""Of a micro-batch: the backward pass multiplies twice as much as the forward pass."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Group:
    """Ranks that exchange something, spread evenly over nodes: `per_node` need not be whole."""

    num_ranks: int
    per_node: float

    @property
    def num_nodes(self) -> float:
        return self.num_ranks / self.per_node


def world(num_ranks: int, devices_per_node: int) -> Group:
    """Return all ranks, on as few nodes as there must be."""
    return Group(num_ranks=num_ranks, per_node=num_ranks / math.ceil(num_ranks / devices_per_node))


def neighbours(ranks: Group, size: int) -> Group:
    """Return one of the groups of `size` ranks that follow one another: within a node if it has so many."""
    return Group(num_ranks=size, per_node=size / math.ceil(size / ranks.per_node))


def peers(ranks: Group, size: int) -> Group:
    """Return one of the groups that have one rank of each of the `neighbours`, in the same place."""
    number = ranks.num_ranks // size
    return Group(num_ranks=number, per_node=min(number, max(1.0, ranks.per_node / size)))


@dataclass(kw_only=True, slots=True, frozen=True)
class Traffic:
    """Bytes that one rank sends over each kind of link."""

    within_node: float = 0.0
    between_nodes: float = 0.0
    to_host: float = 0.0

    @property
    def total(self) -> float:
        return self.within_node + self.between_nodes + self.to_host


def traffic(collective: Collective, payload: float, group: Group) -> Traffic:
    """Return what one rank of `group` sends in one collective.

    `payload` is bytes: of the whole tensor that is reduced, scattered or gathered; of all that one rank has for others
    and itself in an all-to-all; of what is copied to or from the host.

    A reduction that gives each rank its part passes (N - 1) / N of the tensor along the ring, gathering passes as much,
    and an all-reduce is both. With g ranks in each of m nodes, a ring within the node passes (g - 1) / g, and the rings
    between nodes, of which each has a g-th of the tensor, (m - 1) / m of that: together (N - 1) / N again.
    """
    if collective is Collective.host_copy:
        return Traffic(to_host=payload)
    ranks, per_node, num_nodes = group.num_ranks, group.per_node, group.num_nodes
    if collective is Collective.all_to_all:
        return Traffic(
            within_node=payload * (per_node - 1) / ranks,
            between_nodes=payload * (ranks - per_node) / ranks,
        )
    rounds = 2 if collective is Collective.all_reduce else 1
    return Traffic(
        within_node=rounds * payload * (per_node - 1) / per_node,
        between_nodes=rounds * payload / per_node * (num_nodes - 1) / num_nodes,
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class Transfer:
    """A collective that is done `times` in a step, each with `payload` bytes as `traffic` takes them."""

    collective: Collective
    payload: float
    times: int
    group: Group
    beside: Work = Work.none

    @property
    def sent(self) -> Traffic:
        """Bytes that one rank sends in a step."""
        return traffic(self.collective, self.times * self.payload, self.group)


@dataclass(kw_only=True, slots=True, frozen=True)
class Links:
    """Bytes per second of one device in one direction; None is unknown."""

    within_node: float | None
    between_nodes: float | None
    to_host: float | None


def sent_by_collective(transfers: Iterable[Transfer]) -> dict[Collective, float]:
    """Return the bytes that one rank sends in a step by collective, those alone that occur."""
    sent: dict[Collective, float] = {}
    for transfer in transfers:
        if transfer.sent.total:
            sent[transfer.collective] = sent.get(transfer.collective, 0.0) + transfer.sent.total
    return sent


def seconds(sent: Traffic, links: Links) -> float | None:
    """Return how long it takes, one kind of link after the other; None if it needs a link that is unknown."""
    taken = 0.0
    for name in ("within_node", "between_nodes", "to_host"):
        num_bytes, rate = getattr(sent, name), getattr(links, name)
        if num_bytes and rate is None:
            return None
        taken += num_bytes / rate if num_bytes else 0.0
    return taken


@dataclass(kw_only=True, slots=True, frozen=True)
class CommunicationTime:
    """Seconds of a step in which a rank communicates, and those of them that computing does not hide."""

    total: float
    exposed: float


def communication_time(
    transfers: Iterable[Transfer], links: Links, *, micro_batch_seconds: float, overlap: float
) -> CommunicationTime | None:
    """Return the time of a step's transfers. None if they need a link that is unknown.

    Those beside the same work share its time: `overlap` of it, in as many micro-batches as the most frequent of them
    occurs in, hides them; what is left is waited for.
    """
    taken: dict[Work, float] = {}
    passes: dict[Work, int] = {}
    for transfer in transfers:
        own = seconds(transfer.sent, links)
        if own is None:
            return None
        taken[transfer.beside] = taken.get(transfer.beside, 0.0) + own
        passes[transfer.beside] = max(passes.get(transfer.beside, 0), transfer.times)
    hidden = _hidden(taken, passes, overlap * micro_batch_seconds)
    total = sum(taken.values())
    return CommunicationTime(total=total, exposed=total - hidden)


def _hidden(taken: Mapping[Work, float], passes: Mapping[Work, int], micro_batch_seconds: float) -> float:
    return sum(min(own, SHARE_OF_COMPUTE[work] * micro_batch_seconds * passes[work]) for work, own in taken.items())
