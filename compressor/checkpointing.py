"""Activation checkpointing: blocks remember their input only, and are computed again in the backward pass.

Method: Chen et al. 2016, arXiv 1604.06174.

Invariant: outputs, gradients and BatchNorm statistics are those of training without it, up to rounding; after the block
every module is called as before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from compressor.modes import evaluating
from compressor.small_maps import SmallMaps

WEIGHTY = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def blocks_of(module: nn.Module) -> list[str]:
    """Names of the blocks that are worth computing twice: the outermost modules, containers aside, with two layers.

    Blocks of one layer would have to remember as much as they forget.
    """
    found: list[str] = []

    def look(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            where = f"{path}{name}"
            if _is_container(child):
                look(child, f"{where}.")
            elif sum(isinstance(layer, WEIGHTY) for layer in child.modules()) > 1:
                found.append(where)

    look(module, "")
    return found


def _is_container(module: nn.Module) -> bool:
    """Whether a module only holds others: it has no forward of its own."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return type(module).forward is nn.Module.forward
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


@contextmanager
def checkpointed(module: nn.Module, example: Tensor) -> Iterator[list[str]]:
    """Checkpoint the blocks of a network for as long as the block runs; yields their names.

    Forward passes must run under `inference.arithmetic`, as the second ones do.

    Those that change their input in place are left as they are, for what they remember would not be what they were
    given. `example` is an input (N, C, H, W), on the network's device, that shows which do.
    """
    spoiling = _changing_their_input(module, blocks_of(module), example)
    names = [name for name in blocks_of(module) if name not in spoiling]
    with ExitStack() as undo:
        for name in names:
            block = module.get_submodule(name)
            block.forward = partial(_forward, block, block.forward)
            undo.callback(block.__dict__.pop, "forward")
        yield names


def _changing_their_input(module: nn.Module, names: Sequence[str], example: Tensor) -> set[str]:
    versions: dict[str, list[int]] = {}
    spoiling: set[str] = set()

    def before(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        versions[name] = [value._version for value in inputs if isinstance(value, Tensor)]

    def after(name: str, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        if versions[name] != [value._version for value in inputs if isinstance(value, Tensor)]:
            spoiling.add(name)

    with ExitStack() as hooks, evaluating(module), torch.no_grad():
        for name in names:
            block = module.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(partial(before, name)).remove)
            hooks.callback(block.register_forward_hook(partial(after, name)).remove)
        module(example)
    return spoiling


def _forward(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What a checkpointed block does when it is called."""
    if not block.training:
        return forward(*inputs, **options)
    device = next((value.device.type for value in inputs if isinstance(value, Tensor)), "cpu")
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _computing_again(block, device)),
        **options,
    )


@contextmanager
def _computing_again(block: nn.Module, device: str) -> Iterator[None]:
    """The second forward pass: convolutions as in the first, statistics of BatchNorm left alone."""
    norms = [norm for norm in block.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    kept = [(norm.momentum, None if (n := norm.num_batches_tracked) is None else n.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running = 1 x running + 0 x batch
    try:
        with SmallMaps() if device == "cpu" else nullcontext():
            yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
