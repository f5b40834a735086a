"""A penalty under which channels that matter little fade before they are removed: group lasso on BatchNorm scales.

Sparse scales come from network slimming (arXiv 1708.06519), their grouping over coupled layers from DepGraph
(arXiv 2301.12900).

Invariant: channels that go together fade together, since one norm spans all their scales.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.slices import weighted_members


def scale_penalty(module: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[Callable[[], Tensor], list[str]]:
    """Sum over groups and decisions of sqrt(n) * ||s||_2, s being the n scales of all BatchNorms that a decision takes.

    Groups without such a BatchNorm are left out: a filter's norm is not comparable with a scale.

    Args:
        module: The network the groups were found in; its scales are read anew at every call.
        groups: From `find_groups`; unprunable ones are passed over.

    Returns:
        A function that gives the penalty, a scalar that gradients flow through (0 at scales of 0), and the names of the
        prunable groups that were left out.

    Raises:
        RecipeError: No prunable group has a BatchNorm with scales.
    """
    chosen: list[list[tuple[nn.Module, Tensor]]] = []
    left_out: list[str] = []
    for group in groups:
        if not group.prunable:
            continue
        # Every decision of a group takes as many channels of a layer side as any other.
        norms = [(layer, torch.tensor(m.indices)) for m, layer in weighted_members(module, group) if m.kind == "norm"]
        if norms:
            chosen.append(norms)
        else:
            left_out.append(group.name)
    if not chosen:
        raise RecipeError(
            "sparsify: found no channel group with BatchNorm scales, which is what fades; leave it out, or leave less "
            "in ignored_scope"
        )

    def penalty() -> Tensor:
        terms = []
        for norms in chosen:
            scales = torch.cat([layer.get_parameter("weight")[indices] for layer, indices in norms], dim=1)
            terms.append(math.sqrt(scales.shape[1]) * torch.linalg.vector_norm(scales, dim=1).sum())  # (decisions, n)
        return torch.stack(terms).sum()

    return penalty, left_out
