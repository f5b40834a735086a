"""What each channel group costs: its part of what the layers cost whose filters belong to it.

Invariant: nothing is counted twice, so that the groups' parts and the rest add up to the network.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import nn

from compressor.pruning.coupling import WRITERS, ChannelGroup
from compressor.pruning.slices import weighted_members

Shares = Mapping[str, Mapping[str, Fraction]]


def shares_of_layers(module: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, dict[str, Fraction]]:
    """Which part of each layer's filters, or scales, goes with which group.

    A layer counts for the group that its outputs belong to, not for those that it reads; of one whose outputs belong to
    several groups each has as much as it has channels.

    Returns:
        Layer name to group name to a part of 1.
    """
    shares: dict[str, dict[str, Fraction]] = {}
    for group in groups:
        for member, layer in weighted_members(module, group):
            if member.kind in WRITERS:
                channels = sum(len(indices) for indices in member.indices)
                own = shares.setdefault(member.layer, {})
                own[group.name] = Fraction(channels, len(layer.get_parameter("weight"))) + own.get(group.name, 0)
    return shares


def params_of_layers(module: nn.Module) -> dict[str, int]:
    """Elements of each layer's own parameters; one that layers share counts for the first."""
    params: dict[str, int] = {}
    for name, value in module.named_parameters():
        layer = name.rpartition(".")[0]
        params[layer] = params.get(layer, 0) + value.numel()
    return params


def part_of(group: str, amounts: Mapping[str, float], shares: Shares) -> float:
    """A group's part of what each layer costs; of whole numbers a whole number, for layers cost by the filter."""
    part = sum(amount * shares.get(layer, {}).get(group, Fraction(0)) for layer, amount in amounts.items())
    return int(part) if isinstance(part, Fraction) else float(part)
