"""What the stages of a recipe would do to the structure of a network, without data or training.

Invariant: which channels and blocks go is decided later, on trained weights: counts are exact for the stages whose
widths do not depend on them, and meet the same targets for the others.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, assert_never

import torch
from torch import nn

from compressor import recipe as spec
from compressor.channel_choice import choose_channels, choose_widths, prune_edit
from compressor.channel_stages import check_prune
from compressor.checkpoint import Network
from compressor.context import Context, assignment_of, located
from compressor.models.counting import count
from compressor.pruning.apply import apply_plan
from compressor.pruning.blocks import drop_blocks
from compressor.pruning.kernels import replace_kernels
from compressor.report import Footprint
from compressor.resolution import check_input
from compressor.stage_targets import KINDS, Bench, count_goals, what_is_measured
from compressor.structure import blocks_edit, choose_blocks, choose_kernels, enough_dropped, kernels_edit


def check_targets(
    network: Network, stages: Sequence[spec.Stage], example: torch.Tensor, contexts: Sequence[Context], seed: int
) -> None:
    """Find out before the first stage whether the targets of all stages can be reached.

    Args:
        network: Before the first stage; left as it is. Its weights do not matter.
        stages: Of the recipe.
        example: Input of the baseline.
        contexts: As each stage will have it.
        seed: The recipe's.

    Raises:
        RecipeError: A target is out of reach; the message tells the range.
    """
    twin = copy.deepcopy(network.module).eval()
    counts = count(twin, example)
    baseline = Footprint(params=counts.params, macs=counts.macs)
    edits: list[dict[str, Any]] = []
    for i, (stage, context) in enumerate(zip(stages, contexts, strict=True)):
        start = dataclasses.replace(network, edits=tuple(edits))
        assignment = assignment_of(stages, i, seed=seed, teacher=network.module, baseline=baseline, start=start)
        with Bench(twin, context, assignment) as bench:
            if isinstance(stage, spec.Prune):
                check_prune(twin, stage, bench)
            simulate(stage, twin, context.example, baseline, assignment.where, seed, edits, bench=bench)


def simulate(
    stage: spec.Stage,
    module: nn.Module,
    example: torch.Tensor,
    baseline: Footprint,
    where: str,
    seed: int,
    edits: list[dict[str, Any]],
    *,
    bench: Bench | None = None,
) -> tuple[str, dict[str, str]]:
    """Do to `module` what the stage would do to its structure; returns a description and the groups left alone.

    What is done is appended to `edits`. `bench` measures networks for a stage that drops blocks to a target that only
    measuring tells; without it, such a target is passed over.
    """
    goals = count_goals(stage, baseline)
    nouns = [KINDS[name].noun for name in what_is_measured(stage)]
    timed = f"; {' and '.join(nouns)} {'is' if len(nouns) == 1 else 'are'} measured in the run" if nouns else ""
    if timed and not goals and getattr(stage, "pruning_ratio", None) is None and bench is None:
        timed += ", and not counted here"
    match stage:
        case spec.Finetune():
            length = f"{stage.epochs} epochs" if stage.epochs else f"{stage.steps} steps"
            frozen = f", {', '.join(stage.freeze)} frozen" if stage.freeze else ""
            return f"finetune, {length}{', distilled' if stage.distill else ''}{frozen}", {}
        case spec.ReduceResolution():
            with located(where):
                check_input(module, example)
            return f"reduce_resolution to {stage.size[0]} x {stage.size[1]} pixels", {}
        case spec.Quantize():
            return f"quantize to {stage.precision}, {stage.subset_size} calibration images", {}
        case spec.Prune():
            if not goals and stage.pruning_ratio is None:
                return f"prune by {stage.importance} ({stage.ranking}){timed}", {}
            choice = choose_channels(module, example, stage, where=where, seed=seed)
            plan = choice.plan(goals, ratio=stage.pruning_ratio)
            apply_plan(module, plan, example)
            edits.append(prune_edit(plan))
            return f"prune by {stage.importance} ({stage.ranking}){timed}", dict(plan.skipped)
        case spec.ReduceChannels():
            plan = choose_widths(module, example, stage, where=where, seed=seed)
            apply_plan(module, plan, example)
            edits.append(prune_edit(plan))
            return f"reduce_channels to width {stage.width:g}", dict(plan.skipped)
        case spec.ReplaceKernels():
            names = choose_kernels(module, example, stage, where=where)
            replace_kernels(module, names, init=stage.init, seed=seed)
            edits.append(kernels_edit(names))
            return f"replace_kernels: {len(names)} convolutions become 1x1", {}
        case spec.DropBlocks():
            # Which blocks go is measured on the trained network; the first ones stand for them here.
            blocks = choose_blocks(module, example, stage, where=where)
            done = enough_dropped(stage, blocks, example, baseline, where=where, bench=bench, targets={})
            dropped = 0
            while not done(module, dropped):
                drop_blocks(module, [blocks[dropped]])
                dropped += 1
            edits.append(blocks_edit(module, blocks))
            return f"drop_blocks: {dropped} of {len(blocks)}{timed}", {}
        case _:
            assert_never(stage)
