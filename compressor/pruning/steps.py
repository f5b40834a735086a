"""The removals open to a plan, as one sorted list of steps, and what each prefix of it costs.

Invariant: a group's steps keep their order in the list, and costs fall along it: a target can be searched by halving.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.models.counting import count
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.surgery import kept_cost


@dataclass(frozen=True)
class Step:
    """Shrinking one group from `before` to `after` kept decisions."""

    key: float
    group: str
    before: int
    after: int


def fewest_kept(round_to: int, min_channels: int) -> int:
    """Fewest channels a group may keep: the first multiple of `round_to` that is at least `min_channels`."""
    return -(-min_channels // round_to) * round_to


def steps_of(
    group: ChannelGroup,
    score: Tensor,
    ascending: Sequence[int],
    ranking: str,
    round_to: int,
    min_channels: int,
    full: int | None = None,
) -> list[Step]:
    """Every legal shrinking of a group, gentlest first, each with the key it is sorted by.

    `full` is the width that local ratios refer to, where the group has been shrunk before; its present one by default.

    Keys rise within a group, so that sorting all groups' steps together never puts a step before its predecessor.
    """
    sizes = range((group.channels - 1) // round_to * round_to, fewest_kept(round_to, min_channels) - 1, -round_to)
    values = score.tolist()
    steps: list[Step] = []
    before = group.channels
    for after in sizes:
        if ranking == "local":
            # The ratio from which `after` is nearer to what is asked than `before`.
            key = 1 - (before + after) / 2 / (full or group.channels)
        else:
            chunk = ascending[group.channels - before : group.channels - after]
            key = sum(values[decision] for decision in chunk) / len(chunk)
            key = max(key, steps[-1].key) if steps else key  # rounding must not reorder equal scores
        steps.append(Step(key, group.name, before, after))
        before = after
    return steps


def shortest_prefix(
    module: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    steps: Sequence[Step],
    targets: Mapping[str, int | None],
) -> int:
    """Return the fewest steps that meet every target (`macs` and `params`, in this order; None: no target).

    Raises:
        RecipeError: If all steps together miss a target.
    """
    cost = _cost_of_prefix(module, example, groups, steps)
    full, least = cost(0), cost(len(steps))
    for (unit, target), most, fewest in zip(targets.items(), full, least, strict=True):
        if target is not None and target < fewest:
            raise RecipeError(
                f"prune: a target of {target:,} {unit} cannot be reached; these settings reach from {fewest:,} "
                f"({fewest / most:.3f}x of the network at this point) to {most:,}. A smaller min_channels or round_to, "
                "or less in ignored_scope, reaches further"
            )

    def met(length: int) -> bool:
        return all(t is None or value <= t for t, value in zip(targets.values(), cost(length), strict=True))

    return bisect_left(range(len(steps) + 1), True, key=met)


def _cost_of_prefix(
    module: nn.Module, example: Tensor, groups: Sequence[ChannelGroup], steps: Sequence[Step]
) -> Callable[[int], tuple[int, int]]:
    """Return a function from the number of steps taken to (macs, params)."""
    macs = count(module, example).per_layer
    sizes = {group.name: group.channels for group in groups}
    # Every decision of a group takes as many channels of a layer side as any other, so counts are enough.
    per_decision = {group.name: {(m.layer, m.kind): len(m.indices[0]) for m in group.members} for group in groups}

    def cost(length: int) -> tuple[int, int]:
        removed: dict[tuple[str, str], int] = {}
        for name, after in {step.group: step.after for step in steps[:length]}.items():
            for side, width in per_decision[name].items():
                removed[side] = removed.get(side, 0) + width * (sizes[name] - after)
        return kept_cost(module, macs, removed)

    return cost
