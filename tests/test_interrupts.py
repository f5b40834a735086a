"""Ctrl-C ends the work even where something below Python clears the KeyboardInterrupt or makes another error of it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from compressor.interrupts import lasting_interrupts


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """SIGINT as in a terminal, and both signals as they were at the end of the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# All that is interrupted runs in a process of its own. An interrupt between two waits, on a busy machine, would end the
# tests; and OpenVINO has a handler of its own, which ends the process where Cores of other tests overlapped.
SWALLOWING = """
import os, signal, time
from contextlib import suppress
from compressor.interrupts import lasting_interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
with lasting_interrupts(0.5) as noted:
    for swallowed in range(3):
        with suppress(KeyboardInterrupt):
            if not swallowed:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            print("nothing was raised")
print(noted == [signal.SIGINT, signal.SIGALRM, signal.SIGALRM])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print(signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0))  # nothing rises after the block
"""


def test_an_interrupt_that_is_swallowed_comes_again_and_again() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


DISGUISED = """
import dataclasses, os, signal, sys, time
from compressor import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def disguised(args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise ImportError("numpy._core.multiarray failed to import") from None
cli.COMMANDS["schema"] = dataclasses.replace(cli.COMMANDS["schema"], run=disguised)
sys.exit(cli.main(["schema"]))
"""


def test_an_interrupt_that_calls_itself_an_import_error_is_one() -> None:
    done = subprocess.run([sys.executable, "-c", DISGUISED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "compressor: interrupted\n")


def test_ignored_interrupts_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with lasting_interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
    assert noted == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_change_nothing() -> None:
    noted: list[list[int]] = []

    def work() -> None:
        with lasting_interrupts() as signals:
            noted.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [[]]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Two networks compiled one after the other, the older gone first.
OVERLAPPING = """
import gc, os, signal, sys, time
from compressor.preprocess import InputSpec, make_resizer
signal.signal(signal.SIGINT, signal.default_int_handler)
first = make_resizer(InputSpec(24, 32))
second = make_resizer(InputSpec(24, 32))
del first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_does_not_crash_where_openvino_has_been() -> None:
    done = subprocess.run([sys.executable, "-c", OVERLAPPING], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
