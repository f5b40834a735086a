"""Which channels of which layers must be removed together.

Invariant: channel numbers refer to the network as traced, and every channel of a layer side is in at most one decision.
The grouping follows DepGraph (arXiv 2301.12900).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from compressor.pruning.channels import Channels
from compressor.pruning.tracing import trace_channels

# A layer side: ("block1.rep.1.pointwise", "out").
Side = tuple[str, str]
# Kinds whose width changes with a group, besides "in", the readers.
WRITERS = ("out", "norm", "depthwise", "activation")
SIZES = "sizes:"  # begins the kind of a side that is no layer's, but an attribute that counts channels


@dataclass(frozen=True)
class Member:
    """One side of a layer in a channel group.

    Attributes:
        layer: Name of the layer in the network.
        kind: `out` (filters of a convolution or linear layer), `in` (the weights that read the channel), `norm`
            (BatchNorm), `depthwise` (both sides of a depthwise convolution), `activation` (per-channel PReLU),
            `sizes:ATTRIBUTE` (what a container splits at a number, or numbers, that it keeps there).
        indices: For each decision of the group, the channels of this layer side that go with it.
    """

    layer: str
    kind: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels in several layers that can only be removed together.

    Attributes:
        name: The root layer: the first layer all of whose filters belong to the group.
        channels: Number of independent decisions. Equal to the root's filters, except where a grouped convolution
            forces several filters into one decision.
        members: Every layer side that changes, in network order.
        prunable: Whether the group may lose channels at all.
        reason: Why not, when `prunable` is false.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    prunable: bool
    reason: str | None


def is_depthwise(layer: nn.Module) -> bool:
    """Whether the layer maps each channel to itself alone: as many groups as inputs and as outputs."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def couple_channels(module: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """Trace the network and return its channel groups in network order; the network is left untouched.

    Args:
        module: Network whose forward takes one tensor.
        example: Input `(N, C, H, W)`; only its shape matters.

    Returns:
        Groups whose `prunable` reflects structure alone: no member of an unsupported kind, not the network's output.

    Raises:
        UnsupportedModelError: If the network cannot be traced.
    """
    channels = trace_channels(module, example)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer):
            # Each block of a grouped convolution must keep as many channels as the others: the same relative channel
            # of every block goes as one decision.
            for kind, width in (("in", layer.in_channels), ("out", layer.out_channels)):
                numbers = channels.number(name, kind, width).reshape(layer.groups, -1)
                channels.join_all(numbers, numbers[:1].expand_as(numbers))
    return _groups(channels, [name for name, _ in module.named_modules()], dict(_shared_parameters(module)))


def _shared_parameters(module: nn.Module) -> Iterator[tuple[Side, str]]:
    """Yield the sides of layers that share a parameter: cutting one would cut or untie the other."""
    first: dict[int, str] = {}
    # `named_modules` gives a layer that runs twice once: its parameters are not shared in this sense.
    for name, layer in module.named_modules():
        for parameter in layer.parameters(recurse=False):
            owner = first.setdefault(id(parameter), name)
            if owner != name:
                for tied in (owner, name):
                    for kind in ("in", *WRITERS):
                        yield (tied, kind), f"'{owner}' and '{name}' share a parameter"


def _groups(traced: Channels, order: list[str], problems: dict[Side, str]) -> list[ChannelGroup]:
    """Gather decisions that touch the same layer sides into one group, and name it."""
    position = {name: i for i, name in enumerate(order)}
    # Decisions in one group also take equally many channels of each side, so that counts alone give a plan's cost.
    by_sides: dict[tuple[tuple[tuple[Side, int], ...], str | None], list[dict[Side, list[int]]]] = {}
    writers: dict[str, int] = {}
    for channels in traced.classes():
        decision: dict[Side, list[int]] = {}
        reason: str | None = None
        for layer, kind, index in channels:
            if not layer and not kind.startswith(SIZES):
                reason = reason or kind
                continue
            decision.setdefault((layer, kind), []).append(index)
            writers[layer] = writers.get(layer, 0) + (kind == "out")
        sides = tuple(sorted(decision, key=lambda side: (position[side[0]], side[1])))
        if any(kind == "out" for _, kind in sides):
            key = (tuple((side, len(decision[side])) for side in sides), reason)
            by_sides.setdefault(key, []).append(decision)
    groups = []
    for (counted, forbidden), decisions in by_sides.items():
        sides = tuple(side for side, _ in counted)
        outs = [layer for layer, kind in sides if kind == "out"]
        covered = {layer: sum(len(decision[layer, "out"]) for decision in decisions) for layer in outs}
        root = next((layer for layer in outs if covered[layer] == writers[layer]), outs[0])
        decisions.sort(key=lambda decision: min(decision[root, "out"]))
        # A root shared by two groups (a concatenation added to one layer) is told apart by its first channel.
        whole = covered[root] == writers[root]
        name = root if whole else f"{root}[{min(decisions[0][root, 'out'])}]"
        reason = forbidden or next((problems[side] for side in sides if side in problems), None)
        if reason is None and len(decisions) < 2:
            reason = "its channels are one single decision; nothing can be removed"
        members = tuple(
            Member(layer, kind, tuple(tuple(sorted(decision[layer, kind])) for decision in decisions))
            for layer, kind in sides
        )
        groups.append(ChannelGroup(name, len(decisions), members, reason is None, reason))
    return sorted(groups, key=lambda group: (position[group.name.partition("[")[0]], group.members[0].indices))
