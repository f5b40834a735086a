"""Stages that remove channels: `prune`, by importance to a ratio or to targets, and `reduce_channels`, to widths.

Invariant: what is done to the network is also appended to `work.edits`, so that replaying the edits rebuilds it.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.channel_choice import Choice, choose_channels, choose_widths, groups_of, prune_edit, smallest_of
from compressor.context import Assignment, Context, Work, accounted, located, recovery, reestimate, train
from compressor.data import calibration_indices
from compressor.data.batches import to_input
from compressor.inference import EVALUATION_BATCH, arithmetic, visiting
from compressor.latency_model import LatencyModel
from compressor.latency_target import measured_model
from compressor.pruning.apply import apply_plan
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.group_lasso import scale_penalty
from compressor.pruning.importance import NEEDS_BATCHES
from compressor.pruning.plan import PrunePlan
from compressor.pruning.reconstruction import Moments, reader_moments, readers_of, reconstruct
from compressor.pruning.sensitivity import damage_of, scores_by_damage
from compressor.pruning.steps import EXACT, Predictor, fewest_kept, kept_of
from compressor.stage_targets import (
    Bench,
    Draft,
    binding,
    count_goals,
    findings,
    measured_targets,
    needs_model,
    searched_costs,
)
from compressor.target_search import Probe, meet_targets, refuse_out_of_reach

SENSITIVITY_BN_BATCHES = 4  # of 32 images, for each cut of each group: as many as are usually judged


def _apply_plan(module: nn.Module, plan: PrunePlan, context: Context, work: Work) -> None:
    apply_plan(module, plan, context.example)
    work.edits.append(prune_edit(plan))
    work.plans.append(plan.to_dict())
    work.notes += [f"group {name} was left as it was: {reason}" for name, reason in plan.skipped.items()]


def loss_batches(context: Context, count_batches: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Class-balanced training batches for the importances that need them."""
    train = context.data.train
    chosen = np.random.default_rng(seed).permutation(calibration_indices(train, count_batches * size, seed))
    parts = [np.sort(chosen[i : i + size]) for i in range(0, len(chosen), size)]
    return [
        (to_input(train.images[p], context.data.spec, "cpu"), torch.from_numpy(np.asarray(train.labels[p])))
        for p in parts
    ]


def prune_stage(module: nn.Module, stage: spec.Prune, context: Context, assignment: Assignment, work: Work) -> None:
    """Remove channels in `iterations` equal steps, each scored afresh, with recovery between them.

    After each training there is a point to go on from; a run that does so measures anew where the way leads.
    """
    example, where, last = context.example, assignment.where, stage.iterations - 1
    recover = recovery(stage.recovery, context, assignment, work)
    counts = count_goals(stage, assignment.baseline)
    aim = Aim(dict(counts), {}, [])
    reached = work.reached
    if not reached:
        reached |= {"steps": [], "full": None, "start": {}, "model": None}
        if stage.sparsify is not None:
            _sparsify(module, stage, stage.sparsify, context, assignment, work)
            work.keep(module)
    steps: list[dict[str, Any]] = reached["steps"]
    first = len(steps)
    with Bench(module, context, assignment) as bench:
        model = None
        if reached["model"]:
            model = LatencyModel.from_dict(reached["model"])
        elif needs_model(stage):
            model = _model(module, stage, context, assignment, bench, work)
            reached["model"] = model.to_dict()
        for i in range(first, stage.iterations):
            batches = None
            if stage.importance in NEEDS_BATCHES:
                batches = loss_batches(context, stage.importance_batches, 32, assignment.seed + i)
            choice = choose_channels(
                module,
                example,
                stage,
                where=where,
                seed=assignment.seed + i,
                batches=batches,
                full=reached["full"],
                model=model,
            )
            moments = moments_of(module, stage, choice.groups, context, assignment.seed)
            if stage.sensitivity_images is not None:
                choice = _compared_by_damage(choice, stage.sensitivity_images, moments, context, assignment, work)
            reached["full"] = reached["full"] or {group.name: group.channels for group in choice.groups}
            if i == 0 and counts:  # whether the end can be reached is known before the first step
                choice.plan(counts)
            if measured_targets(stage) and i in (first, last):
                # Where the way leads, and at its end by the scores that decide.
                aim = _aim(choice, counts, bench, work.edits)
            start = reached["start"] = reached["start"] or _costs(module, example, {**EXACT, **aim.predict})
            share = (i + 1) / stage.iterations
            plan = choice.plan(
                {unit: _between(start[unit], goal, share) for unit, goal in aim.goals.items()},
                ratio=None if stage.pruning_ratio is None else 1 - (1 - stage.pruning_ratio) ** share,
                predict=aim.predict,
            )
            _reconstruct(module, stage, choice.groups, plan, moments, work)
            _apply_plan(module, plan, context, work)
            reestimate(module, stage.bn_batches, context, assignment.seed)
            predicted = _costs(module, example, aim.predict)
            steps.append({**_costs(module, example, EXACT), **({"predicted": predicted} if predicted else {})})
            if i < last:
                recover(module, i)
                work.keep(module)
    work.details["iterations"] = steps
    if stage.target is not None:
        targets = findings(stage, aim.tried, steps[-1], counts)
        work.details |= {"targets": targets, "binding_target": binding(targets)}


def moments_of(
    module: nn.Module, stage: spec.Prune, groups: Sequence[ChannelGroup], context: Context, seed: int
) -> Moments:
    """What a stage's reconstruction goes by; nothing where it has none."""
    if stage.reconstruction_images is None:
        return {}
    train, device = context.data.train, context.device
    chosen = calibration_indices(train, stage.reconstruction_images, seed)
    with visiting(device, module), arithmetic(torch.float32, device):
        batches = (
            to_input(train.images[chosen[i : i + EVALUATION_BATCH]], context.data.spec, device)
            for i in range(0, len(chosen), EVALUATION_BATCH)
        )
        return reader_moments(module, groups, batches)


def _reconstruct(
    module: nn.Module,
    stage: spec.Prune,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    moments: Moments,
    work: Work,
) -> None:
    """Refit what reads the channels that are about to go, and say which layers are not."""
    if stage.reconstruction_images is not None:
        chosen = [group for group in groups if group.name in plan.keep]
        notes = [f"{name} was not refitted: {reason}" for name, reason in readers_of(module, chosen)[1].items()]
        work.notes += [note for note in notes if note not in work.notes]
    reconstruct(module, groups, plan.keep, moments)


def _compared_by_damage(
    choice: Choice, images: int, moments: Moments, context: Context, assignment: Assignment, work: Work
) -> Choice:
    """The same choice, with scores that say what the network's answers were measured to lose; the report has it too."""
    train = context.data.train
    damage = damage_of(
        choice.module,
        choice.groups,
        moments,
        train=train,
        judged=train.take(calibration_indices(train, images, assignment.seed)),
        spec=context.data.spec,
        bn_batches=min(choice.stage.bn_batches, SENSITIVITY_BN_BATCHES),
        seed=assignment.seed,
        device=context.device,
    )
    scores, damages = scores_by_damage(
        choice.module,
        choice.example,
        choice.groups,
        choice.scores,
        damage,
        round_to=choice.stage.round_to,
        min_channels=choice.stage.min_channels,
    )
    work.details.setdefault("damage", []).append(
        {name: [{"ratio": ratio, "nats": nats} for ratio, nats in cuts.items()] for name, cuts in damages.items()}
    )
    return dataclasses.replace(choice, scores=scores)


def _sparsify(
    module: nn.Module,
    stage: spec.Prune,
    options: spec.Sparsify,
    context: Context,
    assignment: Assignment,
    work: Work,
) -> None:
    """Train the network so that the channels that matter least fade before the first of them goes."""
    groups = groups_of(module, context.example, stage, assignment.where)
    with located(assignment.where):
        penalty, left_out = scale_penalty(module, groups)
    work.notes += [f"sparsify: group {name} has no BatchNorm scales and did not take part" for name in left_out]
    before = float(penalty().detach())
    with accounted(work) as results:
        results.append(
            train(
                module,
                options,
                context,
                assignment,
                key="sparsify",
                round_index=stage.iterations,  # recoveries have the numbers before
                penalty=lambda: options.strength * penalty(),
            )
        )
    work.details["sparsify"] = {
        **dataclasses.asdict(results[0]),
        "penalty_before": before,
        "penalty_after": float(penalty().detach()),
    }


def _costs(module: nn.Module, example: Tensor, predict: Mapping[str, Predictor]) -> dict[str, float]:
    """What a network costs: counted, or predicted as fractions of the baseline's."""
    kept = kept_of(module, example)
    return {unit: cost(kept) for unit, cost in predict.items()}


def _between(start: float, goal: float, share: float) -> float:
    """A point on the geometric path from `start` to `goal`."""
    return goal if share == 1 else start * (min(goal, start) / start) ** share


def _model(
    module: nn.Module, stage: spec.Prune, context: Context, assignment: Assignment, bench: Bench, work: Work
) -> LatencyModel:
    """What channels cost, measured on copies of the network."""
    quantize = assignment.quantize[1].model_dump(mode="json") if assignment.quantize else None
    model = measured_model(
        module,
        context.example,
        groups_of(module, context.example, stage, assignment.where),
        bench.deployment,
        floor=fewest_kept(stage.round_to, stage.min_channels),
        identity={"quantize": quantize, "threads": context.threads},
    )
    precision = "float" if assignment.quantize is None else assignment.quantize[1].precision
    work.details["latency_model"] = {"precision": precision, "lanes": model.lanes, "error": model.error}
    return model


def check_prune(module: nn.Module, stage: spec.Prune, bench: Bench) -> None:
    """Find out on untrained weights what else than arithmetic may tell: that targets can be reached, that scales fade.

    Raises:
        RecipeError: A target that is measured is out of reach, with the range; or nothing can be sparsified.
    """
    costs, where = searched_costs(stage, bench, {}), bench.assignment.where
    if not costs and stage.sparsify is None:
        return
    groups = groups_of(module, bench.context.example, stage, where)
    if stage.sparsify is not None:
        with located(where):
            scale_penalty(module, groups)
    if not costs:
        return
    whole, smallest = Draft(copy.deepcopy(module)), smallest_of(module, stage, groups, ())
    for cost in costs.values():
        refuse_out_of_reach(cost, cost.measure(whole), cost.measure(smallest))


@dataclass(frozen=True)
class Aim:
    """What a network is pruned to so that it meets all its targets, and what was measured to find that out.

    Attributes:
        goals: The most that may be left of each cost: counted, or predicted as a fraction of the baseline's.
        predict: How the latter are predicted.
        tried: See `meet_targets`.
    """

    goals: dict[str, float]
    predict: dict[str, Predictor]
    tried: list[dict[str, Probe]]


def _aim(choice: Choice, counts: Mapping[str, float], bench: Bench, edits: Sequence[dict[str, Any]]) -> Aim:
    """Search the predicted costs under which the pruned network's measured ones meet the stage's targets."""
    example = choice.example
    whole = choice.pruned(counts, edits)
    smallest = smallest_of(choice.module, choice.stage, choice.groups, edits)
    predict = {
        name: how.predictor(
            bench, choice.model, (whole, bench.measure(name, whole)), (smallest, bench.measure(name, smallest))
        )
        for name, how in measured_targets(choice.stage).items()
    }

    def of_draft(cost: Predictor) -> Callable[[Draft], float]:
        return lambda draft: cost(kept_of(draft.module, example))

    goals, tried = meet_targets(
        lambda wanted: choice.pruned({**counts, **wanted}, edits, predict),
        searched_costs(choice.stage, bench, {name: of_draft(cost) for name, cost in predict.items()}),
        whole=whole,
        smallest=smallest,
    )
    return Aim({**counts, **goals}, predict, tried)


def reduce_channels_stage(
    module: nn.Module, stage: spec.ReduceChannels, context: Context, assignment: Assignment, work: Work
) -> None:
    """Give every channel group a fraction of its width."""
    plan = choose_widths(module, context.example, stage, where=assignment.where, seed=assignment.seed)
    _apply_plan(module, plan, context, work)
    if stage.init == "random":
        _reinitialise(module, assignment.seed)
        work.notes.append("all weights were drawn anew (init: random)")
    reestimate(module, stage.bn_batches, context, assignment.seed)


def _reinitialise(module: nn.Module, seed: int) -> None:
    """Fresh weights for every layer that knows how to draw its own; nothing of the pretrained ones stays."""
    torch.manual_seed(seed)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]
