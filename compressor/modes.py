"""Evaluation mode for a block of code.

Invariant: every module comes back in the mode it was in, frozen parts of a network in training too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode, without gradients while the block runs."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield module
    finally:
        for child, training in modes:
            child.training = training
