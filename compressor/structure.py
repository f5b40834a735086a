"""Stages that change a network's layers: smaller kernels, fewer blocks.

Invariant: what is done to the network is also appended to `work.edits`, so that replaying the edits rebuilds it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.context import Assignment, Context, Work, located, recovery, reestimate, resolve_freeze
from compressor.data import calibration_indices
from compressor.errors import RecipeError
from compressor.inference import choose_precision, evaluate, predict
from compressor.pruning.blocks import find_blocks
from compressor.pruning.depth import Drop, drop_greedily
from compressor.pruning.groups import resolve_scope
from compressor.pruning.kernels import find_kernels, replace_kernels
from compressor.recipe_stages import trainings_of
from compressor.report import Footprint
from compressor.stage_targets import Bench, Draft, binding, first_misses

DISTILL_T = 2.0  # temperature at which removing a block is judged


def check_scopes(module: nn.Module, stages: Iterable[spec.Stage], example: Tensor) -> None:
    """Every glob of every stage names something in the network; known before the first stage, not hours into the run.

    Raises:
        RecipeError: one does not.
    """
    for index, stage in enumerate(stages):
        for key in ("scope", "ignored_scope"):
            resolve_scope(module, getattr(stage, key, ()), where=f"stages[{index}].{key}", example=example)
        for key, options in trainings_of(stage):
            where = ".".join(filter(None, (f"stages[{index}]", key, "freeze")))
            resolve_freeze(module, options.freeze, where=where, example=example)


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
    work.edits.append(kernels_edit(names))
    work.details["modules"] = names
    reestimate(module, stage.bn_batches, context, assignment.seed)


def kernels_edit(names: Sequence[str]) -> dict[str, Any]:
    """The edit that turns these convolutions into 1x1."""
    return {"type": "replace_kernels", "modules": list(names)}


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
    stage: spec.DropBlocks,
    blocks: list[str],
    example: Tensor,
    baseline: Footprint,
    *,
    where: str,
    bench: Bench | None,
    targets: dict[str, Any],
) -> Callable[[nn.Module, int], bool]:
    """Whether a network from which so many of `blocks` are gone has lost what the stage asks for.

    Without a bench, targets that only measuring tells are passed over. What is found goes into `targets`.

    Raises (when called):
        RecipeError: no block may go any more and the target is not reached.
    """

    def done(network: nn.Module, dropped: int) -> bool:
        if stage.target is None:
            return dropped == stage.count
        draft = Draft(copy.deepcopy(network), (blocks_edit(network, blocks),))
        missed = first_misses(stage, draft, example, baseline, bench, targets)
        if missed and dropped >= len(blocks) - stage.min_blocks:
            raise RecipeError(
                f"{where}.target: {dropped} blocks can be dropped, which leaves {' and '.join(missed)}; ask for no "
                "less than that"
            )
        return not missed

    return done


def blocks_edit(network: nn.Module, blocks: Sequence[str]) -> dict[str, Any]:
    """The edit that drops those of the blocks which are gone from a network."""
    gone = [name for name in blocks if isinstance(network.get_submodule(name), nn.Identity)]
    return {"type": "drop_blocks", "modules": gone}


def drop_blocks_stage(
    module: nn.Module, stage: spec.DropBlocks, context: Context, assignment: Assignment, work: Work
) -> None:
    """Drop residual blocks, least harmful first, with recovery after each, and a point to go on from."""
    reached = work.reached
    if not reached:
        blocks = choose_blocks(module, context.example, stage, where=assignment.where)
        reached |= {"blocks": blocks, "drops": [], "targets": {}}
        work.edits.append(blocks_edit(module, blocks))
    blocks, targets, edit = reached["blocks"], reached["targets"], work.edits[-1]
    recover = recovery(stage.recovery, context, assignment, work)

    def mend(network: nn.Module, index: int) -> None:
        edit.update(blocks_edit(network, blocks))
        reestimate(network, stage.bn_batches, context, assignment.seed)
        recover(network, index)

    def keep(drops: list[Drop]) -> None:
        reached["drops"] = [dataclasses.asdict(drop) for drop in drops]
        work.keep(module)

    with Bench(module, context, assignment) as bench:
        done = enough_dropped(
            stage,
            blocks,
            context.example,
            assignment.baseline,
            where=assignment.where,
            bench=bench,
            targets=targets,
        )
        drop_greedily(
            module,
            blocks,
            done=done,
            loss=_measured_loss(stage, context, assignment),
            recover=mend,
            before=[Drop(**drop) for drop in reached["drops"]],
            after=keep,
        )
    work.details["drops"] = reached["drops"]
    if targets:
        work.details |= {"targets": targets, "binding_target": binding(targets)}


def _measured_loss(stage: spec.DropBlocks, context: Context, assignment: Assignment) -> Callable[[nn.Module], float]:
    """Cross-entropy on validation, or distillation loss on training images; the same images every time."""
    data, device = context.data, context.device
    # Candidates are compared with each other, so bf16's rounding is harmless.
    dtype = choose_precision(context.precision, device)
    if stage.metric == "val_loss":
        part = data.val.take(calibration_indices(data.val, stage.metric_images, assignment.seed))
        return lambda network: evaluate(network, part, data.spec, device=device, dtype=dtype)[1]
    assert assignment.teacher is not None, "the recipe validator demands a baseline before distillation"
    chosen = calibration_indices(data.train, stage.metric_images, assignment.seed)
    images, shown = data.train.images[chosen], context.baseline_data
    wanted = torch.log_softmax(
        predict(assignment.teacher, shown.train.images[chosen], shown.spec, device=device, dtype=dtype) / DISTILL_T,
        dim=1,
    )

    def distance(network: nn.Module) -> float:
        got = torch.log_softmax(predict(network, images, data.spec, device=device, dtype=dtype) / DISTILL_T, dim=1)
        return float(nn.functional.kl_div(got, wanted, log_target=True, reduction="batchmean"))

    return distance
