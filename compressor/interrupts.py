"""Ctrl-C that is not lost.

A KeyboardInterrupt rises wherever the process happens to be. Under a C function that clears or replaces whatever Python
raises below it (`PyObject_HasAttrString`, the import of numpy into an extension) it vanishes or turns into an ordinary
error; seen with torch, about once in a hundred runs.

Invariant: after the block, both signals are handled as before.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 3.0  # time to clean up in; what is still at work after it has not heard


@contextmanager
def lasting_interrupts(again_s: float = AGAIN_S) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt again and again after Ctrl-C, until the block is left.

    Args:
        again_s: Seconds between one and the next.

    Yields:
        The signals that came: whether an error may be an interrupt in disguise. Outside the main thread, and where
        SIGINT is ignored as in a shell's background job, it stays empty and nothing is changed.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.setitimer(signal.ITIMER_REAL, again_s)
        raise KeyboardInterrupt

    before_alarm = signal.signal(signal.SIGALRM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGALRM, before_alarm)
