"""Ctrl-C that is not lost, and a request to end that is heard as one.

A KeyboardInterrupt rises wherever the process happens to be. Under a C function that clears or replaces whatever Python
raises below it (`PyObject_HasAttrString`, the import of numpy into an extension) it vanishes or turns into an ordinary
error; seen with torch, about once in a hundred runs.

Invariant: after the block, all signals are handled as before.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 3.0  # time to clean up in; what is still at work after it has not heard


@contextmanager
def lasting_interrupts(again_s: float = AGAIN_S) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt again and again after Ctrl-C or SIGTERM, until the block is left.

    Args:
        again_s: Seconds between one and the next.

    Yields:
        The signals that came: whether an error may be an interrupt in disguise. Outside the main thread it stays empty
        and nothing is changed; a signal that is ignored, as SIGINT is in a shell's background job, stays so.
    """
    noted: list[int] = []
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.setitimer(signal.ITIMER_REAL, again_s)
        raise KeyboardInterrupt

    before_alarm = signal.signal(signal.SIGALRM, interrupt)
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield noted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGALRM, before_alarm)
