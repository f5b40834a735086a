"""Finding the channel groups of a network and proving that they can be pruned.

Invariant: a group is `prunable` only if removing channels of it really gave the outputs of the masked network, on a
copy with random weights. Whatever the tracer misunderstood is thereby refused with a reason instead of pruned wrongly.
"""

import copy
import fnmatch
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, did_you_mean
from compressor.pruning.coupling import WRITERS, ChannelGroup, Member, couple_channels
from compressor.pruning.surgery import mask, shrink

__all__ = ["ChannelGroup", "Member", "find_groups", "resolve_scope"]

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-3  # of the output range, in float32; a wrongly cut channel changes the output by about the range itself


def find_groups(module: nn.Module, example: Tensor, *, ignored: Collection[str]) -> list[ChannelGroup]:
    """Return all channel groups in network order; the network is left untouched.

    Args:
        module: Network whose forward takes one tensor and returns one tensor.
        example: Input `(N, C, H, W)` at the size the network is used at.
        ignored: Layer names, as from `resolve_scope`, whose own filters must stay. They may still read fewer channels:
            with the classifier ignored, the layer before it can be pruned.

    Raises:
        UnsupportedModelError: If the network cannot be traced.
    """
    groups = [_apply_ignored(group, ignored) for group in couple_channels(module, example)]
    proven = _prove(module, example, [group for group in groups if group.prunable])
    return [
        group
        if not group.prunable or group.name in proven
        else replace(
            group,
            prunable=False,
            reason="removing its channels does not give the output of the masked network: something between its layers "
            "mixes or reorders channels in a way that cannot be traced",
        )
        for group in groups
    ]


def resolve_scope(module: nn.Module, globs: Iterable[str], *, where: str) -> set[str]:
    """Return the names of all modules that match a glob, and of everything inside them.

    Args:
        module: The network.
        globs: Shell-style patterns over module names (`block[4-9].*`, `head`).
        where: Recipe path of the list, for messages (`stages[0].ignored_scope`).

    Raises:
        RecipeError: If a glob matches no module; names the nearest one.
    """
    names = [name for name, _ in module.named_modules() if name]
    found: set[str] = set()
    for position, glob in enumerate(globs):
        matches = fnmatch.filter(names, glob)
        if not matches:
            raise RecipeError(f"{where}[{position}]: '{glob}' matches no module{did_you_mean(glob, names)}")
        for match in matches:
            found.update(name for name in names if name == match or name.startswith(f"{match}."))
    return found


def _apply_ignored(group: ChannelGroup, ignored: Collection[str]) -> ChannelGroup:
    held = next((m.layer for m in group.members if m.kind in WRITERS and m.layer in ignored), None)
    if held is None or not group.prunable:
        return group
    return replace(group, prunable=False, reason=f"'{held}' is in ignored_scope")


def _prove(module: nn.Module, example: Tensor, groups: Sequence[ChannelGroup]) -> set[str]:
    """Return the names of those groups whose channels can be removed, alone and together."""
    if not groups:
        return set()
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).eval()
    _randomise(twin, generator)
    x = torch.randn(example.shape, generator=generator).to(example)
    keep = {
        group.name: sorted(torch.randperm(group.channels, generator=generator)[: (group.channels + 1) // 2].tolist())
        for group in groups
    }
    if _holds(twin, x, groups, keep):
        return set(keep)
    proven: list[ChannelGroup] = []
    for group in groups:
        if _holds(twin, x, [*proven, group], keep):
            proven.append(group)
        else:
            _log.warning("%s: channels cannot be traced through the network; the group is not pruned", group.name)
    return {group.name for group in proven}


def _holds(twin: nn.Module, x: Tensor, groups: Sequence[ChannelGroup], keep: dict[str, list[int]]) -> bool:
    """Whether cutting and masking the same channels give the same output."""
    chosen = {group.name: keep[group.name] for group in groups}
    masked, cut = copy.deepcopy(twin), copy.deepcopy(twin)
    with torch.no_grad():
        mask(masked, groups, chosen)
        expected = masked(x)
        del masked
        try:
            shrink(cut, groups, chosen)
            output = cut(x)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # shapes that no longer fit
            return False
    if output.shape != expected.shape or output.dtype != expected.dtype or not bool(expected.isfinite().all()):
        return False
    scale = float(expected.abs().max())
    return float((output - expected).abs().max()) <= _TOLERANCE * max(scale, 1e-12)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill weights and statistics with values under which every channel matters.

    Pretrained or fresh weights may hide a fault: a BatchNorm scale of zero makes a whole branch invisible.
    """

    def fill(tensor: Tensor | None, mean: float, spread: float) -> None:
        if tensor is not None:
            tensor.copy_(mean + spread * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                fill(layer.weight, 1, 0.5)
                fill(layer.bias, 0, 0.5)
                fill(layer.running_mean, 0, 0.2)
                fill(layer.running_var, 1, 0.5)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                fill(layer.weight, 0, (6 / fan_in) ** 0.5)  # He's uniform initialisation keeps the signal's size
                fill(layer.bias, 0, 0.2)
