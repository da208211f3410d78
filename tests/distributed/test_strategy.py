"""What ranks say to each other, and what is noticed when they do not understand each other."""

from __future__ import annotations

from tests.distributed.ranks import start_ranks


def test_two_ranks() -> None:
    ended = start_ranks(2, [], module="tests.distributed.worker").wait(120)
    assert ended.codes == [0, 0], str(ended)
    assert [out.splitlines()[-1] for out in ended.outs] == ["done", "done"]
