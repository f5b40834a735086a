"""Open an address on the internet, or fail soon and clearly.

Invariant: only https, and only when a person or a recipe asked for a download by name.
"""

import queue
import threading
import urllib.request
from typing import Any

CONNECT_S = 9.0  # an offline machine is told within 10 s
STALL_S = 60.0


def open_url(url: str, *, connect_s: float | None = None) -> Any:
    """Open `url`; the answer is a file-like context manager.

    In a thread, because looking up a host name takes no time limit and can hang for half a minute without a network.

    Args:
        url: an https address.
        connect_s: seconds until an answer must have begun, default `CONNECT_S`; later pauses may last `STALL_S`.

    Raises:
        OSError: no answer in time, or none that is the file.
    """
    if not url.startswith("https://"):
        raise OSError("only https is used")
    limit = CONNECT_S if connect_s is None else connect_s
    answers: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "compressor"})  # noqa: S310 - https, checked above
        try:
            answers.put(urllib.request.urlopen(request, timeout=STALL_S))  # noqa: S310
        except Exception as error:  # handed to the caller's thread
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=limit)
    except queue.Empty:
        raise TimeoutError(f"no answer within {limit:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer if isinstance(answer, OSError) else OSError(str(answer))
    return answer
