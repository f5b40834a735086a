"""The process's one OpenVINO Core.

The CPU plugin of every Core installs a stack for signal handlers and frees it with the Core, but puts the stack of the
Core before it back even if that one is gone already (openvino 2026.4, Linux). So where two Cores overlap and the older
goes first, the next Ctrl-C ends in a segmentation fault; `ov.compile_model` makes a Core at each call.

Invariant: needs only openvino.
"""

import functools

import openvino as ov


@functools.cache
def core() -> ov.Core:
    """The Core everything here reads and compiles with; it lives as long as the process."""
    return ov.Core()
