"""Removing or masking channels of single layers, given the decisions of their groups.

Invariant: `shrink` and `mask` take the same decisions and give networks with equal outputs. This is the oracle of the
whole package, and `groups.find_groups` runs it before it calls a group prunable.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.pruning.coupling import SIZES, ChannelGroup, is_depthwise
from compressor.pruning.trace_layers import NORMS


def removed_channels(
    groups: Iterable[ChannelGroup], keep: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], set[int]]:
    """Translate kept decisions into the channels that each layer side loses.

    Args:
        groups: Groups of the network as it is.
        keep: Group name to kept decisions; groups not named stay whole.

    Returns:
        (layer, kind) to channel numbers; sides that lose nothing are absent.
    """
    removed: dict[tuple[str, str], set[int]] = {}
    for group in groups:
        if group.name not in keep:
            continue
        kept = set(keep[group.name])
        gone = [decision for decision in range(group.channels) if decision not in kept]
        for member in group.members:
            side = removed.setdefault((member.layer, member.kind), set())
            side.update(index for decision in gone for index in member.indices[decision])
    return {side: indices for side, indices in removed.items() if indices}


def shrink(module: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> None:
    """Cut the channels that are not kept out of every layer of their group, in place."""
    before = {name: _widths(layer) for name, layer in module.named_modules()}
    done: set[tuple[str, str]] = set()  # attributes that follow the channels and are not to be guessed at again
    for (name, kind), gone in removed_channels(groups, keep).items():
        layer = module.get_submodule(name)
        if kind.startswith(SIZES):
            _shrink_sizes(layer, kind.removeprefix(SIZES), gone)
            done.add((name, kind.removeprefix(SIZES)))
            continue
        match layer, kind:
            case nn.Conv2d() | nn.Linear(), "out":
                _shrink_out(layer, gone)
            case nn.Conv2d(), "in":
                # In a grouped convolution every block loses the same relative channels; the first block tells which.
                block = layer.in_channels // layer.groups
                _select(layer, "weight", 1, _rest(block, gone))
                layer.in_channels -= len(gone)
            case nn.Linear(), "in":
                _select(layer, "weight", 1, _rest(layer.in_features, gone))
                layer.in_features -= len(gone)
            case nn.Conv2d(), "depthwise":
                _shrink_out(layer, gone)
                layer.in_channels = layer.groups = layer.out_channels
            case ((nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d()), "norm"):
                rest = _rest(layer.num_features, gone)
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    _select(layer, tensor, 0, rest)
                layer.num_features = len(rest)
            case nn.PReLU(), "activation":
                rest = _rest(layer.num_parameters, gone)
                _select(layer, "weight", 0, rest)
                layer.num_parameters = len(rest)
            case _:
                raise AssertionError(f"{name}: a {type(layer).__name__} cannot be the {kind} of a channel group")
    _refresh_attributes(module, before, done)


def mask(module: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> None:
    """Zero the weights with which layers read the channels that are not kept, in place; no shape changes.

    Only readers are touched: a removed channel may go on being computed, but nothing downstream can see it.
    """
    with torch.no_grad():
        for (name, kind), gone in removed_channels(groups, keep).items():
            layer = module.get_submodule(name)
            if kind != "in":
                continue
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                layer.weight[:, sorted(gone)] = 0
            elif isinstance(layer, nn.Conv2d):
                block_in, block_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
                for index in gone:
                    block = index // block_in
                    layer.weight[block * block_out : (block + 1) * block_out, index % block_in] = 0


def _rest(width: int, gone: set[int]) -> list[int]:
    return [index for index in range(width) if index not in gone]


def _shrink_sizes(container: nn.Module, attribute: str, gone: set[int]) -> None:
    """Put right the number, or numbers, at which a container splits an axis that has lost channels."""
    kept = getattr(container, attribute)
    if isinstance(kept, int):
        setattr(container, attribute, kept - len(gone))
        return
    ends = list(itertools.accumulate(kept))
    sizes = [size - sum(end - size <= index < end for index in gone) for size, end in zip(kept, ends, strict=True)]
    setattr(container, attribute, type(kept)(sizes))


def _shrink_out(layer: nn.Conv2d | nn.Linear, gone: set[int]) -> None:
    rest = _rest(layer.weight.shape[0], gone)
    _select(layer, "weight", 0, rest)
    _select(layer, "bias", 0, rest)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(rest)
    else:
        layer.out_channels = len(rest)


def _select(layer: nn.Module, name: str, dim: int, rest: list[int]) -> None:
    """Replace a parameter or buffer by its slices `rest`, keeping dtype, device, memory format and requires_grad."""
    old = getattr(layer, name)
    if old is None:
        return
    new = old.detach().index_select(dim, torch.tensor(rest, device=old.device))
    if new.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(layer, name, new)


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a layer; None for containers and layers without a width."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, NORMS):
        return layer.num_features, layer.num_features
    return None


# Attributes in which containers repeat a width of a layer inside, and which side of which layer it is.
_REPEATED = {"in_channels": (0, 0), "in_chs": (0, 0), "out_channels": (-1, 1), "out_chs": (-1, 1)}
_FEATURES = ("num_features", "head_hidden_size")


def _refresh_attributes(
    module: nn.Module, before: Mapping[str, tuple[int, int] | None], done: Collection[tuple[str, str]]
) -> None:
    """Put right the widths that containers repeat (`num_features` of a network, `out_channels` of a block).

    An attribute is changed only if it held the old width of the layer that it describes: the first or last one inside
    the container, or for a network's feature count the input of its last linear layer.
    """
    for prefix, container in module.named_modules():
        if before.get(prefix) is not None:
            continue
        inner = [
            (old, new)
            for name, layer in container.named_modules(prefix=prefix)
            if (old := before.get(name)) is not None and (new := _widths(layer)) is not None
        ]
        linears = [name for name, layer in container.named_modules(prefix=prefix) if isinstance(layer, nn.Linear)]
        if not inner:
            continue
        for attribute, (which, side) in _REPEATED.items():
            if (prefix, attribute) not in done:
                _refresh(container, attribute, inner[which][0][side], inner[which][1][side])
        if linears and (old_head := before[linears[-1]]) is not None:
            head = module.get_submodule(linears[-1])
            assert isinstance(head, nn.Linear)
            for attribute in _FEATURES:
                _refresh(container, attribute, old_head[0], head.in_features)


def _refresh(container: nn.Module, attribute: str, old: int, new: int) -> None:
    value = getattr(container, attribute, None)
    if isinstance(value, int) and value == old != new:
        setattr(container, attribute, new)


def kept_cost(module: nn.Module, macs: Mapping[str, int], removed: Mapping[tuple[str, str], int]) -> tuple[int, int]:
    """MACs and parameters that the network would have without the removed channels, from arithmetic alone.

    Args:
        module: The network before the edit.
        macs: MACs of one sample per layer of that network.
        removed: (layer, kind) to the number of channels that this side loses.

    Returns:
        (macs, params): exactly what counting the really pruned network gives.
    """
    total_macs = sum(macs.values())
    total_params = sum(parameter.numel() for parameter in module.parameters())
    for name in {layer for layer, _ in removed}:
        layer = module.get_submodule(name)
        if (width := _widths(layer)) is None or isinstance(layer, NORMS):
            gone = removed.get((name, "norm"), 0) + removed.get((name, "activation"), 0)
            total_params -= gone * sum(1 for parameter in layer.parameters())
            continue
        weight: Tensor = layer.weight  # type: ignore[assignment]
        (old_in, old_out), (new_in, new_out) = width, kept_width(layer, name, removed)
        pairs = (old_out, new_out) if is_depthwise(layer) else (old_in * old_out, new_in * new_out)
        # Both weights and MACs are proportional to (inputs x outputs); the divisions leave no remainder.
        total_params -= weight.numel() - weight.numel() * pairs[1] // pairs[0]
        total_params -= old_out - new_out if layer.bias is not None else 0
        total_macs -= macs.get(name, 0) - macs.get(name, 0) * pairs[1] // pairs[0]
    return total_macs, total_params


def kept_width(layer: nn.Module, name: str, removed: Mapping[tuple[str, str], int]) -> tuple[int, int]:
    """Channels in and out of a convolution or linear layer without the removed ones; `removed` as in `kept_cost`."""
    width = _widths(layer)
    assert width is not None
    if is_depthwise(layer):
        left = width[1] - removed.get((name, "depthwise"), 0)
        return left, left
    return width[0] - removed.get((name, "in"), 0), width[1] - removed.get((name, "out"), 0)


def kept_widths(module: nn.Module, removed: Mapping[tuple[str, str], int]) -> dict[str, tuple[int, int]]:
    """`kept_width` of every convolution and linear layer."""
    return {
        name: kept_width(layer, name, removed)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
