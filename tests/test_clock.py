"""A clock adds up what is spent under each name, in the order of first use, whatever ends the block."""

import pytest

from compressor import clock
from compressor.clock import Clock


def test_seconds_add_up_by_name_also_when_a_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 27.0, 30.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    spent = Clock()
    with spent("step"):
        pass
    with spent("data"):
        pass
    with pytest.raises(KeyError), spent("step"):
        raise KeyError
    assert list(spent.seconds.items()) == [("step", 2.0 + 7.0), ("data", 4.0)]
    assert spent.elapsed() == 30.0
