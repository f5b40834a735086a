"""Resident memory: a spike is seen, the mean is weighted by time."""

import platform
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.memory import MemoryUse, joined, measure_memory, resident_bytes, time_weighted_mean


def test_short_spike_between_samples_is_in_the_peak() -> None:
    with measure_memory() as use:
        block = np.ones(30_000_000, dtype=np.float64)  # 240 MB
        del block
    assert use.peak_bytes - use.floor_bytes > 200e6


def test_later_measurement_forgets_an_earlier_peak() -> None:
    with measure_memory() as first:
        block = np.ones(30_000_000, dtype=np.float64)
        del block
    with measure_memory() as second:
        time.sleep(0.12)
    assert second.peak_bytes < first.peak_bytes - 150e6
    assert len(second.samples) >= 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked to give memory back")
def test_what_was_freed_before_is_not_counted() -> None:
    blocks = [bytearray(b"1" * 60_000) for _ in range(4000)]  # 240 MB, each below what the allocator maps alone
    last = blocks[-1]  # keeps the heap from shrinking by itself
    before = resident_bytes()
    del blocks
    with measure_memory() as use:
        pass
    assert use.floor_bytes < before - 150e6
    assert len(last) == 60_000


def test_mean_is_weighted_by_time() -> None:
    assert time_weighted_mean([(0.0, 100), (9.0, 100), (10.0, 200)]) == 105
    assert time_weighted_mean([(1.0, 7)]) == 7


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 2**40)), min_size=1, max_size=30))
def test_mean_lies_between_smallest_and_largest(steps: list[tuple[float, int]]) -> None:
    times = np.cumsum([s for s, _ in steps])
    samples = [(float(t), v) for t, (_, v) in zip(times, steps, strict=True)]
    mean = time_weighted_mean(samples)
    values = [v for _, v in samples]
    assert min(values) - 1 <= mean <= max(values) + 1


def test_joined_blocks_weigh_by_time() -> None:
    whole = joined(MemoryUse(10, 300, 100), 9.0, MemoryUse(20, 200, 200), 1.0)
    assert (whole.floor_bytes, whole.peak_bytes, whole.average_bytes) == (10, 300, 110)


def test_error_inside_still_ends_the_sampler() -> None:
    with pytest.raises(RuntimeError, match="boom"), measure_memory() as use:
        raise RuntimeError("boom")
    assert use.peak_bytes > 0
