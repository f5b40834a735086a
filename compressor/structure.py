"""Stages that change a network's structure: fewer channels, smaller kernels, fewer blocks.

Invariant: what is done to the network is also appended to `work.edits`, so that replaying the edits rebuilds it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.context import Assignment, Context, Work, located, recovery, resolve_freeze
from compressor.data import calibration_indices
from compressor.data.batches import to_input
from compressor.errors import RecipeError
from compressor.inference import choose_precision, evaluate, predict, reestimate_batchnorm
from compressor.latency_target import macs_for_latency
from compressor.models.counting import count
from compressor.pruning.apply import apply_plan
from compressor.pruning.blocks import find_blocks
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.depth import drop_greedily
from compressor.pruning.groups import find_groups, resolve_scope
from compressor.pruning.importance import score_groups
from compressor.pruning.kernels import find_kernels, replace_kernels
from compressor.pruning.plan import PrunePlan, decide_plan, width_plan
from compressor.report import Footprint

DISTILL_T = 2.0  # temperature at which removing a block is judged


def _reestimate(module: nn.Module, passes: int, context: Context, seed: int) -> None:
    reestimate_batchnorm(module, context.data.train, context.data.spec, passes=passes, seed=seed, device=context.device)


def _apply_plan(module: nn.Module, plan: PrunePlan, context: Context, work: Work) -> None:
    apply_plan(module, plan, context.example)
    work.edits.append({"type": "prune", "plan": plan.to_dict()})
    work.plans.append(plan.to_dict())
    work.notes += [f"group {name} was left as it was: {reason}" for name, reason in plan.skipped.items()]


def _loss_batches(context: Context, count_batches: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Class-balanced training batches for gradient-based importance."""
    train = context.data.train
    chosen = np.random.default_rng(seed).permutation(calibration_indices(train, count_batches * size, seed))
    parts = [np.sort(chosen[i : i + size]) for i in range(0, len(chosen), size)]
    return [
        (to_input(train.images[p], context.data.spec, "cpu"), torch.from_numpy(np.asarray(train.labels[p])))
        for p in parts
    ]


def check_scopes(module: nn.Module, stages: Iterable[spec.Stage], example: Tensor) -> None:
    """Every glob of every stage names something in the network; known before the first stage, not hours into the run.

    Raises:
        RecipeError: one does not.
    """
    for index, stage in enumerate(stages):
        for key in ("scope", "ignored_scope"):
            resolve_scope(module, getattr(stage, key, ()), where=f"stages[{index}].{key}", example=example)
        for key, options in (("", stage), (".recovery", getattr(stage, "recovery", None))):
            if isinstance(options, spec.Training):
                resolve_freeze(module, options.freeze, where=f"stages[{index}]{key}.freeze", example=example)


def choose_channels(
    module: nn.Module,
    example: Tensor,
    stage: spec.Prune,
    *,
    where: str,
    seed: int,
    batches: list[tuple[Tensor, Tensor]] | None = None,
    ratio: float | None = None,
    macs: int | None = None,
    params: int | None = None,
    full: dict[str, int] | None = None,
) -> PrunePlan:
    """Decide what a prune stage removes; without `batches`, by magnitude instead of a gradient-based importance."""
    groups = _groups(module, example, stage, where)
    kind = stage.importance if batches is not None else "magnitude"
    scores = score_groups(module, groups, kind=kind, loss_batches=batches, seed=seed)
    with located(where):
        return decide_plan(
            module,
            example,
            groups=groups,
            scores=scores,
            ranking=stage.ranking,
            pruning_ratio=ratio,
            target_macs=macs,
            target_params=params,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
            full=full,
        )


def _groups(
    module: nn.Module, example: Tensor, stage: spec.Prune | spec.ReduceChannels, where: str
) -> list[ChannelGroup]:
    return find_groups(
        module,
        example,
        ignored=resolve_scope(module, stage.ignored_scope, where=f"{where}.ignored_scope", example=example),
    )


def prune_stage(module: nn.Module, stage: spec.Prune, context: Context, assignment: Assignment, work: Work) -> None:
    """Remove channels in `iterations` equal steps, each scored afresh, with recovery between them."""
    example, where = context.example, assignment.where
    start = count(module, example)
    macs, params = prune_goals(stage, assignment.baseline)
    if measures_latency(stage):
        macs = _macs_for_latency(module, stage, context, assignment, work, macs, params)
    if stage.iterations > 1 and stage.target:  # whether the end can be reached is known before the first step
        choose_channels(module, example, stage, where=where, seed=assignment.seed, macs=macs, params=params)
    full = None  # what a ratio refers to is what is here now, at every step
    if stage.iterations > 1 and stage.pruning_ratio is not None:
        full = {group.name: group.channels for group in _groups(module, example, stage, where)}
    recover = recovery(stage.recovery, context, assignment, work)
    steps = []
    for i in range(stage.iterations):
        share = (i + 1) / stage.iterations
        plan = choose_channels(
            module,
            example,
            stage,
            where=where,
            seed=assignment.seed + i,
            batches=_loss_batches(context, stage.importance_batches, 32, assignment.seed + i)
            if stage.importance == "taylor"
            else None,
            ratio=None if stage.pruning_ratio is None else 1 - (1 - stage.pruning_ratio) ** share,
            macs=None if macs is None else _between(start.macs, macs, share),
            params=None if params is None else _between(start.params, params, share),
            full=full,
        )
        _apply_plan(module, plan, context, work)
        _reestimate(module, stage.bn_batches, context, assignment.seed)
        now = count(module, example)
        steps.append({"macs": now.macs, "params": now.params})
        if i + 1 < stage.iterations:
            recover(module, i)
    work.details["iterations"] = steps


def measures_latency(stage: spec.Prune) -> bool:
    """Whether a prune stage has a target that only timing can translate into MACs."""
    return stage.target is not None and stage.target.latency_ms is not None


def _macs_for_latency(
    module: nn.Module,
    stage: spec.Prune,
    context: Context,
    assignment: Assignment,
    work: Work,
    macs: int | None,
    params: int | None,
) -> int:
    """MACs under which the pruned network meets the stage's latency, by magnitude whatever its importance is."""
    assert stage.target is not None
    assert stage.target.latency_ms is not None
    bound, data, where = stage.target.latency_ms, context.data, f"{assignment.where}.target.latency_ms"
    if macs is not None or params is not None:  # what is out of reach there is not the latency's fault
        choose_channels(module, context.example, stage, where=assignment.where, seed=0, macs=macs, params=params)
    groups = _groups(module, context.example, stage, assignment.where)
    with located(where):
        goal, probes = macs_for_latency(
            module,
            context.example,
            baseline=module if assignment.teacher is None else assignment.teacher,
            goal=bound.resolve,
            groups=groups,
            scores=score_groups(module, groups, kind="magnitude", loss_batches=None, seed=assignment.seed),
            ranking=stage.ranking,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
            macs=macs,
            params=params,
            spec=data.spec,
            labels=data.labels,
            images=np.asarray(data.train.images[:8]),
            folder=context.run_dir,
            threads=context.threads,
        )
    found = [dataclasses.asdict(probe) for probe in probes]
    work.details["latency_target"] = {"asked": bound.plain(), "macs": goal, "probes": found}
    return goal


def prune_goals(stage: spec.Prune, baseline: Footprint) -> tuple[int | None, int | None]:
    """Absolute MACs and parameters a prune stage aims at; None where it has no such target."""
    target = stage.target
    macs = int(target.macs.resolve(baseline.macs)) if target and target.macs else None
    params = int(target.params.resolve(baseline.params)) if target and target.params else None
    return macs, params


def _between(start: int, goal: float, share: float) -> int:
    """A point on the geometric path from `start` to `goal`, rounded down so that the last one is met."""
    return int(start * (min(goal, start) / start) ** share)


def choose_widths(
    module: nn.Module, example: Tensor, stage: spec.ReduceChannels, *, where: str, seed: int
) -> PrunePlan:
    """Decide which channels stay at the stage's widths: those of largest magnitude."""
    groups = _groups(module, example, stage, where)
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


def reduce_channels_stage(
    module: nn.Module, stage: spec.ReduceChannels, context: Context, assignment: Assignment, work: Work
) -> None:
    """Give every channel group a fraction of its width."""
    plan = choose_widths(module, context.example, stage, where=assignment.where, seed=assignment.seed)
    _apply_plan(module, plan, context, work)
    if stage.init == "random":
        _reinitialise(module, assignment.seed)
        work.notes.append("all weights were drawn anew (init: random)")
    _reestimate(module, stage.bn_batches, context, assignment.seed)


def _reinitialise(module: nn.Module, seed: int) -> None:
    """Fresh weights for every layer that knows how to draw its own; nothing of the pretrained ones stays."""
    torch.manual_seed(seed)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # type: ignore[operator]


def choose_kernels(module: nn.Module, example: Tensor, stage: spec.ReplaceKernels, *, where: str) -> list[str]:
    """Names of the convolutions that become 1x1.

    Raises:
        RecipeError: the scope holds none that could.
    """
    ignored = resolve_scope(module, stage.ignored_scope, where=f"{where}.ignored_scope", example=example)
    resolve_scope(module, stage.scope, where=f"{where}.scope", example=example)
    with located(where):
        names = [name for name in find_kernels(module, stage.scope, example=example) if name not in ignored]
    if not names:
        raise RecipeError(f"{where}.ignored_scope: leaves no convolution of {list(stage.scope)} to replace")
    return names


def replace_kernels_stage(
    module: nn.Module, stage: spec.ReplaceKernels, context: Context, assignment: Assignment, work: Work
) -> None:
    """Turn k x k convolutions into 1x1."""
    names = choose_kernels(module, context.example, stage, where=assignment.where)
    replace_kernels(module, names, init=stage.init, seed=assignment.seed)
    work.edits.append({"type": "replace_kernels", "modules": names})
    work.details["modules"] = names
    _reestimate(module, stage.bn_batches, context, assignment.seed)


def choose_blocks(module: nn.Module, example: Tensor, stage: spec.DropBlocks, *, where: str) -> list[str]:
    """Names of the blocks that may be dropped.

    Raises:
        RecipeError: there are none, or fewer than `count` and `min_blocks` need.
    """
    scope = resolve_scope(module, stage.scope, where=f"{where}.scope", example=example)
    blocks = [name for name in find_blocks(module, example) if name in scope]
    if not blocks:
        raise RecipeError(
            f"{where}.scope: no residual block in {list(stage.scope)} can be removed, shapes would change"
        )
    if stage.count is not None and stage.count > len(blocks) - stage.min_blocks:
        raise RecipeError(
            f"{where}.count: found {stage.count}, but {len(blocks)} blocks can be dropped and {stage.min_blocks} must "
            f"stay (min_blocks); allowed up to {len(blocks) - stage.min_blocks}"
        )
    return blocks


def enough_dropped(
    stage: spec.DropBlocks, blocks: list[str], example: Tensor, baseline: Footprint, *, where: str
) -> Callable[[nn.Module, int], bool]:
    """Whether a network from which so many of `blocks` are gone has lost what the stage asks for.

    Raises (when called):
        RecipeError: no block may go any more and the target is not reached.
    """
    goal = stage.target.macs.resolve(baseline.macs) if stage.target else None

    def done(network: nn.Module, dropped: int) -> bool:
        if goal is None:
            return dropped == stage.count
        macs = count(network, example).macs
        if macs > goal and dropped >= len(blocks) - stage.min_blocks:
            raise RecipeError(
                f"{where}.target: {dropped} blocks can be dropped, which leaves {macs:,} MACs "
                f"({macs / (baseline.macs or macs):.3f}x of the baseline); ask for no less than that"
            )
        return macs <= goal

    return done


def drop_blocks_stage(
    module: nn.Module, stage: spec.DropBlocks, context: Context, assignment: Assignment, work: Work
) -> None:
    """Drop residual blocks, least harmful first, with recovery after each."""
    blocks = choose_blocks(module, context.example, stage, where=assignment.where)
    recover = recovery(stage.recovery, context, assignment, work)
    done = enough_dropped(stage, blocks, context.example, assignment.baseline, where=assignment.where)
    edit: dict[str, Any] = {"type": "drop_blocks", "modules": []}
    work.edits.append(edit)

    def mend(network: nn.Module, index: int) -> None:
        edit["modules"] = [name for name in blocks if isinstance(network.get_submodule(name), nn.Identity)]
        _reestimate(network, stage.bn_batches, context, assignment.seed)
        recover(network, index)

    drops = drop_greedily(module, blocks, done=done, loss=_measured_loss(stage, context, assignment), recover=mend)
    work.details["drops"] = [dataclasses.asdict(drop) for drop in drops]


def _measured_loss(stage: spec.DropBlocks, context: Context, assignment: Assignment) -> Callable[[nn.Module], float]:
    """Cross-entropy on validation, or distillation loss on training images; the same images every time."""
    data, device = context.data, context.device
    # Candidates are compared with each other, so bf16's rounding is harmless.
    dtype = choose_precision(context.precision, device)
    if stage.metric == "val_loss":
        part = data.val.take(calibration_indices(data.val, stage.metric_images, assignment.seed))
        return lambda network: evaluate(network, part, data.spec, device=device, dtype=dtype)[1]
    assert assignment.teacher is not None, "the recipe validator demands a baseline before distillation"
    images = data.train.images[calibration_indices(data.train, stage.metric_images, assignment.seed)]
    wanted = torch.log_softmax(
        predict(assignment.teacher, images, data.spec, device=device, dtype=dtype) / DISTILL_T, dim=1
    )

    def distance(network: nn.Module) -> float:
        got = torch.log_softmax(predict(network, images, data.spec, device=device, dtype=dtype) / DISTILL_T, dim=1)
        return float(nn.functional.kl_div(got, wanted, log_target=True, reduction="batchmean"))

    return distance
