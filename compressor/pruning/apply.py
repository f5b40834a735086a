"""Doing what a `PrunePlan` decided: cutting channels out of the layers, or masking them.

Invariant: the plan is checked against the network before anything is touched, and both functions give the same outputs.
"""

from torch import Tensor, nn

from compressor.errors import UnsupportedModelError, did_you_mean
from compressor.pruning.coupling import ChannelGroup, couple_channels
from compressor.pruning.oracle import holds, randomised_twin
from compressor.pruning.plan import PrunePlan
from compressor.pruning.surgery import mask, shrink


def apply_plan(module: nn.Module, plan: PrunePlan, example: Tensor) -> None:
    """Cut the channels that the plan does not keep out of the network, in place.

    Args:
        module: The network the plan was decided for, before the edit.
        plan: What to keep.
        example: Input `(N, C, H, W)`; only its shape matters.

    Raises:
        UnsupportedModelError: If the plan does not fit the network: an unknown group, another number of channels, a
            group that must not be pruned, or channels whose removal does not equal masking them.
    """
    groups = _matching(module, plan, example)
    if groups and not holds(*randomised_twin(module, example), groups, plan.keep):
        raise UnsupportedModelError(
            "plan: removing these channels would not give the outputs of the masked network, so nothing is removed; "
            "how its layers share channels cannot be traced, so put those around concatenations in ignored_scope"
        )
    shrink(module, groups, plan.keep)


def mask_plan(module: nn.Module, plan: PrunePlan, example: Tensor) -> None:
    """Make the removed channels invisible by zeroing their readers' weights, in place; no shape changes.

    The reference that `apply_plan` is tested against. Arguments and errors as there.
    """
    mask(module, _matching(module, plan, example), plan.keep)


def _matching(module: nn.Module, plan: PrunePlan, example: Tensor) -> list[ChannelGroup]:
    """Return the plan's groups in this network."""
    if not plan.keep:
        return []
    groups = {group.name: group for group in couple_channels(module, example)}
    for name, kept in plan.keep.items():
        group = groups.get(name)
        if group is None:
            raise UnsupportedModelError(f"plan: the network has no channel group '{name}'{did_you_mean(name, groups)}")
        if not group.prunable:
            raise UnsupportedModelError(f"plan: group '{name}' must not be pruned: {group.reason}")
        if plan.channels.get(name) != group.channels:
            raise UnsupportedModelError(
                f"plan: group '{name}' has {group.channels} channels here, the plan was made for "
                f"{plan.channels.get(name)}; plans refer to the network before the edit"
            )
        wrong = [index for index in kept if not 0 <= index < group.channels]
        if wrong or not kept:
            raise UnsupportedModelError(
                f"plan: group '{name}' keeps {wrong or 'nothing'} of channels 0..{group.channels - 1}"
            )
    return [groups[name] for name in plan.keep]
