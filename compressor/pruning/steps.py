"""The removals open to a plan, as one sorted list of steps, and what each prefix of it costs.

Invariant: a group's steps keep their order in the list, and costs fall along it: a target can be searched by halving.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.latency_model import LatencyModel
from compressor.models.counting import count
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.surgery import kept_cost, kept_width, kept_widths

_TOGETHER = 8  # steps of one group that are looked ahead


@dataclass(frozen=True)
class Step:
    """Shrinking one group from `before` to `after` kept decisions."""

    key: float
    group: str
    before: int
    after: int


@dataclass(frozen=True)
class Kept:
    """What is left of a network, from which its costs are predicted.

    Attributes:
        macs: Multiply-accumulates for one sample.
        params: Parameters.
        widths: Channels in and out of every convolution and linear layer.
    """

    macs: int
    params: int
    widths: Mapping[str, tuple[int, int]]


Predictor: TypeAlias = Callable[[Kept], float]  # must not rise when a channel goes
EXACT: Mapping[str, Predictor] = {"macs": lambda kept: kept.macs, "params": lambda kept: kept.params}


def kept_of(module: nn.Module, example: Tensor) -> Kept:
    """All of a network as it is; `example` is an input for which MACs are counted."""
    counts = count(module, example)
    return Kept(counts.macs, counts.params, kept_widths(module, {}))


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


def most_saved_first(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    steps: Mapping[str, Sequence[Step]],
    scores: Mapping[str, Tensor],
    ascending: Mapping[str, Sequence[int]],
    model: LatencyModel,
) -> list[Step]:
    """Put all steps into one order: least importance lost per time saved first.

    What a step saves depends on how wide the layers' other sides still are, so it is asked again after every step that
    touches them. Where the processor works in lanes, one step alone may save nothing: steps of a group are taken
    together, up to as many as pay best.

    Args:
        module: The network.
        groups: Its groups.
        steps: Each group's steps in order, by its name.
        scores: By group.
        ascending: Each group's decisions, least important first.
        model: Predicts each layer's time.

    Returns:
        Every step; a group's in their order. The keys are the prices, importance per time, at which they were taken.
    """
    sides = {group.name: {(m.layer, m.kind): len(m.indices[0]) for m in group.members} for group in groups}
    layers = {name: {layer for layer, kind in sides[name] if kind in ("in", "out", "depthwise")} for name in steps}
    modules = {layer: module.get_submodule(layer) for some in layers.values() for layer in some}
    sizes = {group.name: group.channels for group in groups}
    lost = {name: [0.0, *itertools.accumulate(scores[name][list(ascending[name])].tolist())] for name in steps}
    removed: dict[tuple[str, str], int] = {}
    taken = dict.fromkeys(steps, 0)

    def time_without(name: str, more: int) -> float:
        """Time of the layers of a group that has lost `more` decisions beside what is gone."""
        gone = {side: removed.get(side, 0) + width * more for side, width in sides[name].items()}
        there = {**removed, **gone}
        return sum(model.of_layer(layer, *kept_width(modules[layer], layer, there)) for layer in layers[name])

    def best_chunk(name: str) -> tuple[float, int]:
        """The lowest price at which this group's next steps can be had, and how many of them."""
        left = steps[name][taken[name] :][:_TOGETHER]
        width, now, offers = left[0].before, time_without(name, 0), []
        for i, step in enumerate(left):
            saved = now - time_without(name, width - step.after)
            price = lost[name][sizes[name] - step.after] - lost[name][sizes[name] - width]
            offers.append((price / saved if saved > 0 else math.inf, i + 1))
        return min(offers)

    position = {name: i for i, name in enumerate(steps)}
    offers = {name: best_chunk(name) for name in steps if steps[name]}
    order: list[Step] = []
    while offers:
        name = min(offers, key=lambda group: (offers[group][0], position[group]))  # ties keep network order
        price, together = offers.pop(name)
        chunk = steps[name][taken[name] : taken[name] + together]
        order += [replace(step, key=price) for step in chunk]
        taken[name] += together
        for side, width in sides[name].items():
            removed[side] = removed.get(side, 0) + width * (chunk[0].before - chunk[-1].after)
        for other in steps:
            if taken[other] < len(steps[other]) and (other == name or layers[other] & layers[name]):
                offers[other] = best_chunk(other)
    return order


def shortest_prefix(
    module: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    steps: Sequence[Step],
    targets: Mapping[str, float],
    predict: Mapping[str, Predictor],
) -> int:
    """Return the fewest steps that meet every target.

    Args:
        module: The network.
        example: Input for which MACs are counted.
        groups: Its groups.
        steps: In the order in which they are taken.
        targets: By what they limit: something that `predict` names.
        predict: What is left of the network to what it costs.

    Raises:
        RecipeError: If all steps together miss a target.
    """
    kept_after = _kept_after_steps(module, example, groups, steps)

    def cost(length: int) -> dict[str, float]:
        kept = kept_after(length)
        return {unit: predict[unit](kept) for unit in targets}

    full, least = cost(0), cost(len(steps))
    for unit, target in targets.items():
        if target < least[unit]:
            raise RecipeError(
                f"prune: a target of {target:,.6g} {unit} cannot be reached; these settings reach from "
                f"{least[unit]:,.12g} ({least[unit] / full[unit]:.3f}x of the network at this point) to "
                f"{full[unit]:,.12g}. A smaller min_channels or round_to, or less in ignored_scope, reaches further"
            )

    def met(length: int) -> bool:
        found = cost(length)
        return all(found[unit] <= target for unit, target in targets.items())

    return bisect_left(range(len(steps) + 1), True, key=met)


def _kept_after_steps(
    module: nn.Module, example: Tensor, groups: Sequence[ChannelGroup], steps: Sequence[Step]
) -> Callable[[int], Kept]:
    """Return a function from the number of steps taken to what is then left of the network."""
    per_layer = count(module, example).per_layer
    sizes = {group.name: group.channels for group in groups}
    # Every decision of a group takes as many channels of a layer side as any other, so counts are enough.
    per_decision = {group.name: {(m.layer, m.kind): len(m.indices[0]) for m in group.members} for group in groups}

    def kept_after(length: int) -> Kept:
        removed: dict[tuple[str, str], int] = {}
        for name, after in {step.group: step.after for step in steps[:length]}.items():
            for side, width in per_decision[name].items():
                removed[side] = removed.get(side, 0) + width * (sizes[name] - after)
        return Kept(*kept_cost(module, per_layer, removed), kept_widths(module, removed))

    return kept_after
