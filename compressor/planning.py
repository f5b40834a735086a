"""What a recipe would do to the network, without data or training: `compress.py plan`.

Invariant: writes nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.backbone import build_dense, input_spec
from compressor.data import class_labels
from compressor.errors import ResourceError
from compressor.models.counting import count
from compressor.models.custom import own_network
from compressor.pipeline import read_recipe
from compressor.report import Footprint
from compressor.resolution import examples_of
from compressor.simulation import simulate
from compressor.structure import check_scopes


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
    full = torch.zeros(1, 3, size.height, size.width)
    examples = examples_of(recipe.stages, (size.height, size.width))
    check_scopes(module, recipe.stages, full)
    counts = count(module, full)
    baseline = Footprint(params=counts.params, macs=counts.macs)
    rows = []
    edits: list[dict[str, Any]] = []
    for i, (stage, example) in enumerate(zip(recipe.stages, examples, strict=True)):
        what, skipped = simulate(stage, module, example, baseline, f"stages[{i}]", recipe.seed, edits)
        now = count(module, example)
        rows.append({"where": f"stages[{i}]", "what": what, "params": now.params, "macs": now.macs, "skipped": skipped})
        notes += [f"stages[{i}]: group {name} stays as it is: {reason}" for name, reason in skipped.items()]
    return {"baseline": {"params": baseline.params, "macs": baseline.macs}, "stages": rows, "notes": notes}
