"""Whether the transfer watch speaks up for weights that hurt, and is silent for weights that help.

    python benchmarks/transfer_watch.py RECIPE OUTPUT.json --weights FILE.safetensors [--steps 170] [--set KEY=VALUE]

Runs a recipe's first finetune, one step of it, with the watch: once with the weights as they are, and once with weights
that were spoilt on purpose: every BatchNorm's bias is so low that nothing passes the activations behind it, as where
units have died. Data, network and options are the recipe's.

Invariant: both are ordinary runs; what the watch said is copied from their reports.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import keep
from safetensors.torch import load_file, save_file

from compressor.pipeline import compress
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe

DEAD = -20.0


def spoilt(weights: Path, folder: Path) -> Path:
    """The same weights with dead units."""
    tensors = load_file(weights)
    for name in [name for name in tensors if name.endswith("running_var")]:
        bias = name.removesuffix("running_var") + "bias"
        tensors[bias] = tensors[bias].fill_(DEAD)
    save_file(tensors, folder / "spoilt.safetensors")
    return folder / "spoilt.safetensors"


def watched(recipe: Recipe, weights: Path, steps: int, folder: Path) -> dict[str, Any]:
    """What the watch found with these weights."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    first = {
        key: value for key, value in tree["stages"][0].items() if key not in ("epochs", "patience", "freeze", "ema")
    }
    tree["stages"] = [{**first, "steps": 1, "transfer_watch": {"steps": steps}}]
    tree["model"]["weights"], tree["budget"] = str(weights), {}
    stage = compress(Recipe.model_validate(tree), folder).stages[0]
    return {**stage["details"]["transfer_watch"], "warnings": [n for n in stage["notes"] if "transfer_watch" in n]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    overrides = [f"model.weights={args.weights}", *args.overrides]
    recipe = load_recipe(args.recipe, overrides).recipe
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "as they are": watched(recipe, args.weights, args.steps, folder / "good"),
            "spoilt": watched(recipe, spoilt(args.weights, folder), args.steps, folder / "bad"),
        }
    for which, one in found.items():
        print(which, one)
    keep(args.output, {"recipe": args.recipe.name, "size": recipe.input.size, "weights": found})


if __name__ == "__main__":
    main()
