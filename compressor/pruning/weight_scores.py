"""Importances read off the weights alone.

Each takes the network and a group and returns float64 scores `(channels,)`, low ones to be removed first. Layers of a
group are brought to the same mean before they are added, so that a BatchNorm scale near 1 and a filter of a thousand
small weights weigh the same; over the whole group as in DepGraph (arXiv 2301.12900).
"""

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.slices import by_mean, per_decision, rows_of, stacked, weighted_members


def magnitude(module: nn.Module, group: ChannelGroup) -> Tensor:
    """L2 norm of what a decision removes, arXiv 1608.08710."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member, layer in weighted_members(module, group):
        # Biases and BatchNorm shifts are left out: a large one puts a channel far from zero, it does not make it vary.
        rows = rows_of(layer, member, layer.get_parameter("weight").detach().double())
        total += by_mean(per_decision(rows.reshape(len(rows), -1).square().sum(1), member).sqrt())
    return total / len(group.members)


def bn_scale(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Size of the group's BatchNorm scales, arXiv 1708.06519.

    Raises:
        RecipeError: The group has no BatchNorm with scales.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    norms = [(member, layer) for member, layer in weighted_members(module, group) if member.kind == "norm"]
    if not norms:
        raise RecipeError(
            f"importance: 'bn_scale' needs BatchNorm scales, and group {group.name} has none; choose 'magnitude', or "
            "put the group into ignored_scope"
        )
    for member, layer in norms:
        total += per_decision(layer.get_parameter("weight").detach().double().abs(), member)
    return total / len(norms)


def fpgm(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of distances to the group's other channels: what lies in the middle can be replaced, arXiv 1811.00250."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member, layer in weighted_members(module, group):
        rows = rows_of(layer, member, layer.get_parameter("weight").detach().double().cpu())
        vectors = stacked(rows, member.indices)
        # Without the shortcut through a matrix product: near-equal filters are what this score is about.
        distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        total += by_mean(distances.sum(1))
    return total / len(group.members)


def lamp(module: nn.Module, group: ChannelGroup) -> Tensor:
    """Squared magnitude over that of all channels at least as large, arXiv 2010.07611.

    The largest channel of every group scores 1, so that a global ranking never empties one.
    """
    squares = magnitude(module, group).square()
    order = squares.argsort(stable=True)
    remaining = squares[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(remaining > 0, squares[order] / remaining, torch.ones_like(remaining))
    return scores
