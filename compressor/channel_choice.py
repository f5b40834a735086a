"""Deciding by a recipe's settings which channels go.

Invariant: the network that is decided about is left as it is; plans for tighter targets keep subsets of what plans for
looser ones keep.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor import recipe as spec
from compressor.context import located
from compressor.latency_model import LatencyModel
from compressor.latency_target import narrowed
from compressor.pruning.apply import apply_plan
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.groups import find_groups, resolve_scope
from compressor.pruning.importance import NEEDS_BATCHES, score_groups
from compressor.pruning.plan import PrunePlan, decide_plan, width_plan
from compressor.pruning.steps import Predictor, fewest_kept
from compressor.stage_targets import Draft


def prune_edit(plan: PrunePlan) -> dict[str, Any]:
    """The edit that removes the channels which a plan does not keep."""
    return {"type": "prune", "plan": plan.to_dict()}


def groups_of(
    module: nn.Module, example: Tensor, stage: spec.Prune | spec.ReduceChannels, where: str
) -> list[ChannelGroup]:
    """The network's channel groups; those in the stage's `ignored_scope` are not prunable."""
    return find_groups(
        module,
        example,
        ignored=resolve_scope(module, stage.ignored_scope, where=f"{where}.ignored_scope", example=example),
    )


@dataclass(frozen=True)
class Choice:
    """A network's channel groups and what their channels are worth: plans for any targets can be made of it."""

    module: nn.Module
    example: Tensor
    stage: spec.Prune
    where: str
    groups: list[ChannelGroup]
    scores: dict[str, Tensor]
    full: Mapping[str, int] | None  # channels of each group before earlier steps: what ratios refer to
    model: LatencyModel | None

    def plan(
        self,
        targets: Mapping[str, float],
        *,
        ratio: float | None = None,
        predict: Mapping[str, Predictor] | None = None,
    ) -> PrunePlan:
        """Decide which channels stay; targets are in `macs`, `params` and what `predict` names."""
        ranking = self.stage.ranking
        if ranking == "latency" and self.model is None:
            ranking = "global"  # `plan` measures nothing
        with located(self.where):
            return decide_plan(
                self.module,
                self.example,
                groups=self.groups,
                scores=self.scores,
                ranking=ranking,
                pruning_ratio=ratio,
                targets=targets,
                round_to=self.stage.round_to,
                min_channels=self.stage.min_channels,
                full=self.full,
                model=self.model,
                predict=predict,
            )

    def pruned(
        self,
        targets: Mapping[str, float],
        edits: Sequence[dict[str, Any]],
        predict: Mapping[str, Predictor] | None = None,
    ) -> Draft:
        """A copy of the network, to which `edits` have led, pruned to the targets; see `plan`."""
        network = copy.deepcopy(self.module)
        if not targets:
            return Draft(network, tuple(edits))
        plan = self.plan(targets, predict=predict)
        apply_plan(network, plan, self.example)
        return Draft(network, (*edits, prune_edit(plan)))


def choose_channels(
    module: nn.Module,
    example: Tensor,
    stage: spec.Prune,
    *,
    where: str,
    seed: int,
    batches: list[tuple[Tensor, Tensor]] | None = None,
    full: Mapping[str, int] | None = None,
    model: LatencyModel | None = None,
) -> Choice:
    """Find and score the channel groups; without `batches` by magnitude in place of an importance that needs them."""
    groups = groups_of(module, example, stage, where)
    kind = "magnitude" if batches is None and stage.importance in NEEDS_BATCHES else stage.importance
    with located(where):
        scores = score_groups(module, groups, kind=kind, loss_batches=batches, seed=seed)
    return Choice(module, example, stage, where, groups, scores, full, model)


def smallest_of(
    module: nn.Module, stage: spec.Prune, groups: Sequence[ChannelGroup], edits: Sequence[dict[str, Any]]
) -> Draft:
    """A copy of the network, to which `edits` have led, with as few channels as the stage's settings allow."""
    floor = fewest_kept(stage.round_to, stage.min_channels)
    prunable = [group for group in groups if group.prunable and group.channels > floor]
    keep = {group.name: tuple(range(floor)) for group in prunable}
    plan = PrunePlan(keep, {group.name: group.channels for group in prunable})
    return Draft(narrowed(module, prunable, dict.fromkeys(keep, floor)), (*edits, prune_edit(plan)))


def choose_widths(
    module: nn.Module, example: Tensor, stage: spec.ReduceChannels, *, where: str, seed: int
) -> PrunePlan:
    """Decide which channels stay at the stage's widths: those of largest magnitude."""
    groups = groups_of(module, example, stage, where)
    scores = score_groups(module, groups, kind="magnitude", loss_batches=None, seed=seed)
    with located(where):
        return width_plan(
            groups=groups,
            scores=scores,
            width=stage.width,
            overrides=stage.widths,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
        )
