"""Deciding which channels go: a `PrunePlan` is data, and nothing is edited here.

Invariant: all removals of a network form one sorted list of steps, and a plan is a prefix of it. So a tighter target
keeps a subset of what a looser one keeps, and a target is met or refused, never missed.
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from compressor.errors import DataError, RecipeError, did_you_mean
from compressor.latency_model import LatencyModel
from compressor.pruning.coupling import WRITERS, ChannelGroup
from compressor.pruning.steps import EXACT, Predictor, Step, fewest_kept, most_saved_first, shortest_prefix, steps_of

PLAN_VERSION = 1
Ranking = Literal["local", "global", "latency"]
Setting = str | int | float | None | dict[str, float]


@dataclass(frozen=True)
class PrunePlan:
    """Which channels stay; indices refer to the network before the edit.

    Attributes:
        keep: Group name to kept decisions, ascending. Groups that stay whole are absent.
        channels: Group name to the decisions it had, for each group in `keep`: what `apply_plan` checks against.
        skipped: Group name to the reason why it is not pruned, or not as far as asked.
        settings: What the plan was asked for; a predicted cost as a fraction of the baseline's such as `0.4x`.
    """

    keep: dict[str, tuple[int, ...]]
    channels: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the plan as JSON-able values, versioned."""
        return {
            "version": PLAN_VERSION,
            "keep": {name: list(kept) for name, kept in self.keep.items()},
            "channels": dict(self.channels),
            "skipped": dict(self.skipped),
            "settings": dict(self.settings),
        }

    @staticmethod
    def from_dict(value: object, *, where: str = "plan") -> "PrunePlan":
        """Build a plan from `to_dict`'s value.

        Args:
            value: Parsed JSON.
            where: File or key it came from, for messages.

        Raises:
            DataError: If the version is unknown or a field is missing or malformed.
        """
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object, found {type(value).__name__}")
        if value.get("version") != PLAN_VERSION:
            raise DataError(f"{where}: version {value.get('version')!r} is not one this release reads ({PLAN_VERSION})")
        for name in ("keep", "channels", "skipped", "settings"):
            if not isinstance(value.get(name), dict):
                raise DataError(f"{where}: '{name}' is missing or not an object")
        for group, kept in value["keep"].items():
            width = value["channels"].get(group)
            if not _is_int(width):
                raise DataError(f"{where}: channels['{group}'] is missing or not a whole number")
            if not isinstance(kept, list) or not kept or not all(_is_int(i) and 0 <= i < width for i in kept):
                raise DataError(f"{where}: keep['{group}'] must list channels from 0 to {width - 1}")
            if any(a >= b for a, b in itertools.pairwise(kept)):
                raise DataError(f"{where}: keep['{group}'] is not ascending")
        return PrunePlan(
            keep={group: tuple(kept) for group, kept in value["keep"].items()},
            channels=dict(value["channels"]),
            skipped={str(group): str(reason) for group, reason in value["skipped"].items()},
            settings=dict(value["settings"]),
        )


def decide_plan(
    module: nn.Module,
    example: Tensor,
    *,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    ranking: Ranking,
    pruning_ratio: float | None = None,
    targets: Mapping[str, float] | None = None,
    round_to: int,
    min_channels: int,
    full: Mapping[str, int] | None = None,
    model: LatencyModel | None = None,
    predict: Mapping[str, Predictor] | None = None,
) -> PrunePlan:
    """Choose the channels to keep; the network is left untouched.

    `local` shrinks every group by one common ratio; `global` takes the least important channels wherever they are;
    `latency` takes those first that save most time for the importance that is lost. With targets, the list of steps is
    followed until all are met; MACs and parameters come from arithmetic that equals counting the pruned network.

    Args:
        module: The network.
        example: Input `(N, C, H, W)` for which MACs are counted.
        groups: From `find_groups`.
        scores: From `score_groups`, one for each prunable group.
        ranking: `local`, `global` or `latency`.
        pruning_ratio: Fraction of channels to remove, in [0, 1). `local`: of each group, to the nearest multiple of
            `round_to`; otherwise: of all prunable channels, at most. Excludes targets.
        targets: Most `macs` (multiply-accumulates for one sample), `params`, and whatever else `predict` names.
        round_to: Kept channels of a pruned group are a multiple of this.
        min_channels: Channels that every group keeps at least.
        full: Group name to the channels it had before earlier steps of the same stage: what `pruning_ratio` refers to,
            so that rounding does not add up over steps. By default, what the groups have now.
        model: Predicts each layer's time; needed by ranking `latency`.
        predict: Other costs by name, as fractions of the baseline's.

    Raises:
        RecipeError: If settings contradict each other or the target cannot be reached; the message tells the range.
    """
    _check_settings(round_to, min_channels)
    if (pruning_ratio is None) == (not targets):
        raise RecipeError("prune: give either pruning_ratio or targets, not both and not neither")
    if pruning_ratio is not None and not 0 <= pruning_ratio < 1:
        raise RecipeError(
            f"prune: pruning_ratio is the fraction of channels removed, 0 <= ratio < 1; found {pruning_ratio}"
        )
    if ranking not in get_args(Ranking):
        raise RecipeError(f"prune: ranking '{ranking}' is not one of {', '.join(get_args(Ranking))}")
    if model is None and ranking == "latency":
        raise RecipeError("prune: ranking by latency needs a latency model")
    order = {group.name: _ascending(group, scores) for group in groups if group.prunable}
    whole = {group.name: (full or {}).get(group.name, group.channels) for group in groups}
    skipped = _unprunable(groups, round_to, min_channels)
    open_steps = {
        group.name: steps_of(
            group, scores[group.name], order[group.name], ranking, round_to, min_channels, whole[group.name]
        )
        for group in groups
        if group.name not in skipped
    }
    if ranking == "latency":
        assert model is not None
        steps = most_saved_first(module, groups, open_steps, scores, order, model)
    else:  # stable: equal keys keep network order, so the same seed gives the same plan
        steps = sorted(itertools.chain(*open_steps.values()), key=lambda step: step.key)
    if pruning_ratio is None:
        assert targets
        length = shortest_prefix(module, example, groups, steps, targets, {**EXACT, **(predict or {})})
    elif ranking == "local":
        length = sum(step.key <= pruning_ratio for step in steps)
        skipped |= _held_back(groups, whole, steps[:length], skipped, pruning_ratio, round_to, min_channels)
    else:
        prunable = [group for group in groups if group.prunable]
        allowance = pruning_ratio * sum(whole[group.name] for group in prunable)
        length, gone = 0, sum(whole[group.name] - group.channels for group in prunable)
        while length < len(steps) and (gone := gone + steps[length].before - steps[length].after) <= allowance:
            length += 1
        if length == len(steps) and gone < allowance - round_to:
            skipped |= _at_the_floor(groups, skipped, round_to, min_channels)
    kept = {step.group: step.after for step in steps[:length]}
    settings: dict[str, Setting] = {
        "ranking": ranking,
        "pruning_ratio": pruning_ratio,
        **{f"target_{unit}": goal if unit in EXACT else f"{goal:.6g}x" for unit, goal in (targets or {}).items()},
        "round_to": round_to,
        "min_channels": min_channels,
    }
    return _plan(groups, order, kept, skipped, settings)


def width_plan(
    *,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    width: float,
    overrides: Mapping[str, float],
    round_to: int,
    min_channels: int,
) -> PrunePlan:
    """Keep a fraction `width` of every group (channel reduction: MobileNet's width multiplier, arXiv 1704.04861).

    Args:
        groups: From `find_groups`.
        scores: From `score_groups`; decide which channels make up the kept width.
        width: Fraction of channels kept, in (0, 1].
        overrides: Glob over group names (root layers) to another width; the last that matches a group counts.
        round_to: Kept channels of a reduced group are a multiple of this.
        min_channels: Channels that every group keeps at least.

    Raises:
        RecipeError: If a width is out of range or a glob matches no group; names the group a layer belongs to.
    """
    _check_settings(round_to, min_channels)
    for name, value in {"width": width, **{f"widths['{glob}']": value for glob, value in overrides.items()}}.items():
        if not 0 < value <= 1:
            raise RecipeError(
                f"reduce_channels: {name} is the fraction of channels kept, 0 < width <= 1; found {value}"
            )
    for glob in overrides:
        _check_override(glob, groups)
    skipped = _unprunable(groups, round_to, min_channels)
    order = {group.name: _ascending(group, scores) for group in groups if group.prunable}
    kept: dict[str, int] = {}
    for group in groups:
        if group.name in skipped:
            continue
        ratio = 1 - next((v for g, v in reversed(list(overrides.items())) if fnmatch.fnmatchcase(group.name, g)), width)
        steps = steps_of(group, scores[group.name], order[group.name], "local", round_to, min_channels)
        taken = [step for step in steps if step.key <= ratio]
        if taken:
            kept[group.name] = taken[-1].after
        skipped |= _held_back([group], {group.name: group.channels}, taken, {}, ratio, round_to, min_channels)
    skipped |= _named_by_another_layer(groups, overrides)
    settings: dict[str, Setting] = {
        "width": width,
        "overrides": dict(overrides),
        "round_to": round_to,
        "min_channels": min_channels,
    }
    return _plan(groups, order, kept, skipped, settings)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_settings(round_to: int, min_channels: int) -> None:
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if value < 1:
            raise RecipeError(f"prune: {name} must be at least 1; found {value}")


def _check_override(glob: str, groups: Sequence[ChannelGroup]) -> None:
    names = [group.name for group in groups]
    if fnmatch.filter(names, glob):
        return
    owner = next(
        (g.name for g in groups for m in g.members if m.kind in WRITERS and fnmatch.fnmatchcase(m.layer, glob)), None
    )
    hint = f"; its channels belong to group '{owner}'" if owner else did_you_mean(glob, names)
    raise RecipeError(f"reduce_channels: widths['{glob}'] matches no channel group{hint}")


def _named_by_another_layer(groups: Sequence[ChannelGroup], overrides: Mapping[str, float]) -> dict[str, str]:
    """Groups that a glob meant, perhaps, but did not name: filters of a layer it matches are in them, not their root.

    Filters alone: the depthwise half of a separable convolution belongs to the layer before, which nobody meant.
    """
    missed = {}
    for group in groups:
        if not group.prunable or any(fnmatch.fnmatchcase(group.name, glob) for glob in overrides):
            continue
        for glob in overrides:
            writer = next(
                (m.layer for m in group.members if m.kind == "out" and fnmatch.fnmatchcase(m.layer, glob)), None
            )
            if writer is not None:
                missed[group.name] = (
                    f"widths['{glob}'] matches '{writer}', but a group goes by its first layer: name '{group.name}' "
                    "too to change its width"
                )
    return missed


def _unprunable(groups: Sequence[ChannelGroup], round_to: int, min_channels: int) -> dict[str, str]:
    skipped: dict[str, str] = {}
    for group in groups:
        if not group.prunable:
            skipped[group.name] = group.reason or "not prunable"
        elif group.channels <= fewest_kept(round_to, min_channels):
            skipped[group.name] = (
                f"has {group.channels} channels; "
                f"round_to {round_to} and min_channels {min_channels} leave none to remove"
            )
    return skipped


def _ascending(group: ChannelGroup, scores: Mapping[str, Tensor]) -> list[int]:
    score = scores.get(group.name)
    if score is None or tuple(score.shape) != (group.channels,):
        found = "none" if score is None else f"shape {tuple(score.shape)}"
        raise RecipeError(f"{group.name}: needs scores of shape ({group.channels},), found {found}")
    values = score.tolist()
    return sorted(range(group.channels), key=lambda decision: (values[decision], decision))


def _at_the_floor(
    groups: Sequence[ChannelGroup], skipped: Mapping[str, str], round_to: int, min_channels: int
) -> dict[str, str]:
    """Reasons where every group has shrunk as far as it may and the ratio is still not reached."""
    floor = fewest_kept(round_to, min_channels)
    return {
        group.name: f"kept at {floor} of {group.channels} channels by round_to {round_to} and min_channels "
        f"{min_channels}: pruning_ratio is not reached"
        for group in groups
        if group.name not in skipped
    }


def _held_back(
    groups: Sequence[ChannelGroup],
    whole: Mapping[str, int],
    taken: Sequence[Step],
    skipped: Mapping[str, str],
    ratio: float,
    round_to: int,
    min_channels: int,
) -> dict[str, str]:
    """Reasons for groups that keep more than the ratio asks for, by more than rounding to the nearest."""
    kept = {step.group: step.after for step in taken}
    floor = fewest_kept(round_to, min_channels)
    notes: dict[str, str] = {}
    for group in groups:
        asked = (1 - ratio) * whole[group.name]
        if group.name in skipped or asked >= group.channels:
            continue
        if group.name not in kept:
            notes[group.name] = (
                f"keeping {1 - ratio:.3g} of {whole[group.name]} channels rounds to its {group.channels} with "
                f"round_to {round_to}"
            )
        elif kept[group.name] == floor and floor - asked > round_to / 2:
            notes[group.name] = (
                f"kept at {floor} of {group.channels} channels by round_to {round_to} and min_channels {min_channels}"
            )
    return notes


def _plan(
    groups: Sequence[ChannelGroup],
    order: Mapping[str, Sequence[int]],
    kept: Mapping[str, int],
    skipped: dict[str, str],
    settings: dict[str, Setting],
) -> PrunePlan:
    return PrunePlan(
        keep={
            group.name: tuple(sorted(order[group.name][group.channels - kept[group.name] :]))
            for group in groups
            if group.name in kept
        },
        channels={group.name: group.channels for group in groups if group.name in kept},
        skipped=skipped,
        settings=settings,
    )
