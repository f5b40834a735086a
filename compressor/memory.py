"""Resident memory of this process while something runs: maximum and time-weighted mean.

Invariant: the maximum is the kernel's own (`VmHWM`, reset at the start) wherever it can be reset, so no spike between
two samples is lost; and what was freed before the start is not counted, wherever the allocator can give it back.
"""

import ctypes
import gc
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PERIOD_S = 0.05


@dataclass
class MemoryUse:
    """Bytes resident; `floor_bytes` is what was resident at the start. Filled when the measured block ends."""

    floor_bytes: int = 0
    peak_bytes: int = 0
    average_bytes: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list, repr=False)

    def over_time(self, points: int = 120) -> dict[str, list[float]]:
        """The samples at so many moments at most: `seconds` since the first, and the most `bytes` until the next."""
        if not self.samples:
            return {"seconds": [], "bytes": []}
        start, end = self.samples[0][0], self.samples[-1][0]
        most: dict[int, int] = {}
        for moment, size in self.samples:
            place = min(int((moment - start) / max(end - start, 1e-9) * points), points - 1)
            most[place] = max(most.get(place, 0), size)
        return {
            "seconds": [round(place * (end - start) / points, 3) for place in most],
            "bytes": list(most.values()),
        }


def resident_bytes() -> int:
    """Bytes of physical memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def high_water_bytes() -> int | None:
    """The kernel's high-water mark of this process, or None where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_high_water() -> bool:
    """Set the high-water mark to the present use; False where the kernel does not allow it (5 = clear peak RSS)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_freed() -> None:
    """Return to the kernel what was freed and is still resident: glibc keeps it, and it would pass for use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextmanager
def measure_memory() -> Iterator[MemoryUse]:
    """Measure the block's resident memory; read the yielded value after the block."""
    give_back_freed()
    use = MemoryUse(floor_bytes=resident_bytes())
    was_reset = reset_high_water()
    process, done = psutil.Process(), threading.Event()

    def sample() -> None:
        while True:
            use.samples.append((time.perf_counter(), int(process.memory_info().rss)))
            if done.wait(PERIOD_S):
                return

    thread = threading.Thread(target=sample, name="memory-sampler", daemon=True)
    thread.start()
    try:
        yield use
    finally:
        done.set()
        thread.join()
        use.samples.append((time.perf_counter(), resident_bytes()))
        sampled = max(size for _, size in use.samples)
        use.peak_bytes = max(sampled, (high_water_bytes() or 0) if was_reset else 0)
        use.average_bytes = time_weighted_mean(use.samples)


def joined(first: MemoryUse, first_s: float, second: MemoryUse, second_s: float) -> MemoryUse:
    """Two measured blocks of so many seconds as one: the higher peak, the mean by time, the lower floor."""
    return MemoryUse(
        floor_bytes=min(first.floor_bytes, second.floor_bytes),
        peak_bytes=max(first.peak_bytes, second.peak_bytes),
        average_bytes=round(
            (first.average_bytes * first_s + second.average_bytes * second_s) / max(first_s + second_s, 1e-9)
        ),
        samples=[*first.samples, *second.samples],
    )


def time_weighted_mean(samples: list[tuple[float, int]]) -> int:
    """Mean of a step function given as (time, value) pairs; the single value when no time passed."""
    elapsed = samples[-1][0] - samples[0][0]
    if elapsed <= 0:
        return samples[-1][1]
    area = sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in itertools.pairwise(samples))
    return round(area / elapsed)
