"""Bytes and seconds of collectives against vectors that are really sent around."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ava_exp.models.communication import (
    Collective,
    CommunicationTime,
    Group,
    Links,
    Traffic,
    Transfer,
    Work,
    communication_time,
    neighbours,
    peers,
    seconds,
    sent_by_collective,
    traffic,
    world,
)

VALUE_BYTES = 4
Vector = list[int]


class Ring:
    """Ranks that send to the next one only; `sent` counts the values of each."""

    def __init__(self, vectors: list[Vector]) -> None:
        self.vectors = [list(vector) for vector in vectors]
        self.num_ranks = len(vectors)
        self.part = len(vectors[0]) // self.num_ranks
        assert self.part * self.num_ranks == len(vectors[0])
        self.sent = [0] * self.num_ranks

    def _round(self, offset: int, receive: Callable[[int, int], int]) -> None:
        """Let every rank send one part to its neighbour, all at once: rank r that of number r + offset."""
        messages = []
        for rank in range(self.num_ranks):
            start = (rank + offset) % self.num_ranks * self.part
            messages.append((start, self.vectors[rank][start : start + self.part]))
            self.sent[rank] += self.part
        for rank, (start, values) in enumerate(messages):
            target = self.vectors[(rank + 1) % self.num_ranks]
            for index, value in enumerate(values, start):
                target[index] = receive(target[index], value)

    def reduce_scatter(self) -> None:
        """Rank r then has the sums of part r + 1."""
        for step in range(self.num_ranks - 1):
            self._round(-step, lambda own, arrived: own + arrived)

    def all_gather(self) -> None:
        """Rank r gives part r + 1 to all."""
        for step in range(self.num_ranks - 1):
            self._round(1 - step, lambda own, arrived: arrived)


def vectors_of(num_ranks: int, length: int) -> list[Vector]:
    return [[100 * rank + index**2 for index in range(length)] for rank in range(num_ranks)]


def sums_of(vectors: list[Vector]) -> Vector:
    return [sum(column) for column in zip(*vectors, strict=True)]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_a_ring_sends_what_is_predicted(num_ranks: int) -> None:
    vectors = vectors_of(num_ranks, 3 * num_ranks)
    ring = Ring(vectors)
    group = Group(num_ranks=num_ranks, per_node=num_ranks)
    size = VALUE_BYTES * len(vectors[0])
    ring.reduce_scatter()
    expected = traffic(Collective.reduce_scatter, size, group).total
    assert [VALUE_BYTES * values for values in ring.sent] == pytest.approx([expected] * num_ranks)
    ring.all_gather()
    expected += traffic(Collective.all_gather, size, group).total
    assert [VALUE_BYTES * values for values in ring.sent] == pytest.approx([expected] * num_ranks)
    assert expected == pytest.approx(traffic(Collective.all_reduce, size, group).total)
    assert ring.vectors == [sums_of(vectors)] * num_ranks


@pytest.mark.parametrize(("per_node", "num_nodes"), [(1, 3), (4, 1), (2, 2), (4, 3), (2, 5)])
def test_rings_of_rings_send_what_is_predicted(per_node: int, num_nodes: int) -> None:
    """Reduce within nodes, reduce between nodes the part that each rank has, gather within nodes."""
    num_ranks = per_node * num_nodes
    vectors = vectors_of(num_ranks, num_ranks)
    inner = [Ring(vectors[node * per_node : (node + 1) * per_node]) for node in range(num_nodes)]
    for ring in inner:
        ring.reduce_scatter()
    between = 0
    for place in range(per_node):
        start = (place + 1) % per_node * inner[0].part
        part = slice(start, start + inner[0].part)
        outer = Ring([ring.vectors[place][part] for ring in inner])
        outer.reduce_scatter()
        outer.all_gather()
        between = outer.sent[0]
        for ring, values in zip(inner, outer.vectors, strict=True):
            ring.vectors[place][part] = values
    for ring in inner:
        ring.all_gather()
        assert ring.vectors == [sums_of(vectors)] * per_node
    group = Group(num_ranks=num_ranks, per_node=per_node)
    found = traffic(Collective.all_reduce, VALUE_BYTES * num_ranks, group)
    assert found.within_node == pytest.approx(VALUE_BYTES * inner[0].sent[0])
    assert found.between_nodes == pytest.approx(VALUE_BYTES * between)
    assert found.total == pytest.approx(2 * (num_ranks - 1) / num_ranks * VALUE_BYTES * num_ranks)


@pytest.mark.parametrize(("per_node", "num_nodes"), [(4, 1), (2, 3), (1, 4)])
def test_all_to_all_sends_each_rank_its_part(per_node: int, num_nodes: int) -> None:
    num_ranks = per_node * num_nodes
    near = sum(1 for other in range(1, num_ranks) if other // per_node == 0)
    found = traffic(Collective.all_to_all, 10.0 * num_ranks, Group(num_ranks=num_ranks, per_node=per_node))
    assert found == Traffic(within_node=10.0 * near, between_nodes=10.0 * (num_ranks - 1 - near))


@pytest.mark.parametrize("collective", [kind for kind in Collective if kind is not Collective.host_copy])
def test_one_rank_sends_nothing(collective: Collective) -> None:
    assert traffic(collective, 1e9, world(1, 8)) == Traffic()


def test_ranks_are_spread_evenly() -> None:
    assert world(32, 8) == Group(num_ranks=32, per_node=8)
    assert world(4, 8) == Group(num_ranks=4, per_node=4)
    assert world(12, 8) == Group(num_ranks=12, per_node=6)
    assert world(13, 8).num_nodes == 2
    uneven = traffic(Collective.all_reduce, 13.0, world(13, 8))
    assert uneven.total == pytest.approx(2 * 12)


def test_groups_within_groups() -> None:
    ranks = world(1024, 8)
    assert neighbours(ranks, 4) == Group(num_ranks=4, per_node=4)
    assert neighbours(ranks, 64) == Group(num_ranks=64, per_node=8)
    assert peers(ranks, 4) == Group(num_ranks=256, per_node=2)
    assert peers(ranks, 64) == Group(num_ranks=16, per_node=1)
    assert peers(world(8, 8), 8) == Group(num_ranks=1, per_node=1)


def test_seconds_are_those_of_each_link() -> None:
    links = Links(within_node=100.0, between_nodes=10.0, to_host=1.0)
    assert seconds(Traffic(within_node=200.0, between_nodes=30.0, to_host=4.0), links) == 2 + 3 + 4
    unknown = Links(within_node=100.0, between_nodes=None, to_host=None)
    assert seconds(Traffic(within_node=200.0), unknown) == 2
    assert seconds(Traffic(within_node=200.0, between_nodes=1.0), unknown) is None


PAIR = Group(num_ranks=2, per_node=2)
LINKS = Links(within_node=1.0, between_nodes=None, to_host=None)


def gather(num_bytes: float, times: int, beside: Work) -> Transfer:
    return Transfer(collective=Collective.all_gather, payload=num_bytes, times=times, group=PAIR, beside=beside)


@pytest.mark.parametrize(
    ("transfers", "overlap", "expected"),
    [
        ([], 1.0, CommunicationTime(total=0, exposed=0)),
        # 2 of 4 bytes are sent, in 2 seconds; the backward pass of a micro-batch of 3 seconds takes 2.
        ([gather(4, 1, Work.backward)], 1.0, CommunicationTime(total=2, exposed=0)),
        ([gather(4, 1, Work.backward)], 0.5, CommunicationTime(total=2, exposed=1)),
        ([gather(4, 1, Work.backward)], 0.0, CommunicationTime(total=2, exposed=2)),
        ([gather(4, 1, Work.forward)], 1.0, CommunicationTime(total=2, exposed=1)),
        ([gather(4, 1, Work.none)], 1.0, CommunicationTime(total=2, exposed=2)),
        # Two that go on beside the same pass share it; those beside another do not.
        ([gather(4, 1, Work.backward)] * 2, 1.0, CommunicationTime(total=4, exposed=2)),
        ([gather(4, 1, Work.backward), gather(2, 1, Work.forward)], 1.0, CommunicationTime(total=3, exposed=0)),
        # Three micro-batches hide three times as much of what is sent in each of them.
        ([gather(6, 3, Work.forward)], 1.0, CommunicationTime(total=9, exposed=6)),
    ],
)
def test_computing_hides_what_may_go_on_beside_it(
    transfers: list[Transfer], overlap: float, expected: CommunicationTime
) -> None:
    assert communication_time(transfers, LINKS, micro_batch_seconds=3.0, overlap=overlap) == expected


def test_an_unknown_link_leaves_the_time_unknown() -> None:
    far = Transfer(collective=Collective.all_reduce, payload=1.0, times=1, group=world(16, 8))
    assert communication_time([far], LINKS, micro_batch_seconds=1.0, overlap=1.0) is None


def test_bytes_are_added_up_by_collective() -> None:
    transfers = [gather(4, 3, Work.forward), gather(2, 1, Work.none), gather(0, 5, Work.none)]
    assert sent_by_collective(transfers) == {Collective.all_gather: 3 * 2 + 1}
    assert sent_by_collective([gather(0, 1, Work.none)]) == {}
