"""The parts of a layer that belong to each decision of a channel group.

Invariant: every value of a layer side that goes with a decision is counted for that decision, and for no other.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from compressor.pruning.coupling import SIZES, ChannelGroup, Member


def weighted_members(module: nn.Module, group: ChannelGroup) -> Iterator[tuple[Member, nn.Module]]:
    """The sides of a group whose layer has weights: neither attributes nor BatchNorm without affine parameters."""
    for member in group.members:
        if not member.kind.startswith(SIZES):
            layer = module.get_submodule(member.layer)
            if isinstance(getattr(layer, "weight", None), Tensor):
                yield member, layer


def rows_of(layer: nn.Module, member: Member, values: Tensor) -> Tensor:
    """Values shaped like a layer's `weight`, arranged by this side's channels: `(C, ...)`."""
    if member.kind != "in":
        return values
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        # Block b of the filters reads block b of the channels: (G, out/G, in/G, k, k) -> (G * in/G, out/G, k, k).
        blocks = values.reshape(layer.groups, -1, *values.shape[1:]).transpose(1, 2)
        return blocks.flatten(0, 1)
    return values.transpose(0, 1)


def has_bias_rows(member: Member) -> bool:
    """Whether a layer's `bias` has an entry for each channel of this side: what reads channels has none for them."""
    return member.kind != "in"


def per_decision(values: Tensor, member: Member) -> Tensor:
    """Sum `(C,)` values of a layer side over the channels of each decision."""
    lengths = torch.tensor([len(indices) for indices in member.indices])
    flat = torch.tensor([index for indices in member.indices for index in indices])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=values.dtype).index_add_(0, owner, values.cpu()[flat])


def stacked(rows: Tensor, indices: Sequence[Sequence[int]]) -> Tensor:
    """The rows of each decision in one vector, `(decisions, longest)`; shorter ones end in zeros."""
    parts = [rows[list(chosen)].flatten() for chosen in indices]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def by_mean(score: Tensor) -> Tensor:
    """Scores over their mean; all one where they are all zero."""
    mean = score.mean()
    return score / mean if mean > 0 else torch.ones_like(score)
