"""Letting the channels that stay take over from those that go, before any training.

Whoever reads a removed channel loses what it said. But channels say much the same: a linear map of those that stay
predicts it, in least squares over training images, and the reader's weights take that map in. So a reader computes
nearly what it computed before. Channel pruning (arXiv 1707.06168) and ThiNet (1707.06342) refit a reader as well, one
layer after the other; here all are refitted in closed form after one pass over the images.

Invariant: only weights of readers change, and no shape, so the cut that follows still equals the mask.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.modes import evaluating
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.surgery import removed_channels

RIDGE = 1e-2  # of the mean square of a channel: late layers see few positions, and their channels are nearly dependent
MOST_CHANNELS = 8192  # of a layer, whose products are half a GB; VGG's first linear layer reads three times as many

Moments = Mapping[str, Tensor]


def readers_of(module: nn.Module, groups: Iterable[ChannelGroup]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that read channels of prunable groups and can be refitted, by name; and why others are left alone."""
    names = {m.layer for group in groups if group.prunable for m in group.members if m.kind == "in"}
    readers: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for name, layer in module.named_modules():
        if name not in names:
            continue
        width = layer.in_channels if isinstance(layer, nn.Conv2d) else getattr(layer, "in_features", 0)
        if width > MOST_CHANNELS:
            left_out[name] = f"it reads {width} channels, and reconstruction takes on {MOST_CHANNELS} at most"
        else:
            readers[name] = layer
    return readers, left_out


def reader_moments(module: nn.Module, groups: Iterable[ChannelGroup], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean products of the channels that the readers of the groups are given, over samples and positions.

    Args:
        module: The network; comes back as it was.
        groups: Its groups.
        batches: Inputs (N, C, H, W), at least one.

    Returns:
        Layer name to a float64 matrix (C, C) on the CPU, C the layer's input channels.
    """
    readers, _ = readers_of(module, groups)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(readers, 0)
    hooks = []

    def watch(name: str, layer: nn.Module) -> None:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            channels_last = isinstance(layer, nn.Linear)
            x = inputs[0].detach().movedim(-1 if channels_last else 1, -1).flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = sums.get(name, torch.zeros(())) + (x.T @ x).double().cpu()
            counts[name] += len(x)

        hooks.append(layer.register_forward_pre_hook(note))

    for name, layer in readers.items():
        watch(name, layer)
    try:
        with evaluating(module):
            for images in batches:
                module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def reconstruct(
    module: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]], moments: Moments
) -> None:
    """Refit the weights of readers to the channels that stay, in place; the cut itself is still to be made.

    Filters larger than 1x1 take the map in at each of their positions. No constant is fitted, for padding has none.

    Args:
        module: The network before the cut.
        groups: Its groups.
        keep: Group name to kept decisions; groups not named stay whole.
        moments: From `reader_moments` of the same network.
    """
    for (name, kind), gone in removed_channels(groups, keep).items():
        if kind != "in" or name not in moments:  # absent: see `readers_of`
            continue
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear), "no other layer reads channels by weights that can be cut"
        weight, products = layer.weight, moments[name]
        blocks = layer.groups if isinstance(layer, nn.Conv2d) else 1  # each reads channels of its own
        outs, ins = weight.shape[0] // blocks, weight.shape[1]
        for block in range(blocks):
            first = block * ins
            lost = [i for i in range(ins) if first + i in gone]
            left = [i for i in range(ins) if first + i not in gone]
            if not lost or not left:
                continue
            mine = products[first : first + ins, first : first + ins]
            rows = weight[block * outs : (block + 1) * outs]
            taken_in = torch.einsum("ol...,lk->ok...", rows[:, lost].double().cpu(), _prediction(mine, left, lost))
            rows[:, left] += taken_in.to(rows)


def _prediction(products: Tensor, left: Sequence[int], lost: Sequence[int]) -> Tensor:
    """The map (lost, left) that predicts lost channels from those left with the least squares, ridge included."""
    inner = products[left][:, left]
    ridge = RIDGE * inner.diagonal().mean()
    if not ridge > 0:  # nothing that stays ever says anything
        return torch.zeros(len(lost), len(left), dtype=products.dtype)
    inner = inner + ridge * torch.eye(len(left), dtype=products.dtype)
    prediction: Tensor = torch.linalg.solve(inner, products[left][:, lost])
    return prediction.T
