"""What a recipe would do to the network, without data or training: `compress.py plan`.

Invariant: writes nothing. Which channels and blocks go is decided later, on trained weights: counts are exact for the
stages whose widths do not depend on them, and meet the same targets for the others.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from compressor import recipe as spec
from compressor.backbone import build_dense, input_spec
from compressor.data import class_labels
from compressor.errors import ResourceError
from compressor.models.counting import count
from compressor.models.custom import own_network
from compressor.pipeline import read_recipe
from compressor.pruning.apply import apply_plan
from compressor.pruning.blocks import drop_blocks
from compressor.pruning.kernels import replace_kernels
from compressor.report import Footprint
from compressor.structure import (
    check_scopes,
    choose_blocks,
    choose_channels,
    choose_kernels,
    choose_widths,
    enough_dropped,
    measures_latency,
    prune_goals,
)


def plan_recipe(
    path: Path, overrides: Sequence[str] = (), model: nn.Module | Callable[[int], nn.Module] | None = None
) -> dict[str, Any]:
    """Predict parameters and MACs after every stage; `model` is a caller's own network, as in `compress`.

    Returns:
        JSON: `baseline` (params, macs), `stages` (where, what, params, macs, skipped) and `notes`.

    Raises:
        RecipeError: the recipe is wrong, or a target cannot be reached.
        DataError: the data's classes cannot be listed.
    """
    own = own_network(model) if model is not None else None
    recipe = read_recipe(path, overrides, own)[0]
    torch.manual_seed(recipe.seed)
    labels = class_labels(recipe.data.source, recipe.data.path)
    notes = [f"{len(labels)} classes"]
    try:
        module = build_dense(recipe, len(labels), own, offline=True).module.eval()
    except ResourceError as error:
        notes.append(f"planned on random weights ({error})")
        unweighted = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "none"})})
        module = build_dense(unweighted, len(labels), own).module.eval()
    size = input_spec(recipe, own)
    example = torch.zeros(1, 3, size.height, size.width)
    check_scopes(module, recipe.stages, example)
    counts = count(module, example)
    baseline = Footprint(params=counts.params, macs=counts.macs)
    rows = []
    for i, stage in enumerate(recipe.stages):
        what, skipped = _simulate(stage, module, example, baseline, f"stages[{i}]", recipe.seed)
        now = count(module, example)
        rows.append({"where": f"stages[{i}]", "what": what, "params": now.params, "macs": now.macs, "skipped": skipped})
        notes += [f"stages[{i}]: group {name} stays as it is: {reason}" for name, reason in skipped.items()]
    return {"baseline": {"params": baseline.params, "macs": baseline.macs}, "stages": rows, "notes": notes}


def _simulate(
    stage: spec.Stage, module: nn.Module, example: torch.Tensor, baseline: Footprint, where: str, seed: int
) -> tuple[str, dict[str, str]]:
    """Do to `module` what the stage would do to its structure; returns a description and the groups left alone."""
    match stage:
        case spec.Finetune():
            length = f"{stage.epochs} epochs" if stage.epochs else f"{stage.steps} steps"
            frozen = f", {', '.join(stage.freeze)} frozen" if stage.freeze else ""
            return f"finetune, {length}{', distilled' if stage.distill else ''}{frozen}", {}
        case spec.Quantize():
            return f"quantize to {stage.precision}, {stage.subset_size} calibration images", {}
        case spec.Prune():
            macs, params = prune_goals(stage, baseline)
            timed = "; its latency target is measured in the run" if measures_latency(stage) else ""
            if timed and macs is None and params is None:
                return f"prune by {stage.importance} ({stage.ranking}){timed}, and is not counted here", {}
            plan = choose_channels(
                module, example, stage, where=where, seed=seed, ratio=stage.pruning_ratio, macs=macs, params=params
            )
            apply_plan(module, plan, example)
            return f"prune by {stage.importance} ({stage.ranking}){timed}", dict(plan.skipped)
        case spec.ReduceChannels():
            plan = choose_widths(module, example, stage, where=where, seed=seed)
            apply_plan(module, plan, example)
            return f"reduce_channels to width {stage.width:g}", dict(plan.skipped)
        case spec.ReplaceKernels():
            names = choose_kernels(module, example, stage, where=where)
            replace_kernels(module, names, init=stage.init, seed=seed)
            return f"replace_kernels: {len(names)} convolutions become 1x1", {}
        case spec.DropBlocks():
            # Which blocks go is measured on the trained network; the first ones stand for them here.
            blocks = choose_blocks(module, example, stage, where=where)
            done = enough_dropped(stage, blocks, example, baseline, where=where)
            dropped = 0
            while not done(module, dropped):
                drop_blocks(module, [blocks[dropped]])
                dropped += 1
            return f"drop_blocks: {dropped} of {len(blocks)}", {}
        case _:
            assert_never(stage)
