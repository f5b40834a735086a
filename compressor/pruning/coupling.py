"""Which channels of which layers must be removed together, read off Torch-Pruning's dependency graph.

Invariant: channel numbers refer to the network as traced, and every channel of a layer side is in at most one decision.
The grouping follows DepGraph (arXiv 2301.12900); the walk over the graph is Torch-Pruning's, the partition into
decisions is ours, because Torch-Pruning leaves grouped convolutions and partly coupled layers to its pruner classes.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError

# A layer side: ("block1.rep.1.pointwise", "out"). The empty layer name stands for the network's output.
Side = tuple[str, str]
OUTPUT: Side = ("", "output")
# Kinds whose width changes with a group, besides "in", the readers.
WRITERS = ("out", "norm", "depthwise", "activation")


@dataclass(frozen=True)
class Member:
    """One side of a layer in a channel group.

    Attributes:
        layer: Name of the layer in the network.
        kind: `out` (filters of a convolution or linear layer), `in` (the weights that read the channel), `norm`
            (BatchNorm), `depthwise` (both sides of a depthwise convolution), `activation` (per-channel PReLU).
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
    links = _Links()
    problems: dict[Side, str] = dict(_shared_parameters(module))
    for root, side, pairs, problem in _walk(module, example, links):
        if problem is not None:
            problems[side] = problem
        for root_index, index in pairs:
            links.join((*root, root_index), (*side, index))
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer):
            # Each block of a grouped convolution must keep as many channels as the others: the same relative channel
            # of every block goes as one decision.
            for kind, width in (("in", layer.in_channels), ("out", layer.out_channels)):
                step = width // layer.groups
                for index in range(step, width):
                    links.join((name, kind, index % step), (name, kind, index))
    return _groups(links, [name for name, _ in module.named_modules()], problems)


def _walk(
    module: nn.Module, example: Tensor, links: "_Links"
) -> Iterator[tuple[Side, Side, list[tuple[int, int]], str | None]]:
    """Yield (root side, coupled side, pairs of root and coupled channel, what forbids pruning it)."""
    # Torch-Pruning 1.6.1 switches the module to eval mode, traces through autograd (frozen parameters would be
    # invisible) and keeps references: it gets a copy. The tuple keeps it from unpacking a batch of one as arguments.
    twin = copy.deepcopy(module).requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                twin,
                (torch.randn(example.shape, dtype=example.dtype, device=example.device),),
                unwrapped_parameters=None,
                customized_pruners={},
                ignored_layers=[],
                ignored_params=[],
                # A network that ends in a layer would get no output node (1.6.1); one more operation behind it does.
                output_transform=_tail,
                verbose=False,
            )
    except Exception as error:  # the network is foreign code: whatever it raises means that it cannot be traced
        raise UnsupportedModelError(
            f"{type(module).__name__}: tracing its channels failed with {type(error).__name__}: {error}; pruning needs "
            f"a network whose forward takes one tensor of shape {tuple(example.shape)}"
        ) from error
    names = {layer: name for name, layer in twin.named_modules()}
    for root in twin.modules():
        width = _root_width(root)
        if width is None or root not in graph.module2node:
            continue
        root_side: Side = (names[root], "out")
        if all((*root_side, index) in links.parent for index in range(width)):
            continue  # an earlier root led here; coupling is symmetric
        pruner = graph.get_pruner_of_module(root)
        for item in graph.get_pruning_group(root, pruner.prune_out_channels, list(range(width))):
            layer = item.dep.target.module
            out = item.dep.handler == graph.get_pruner_of_module(layer).prune_out_channels
            side, problem = _side(layer, names.get(layer, ""), out=out)
            if problem is None and max(item.idxs, default=0) >= _side_width(layer, out=out):
                # Torch-Pruning 1.6.1, residual of a concatenation concatenated again. Cutting nothing passes every
                # proof, but a plan's cost would count it.
                problem = f"'{names.get(layer, '')}' was traced to channels that it does not have"
            if side is not None:
                yield root_side, side, list(zip(item.root_idxs, item.idxs, strict=True)), problem


def _tail(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"forward returned a {type(output).__name__}, not one tensor")
    return output * 1


def _root_width(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Conv2d):
        # Torch-Pruning takes any convolution with groups == out_channels for a depthwise one.
        return None if 1 < layer.groups == layer.out_channels else layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else None


def _side_width(layer: object, *, out: bool) -> float:
    """Channels of a layer side; infinite for what has no width of its own."""
    match layer:
        case nn.Conv2d():
            return layer.out_channels if out else layer.in_channels
        case nn.Linear():
            return layer.out_features if out else layer.in_features
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return layer.num_features
    return math.inf


def _side(layer: object, name: str, *, out: bool) -> tuple[Side | None, str | None]:
    """Return the layer side that a step of the graph touches (None: nothing with a width) and what forbids pruning."""
    match layer:
        case nn.Conv2d() if is_depthwise(layer):
            return (name, "depthwise"), None
        case nn.Conv2d() if 1 < layer.groups == layer.out_channels:
            return (name, "depthwise"), f"'{name}' is a grouped convolution with one filter a group and several inputs"
        case nn.Conv2d() | nn.Linear():
            return (name, "out" if out else "in"), None
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return (name, "norm"), None
        case nn.PReLU():
            return ((name, "activation") if layer.num_parameters > 1 else None), None
        case tp.ops._OutputOp():
            return OUTPUT, "its channels are outputs of the network"
        case nn.Parameter():
            return ("", "parameter"), "a parameter outside the standard layers is coupled to it"
        case nn.Module() if name:
            return (name, "other"), f"'{name}' is a {type(layer).__name__}, which cannot be pruned"
    return None, None


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


class _Links:
    """Union-find over channels, each named (layer, kind, index)."""

    def __init__(self) -> None:
        self.parent: dict[tuple[str, str, int], tuple[str, str, int]] = {}

    def find(self, channel: tuple[str, str, int]) -> tuple[str, str, int]:
        parent = self.parent.setdefault(channel, channel)
        while parent != channel:
            grandparent = self.parent[parent]
            self.parent[channel] = grandparent
            channel, parent = parent, grandparent
        return channel

    def join(self, a: tuple[str, str, int], b: tuple[str, str, int]) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a

    def classes(self) -> list[list[tuple[str, str, int]]]:
        found: dict[tuple[str, str, int], list[tuple[str, str, int]]] = {}
        for channel in list(self.parent):
            found.setdefault(self.find(channel), []).append(channel)
        return list(found.values())


def _groups(links: _Links, order: list[str], problems: dict[Side, str]) -> list[ChannelGroup]:
    """Gather decisions that touch the same layer sides into one group, and name it."""
    position = {name: i for i, name in enumerate(order)}
    # Decisions in one group also take equally many channels of each side, so that counts alone give a plan's cost.
    by_sides: dict[tuple[tuple[Side, int], ...], list[dict[Side, list[int]]]] = {}
    writers: dict[str, int] = {}
    for channels in links.classes():
        decision: dict[Side, list[int]] = {}
        for layer, kind, index in channels:
            decision.setdefault((layer, kind), []).append(index)
            writers[layer] = writers.get(layer, 0) + (kind == "out")
        sides = tuple(sorted(decision, key=lambda side: (position.get(side[0], -1), side[1])))
        if any(kind == "out" for _, kind in sides):
            by_sides.setdefault(tuple((side, len(decision[side])) for side in sides), []).append(decision)
    groups = []
    for key, decisions in by_sides.items():
        sides = tuple(side for side, _ in key)
        outs = [layer for layer, kind in sides if kind == "out"]
        covered = {layer: sum(len(decision[layer, "out"]) for decision in decisions) for layer in outs}
        root = next((layer for layer in outs if covered[layer] == writers[layer]), outs[0])
        decisions.sort(key=lambda decision: min(decision[root, "out"]))
        # A root shared by two groups (a concatenation added to one layer) is told apart by its first channel.
        whole = covered[root] == writers[root]
        name = root if whole else f"{root}[{min(decisions[0][root, 'out'])}]"
        reason = next((problems[side] for side in sides if side in problems), None)
        if reason is None and len(decisions) < 2:
            reason = "its channels are one single decision; nothing can be removed"
        members = tuple(
            Member(layer, kind, tuple(tuple(sorted(decision[layer, kind])) for decision in decisions))
            for layer, kind in sides
            if (layer, kind) != OUTPUT and kind not in ("parameter", "other")
        )
        groups.append(ChannelGroup(name, len(decisions), members, reason is None, reason))
    return sorted(groups, key=lambda group: (position[group.name.partition("[")[0]], group.members[0].indices))
