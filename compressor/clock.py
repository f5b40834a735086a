"""Where the time of a run goes: seconds by the name of what they were spent on.

Invariant: what is measured under one name is never inside what is measured under another of the same clock.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds spent under each name.

    Attributes:
        seconds: By name, in the order in which each was first begun.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`, also when it ends in an error."""
        started = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def elapsed(self) -> float:
        """Seconds since this clock was made."""
        return time.perf_counter() - self.started
