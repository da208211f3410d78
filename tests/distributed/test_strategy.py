"""What ranks say to each other, and what is noticed when they do not understand each other."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import start_ranks


@pytest.mark.parametrize("name", ["values", "masters", "drift", "no_synchronisation", "idle", "shapes"])
def test_of_two_ranks(name: str) -> None:
    ended = start_ranks(2, [name], module="tests.distributed.worker").wait(120)
    assert ended.codes == [0, 0], str(ended)
    assert [out.splitlines()[-1] for out in ended.outs] == ["done", "done"]
