"""Finding the channel groups of a network and proving that they can be pruned.

Invariant: a group is `prunable` only if removing channels of it really gave the outputs of the masked network, on a
copy with random weights. Whatever the tracer misunderstood is thereby refused with a reason instead of pruned wrongly.
"""

import fnmatch
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, did_you_mean
from compressor.pruning.coupling import WRITERS, ChannelGroup, Member, couple_channels
from compressor.pruning.oracle import holds, randomised_twin
from compressor.pruning.roles import PREFIX, find_roles

__all__ = ["ChannelGroup", "Member", "find_groups", "resolve_scope"]

_log = logging.getLogger(__name__)


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


def resolve_scope(module: nn.Module, globs: Iterable[str], *, where: str, example: Tensor | None = None) -> set[str]:
    """Return the names of all modules that match a glob or have a role, and of everything inside them.

    Entries that begin with `role:` are looked up by `find_roles`, which needs an example input.

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
        if glob.startswith(PREFIX):
            found |= _with_role(module, glob, f"{where}[{position}]", example)
            continue
        matches = fnmatch.filter(names, glob)
        if not matches:
            raise RecipeError(f"{where}[{position}]: '{glob}' matches no module{did_you_mean(glob, names)}")
        for match in matches:
            found.update(name for name in names if name == match or name.startswith(f"{match}."))
    return found


def _with_role(module: nn.Module, entry: str, where: str, example: Tensor | None) -> set[str]:
    assert example is not None, "roles are read off a pass of the network, which needs an input"
    roles = find_roles(module, example)
    if entry.removeprefix(PREFIX) not in roles:
        known = [PREFIX + role for role in sorted(roles)]
        near = did_you_mean(entry, known)
        raise RecipeError(f"{where}: no layer has '{entry}'; this network has {', '.join(known)}{near}")
    return roles[entry.removeprefix(PREFIX)]


def _apply_ignored(group: ChannelGroup, ignored: Collection[str]) -> ChannelGroup:
    held = next((m.layer for m in group.members if m.kind in WRITERS and m.layer in ignored), None)
    if held is None or not group.prunable:
        return group
    return replace(group, prunable=False, reason=f"'{held}' is in ignored_scope")


def _prove(module: nn.Module, example: Tensor, groups: Sequence[ChannelGroup]) -> set[str]:
    """Return the names of those groups whose channels can be removed, in every pattern tried.

    Where not all hold together, halves are tried, each beside what was proven before it: a few bad groups among many
    take a few trials each.
    """
    twin, x = randomised_twin(module, example)
    patterns = _patterns(groups)

    def provable(asked: Sequence[ChannelGroup], proven: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        if all(holds(twin, x, [*proven, *asked], keep) for keep in patterns):
            return list(asked)
        if len(asked) == 1:
            _log.warning("%s: channels cannot be traced through the network; the group is not pruned", asked[0].name)
            return []
        half = len(asked) // 2
        first = provable(asked[:half], proven)
        return first + provable(asked[half:], [*proven, *first])

    return {group.name for group in (provable(groups, []) if groups else [])}


def _patterns(groups: Sequence[ChannelGroup]) -> list[dict[str, list[int]]]:
    """What to keep of each group in each trial: half of all at once, then half of those whose index has bit k set.

    Any two groups differ in some bit, so in some trial one is cut and the other is not: two groups that the tracer took
    for independent, and that are not, are found out however equal their sizes are.
    """
    generator = torch.Generator().manual_seed(0)

    def half(group: ChannelGroup) -> list[int]:
        return sorted(torch.randperm(group.channels, generator=generator)[: (group.channels + 1) // 2].tolist())

    everyone = range(len(groups))
    bits = range(max(len(groups) - 1, 0).bit_length())
    trials = [set(everyone), *({i for i in everyone if i >> bit & 1} for bit in bits)]
    return [
        {group.name: half(group) if i in cut else list(range(group.channels)) for i, group in enumerate(groups)}
        for cut in trials
    ]
