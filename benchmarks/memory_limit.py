"""Whether a limit of the training memory is met, by which levers, and whether the training then stays below it.

    python benchmarks/memory_limit.py RECIPE OUTPUT.json [--limit 0.5x] [--steps 8] [--set KEY=VALUE]

Runs a recipe's first finetune, a few steps of it, under a limit relative to what the same finetune takes without. The
stage chooses the levers and the run trains with them; then the run's measurement of retraining, the same finetune in
a process of its own, is held against the limit.

Invariant: an ordinary run; every figure is copied from its report.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import keep

from compressor.pipeline import compress
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe


def limited(recipe: Recipe, limit: str, steps: int, folder: Path) -> dict[str, Any]:
    """What the limit was, what was tried and chosen, and what the training then took."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    first = {key: value for key, value in tree["stages"][0].items() if key not in ("epochs", "patience", "ema")}
    tree["stages"] = [{**first, "steps": steps, "memory": {**first.get("memory", {}), "limit": limit}}]
    tree["budget"] = {}
    report = compress(Recipe.model_validate(tree), folder)
    found, result = report.stages[0]["details"]["memory_levers"], report.result
    peak = result.retrain_peak_memory_bytes
    if peak is None:
        raise SystemExit(f"retraining memory was not measured: {report.notes}")
    return {
        **found,
        "train_peak_memory_bytes": result.train_peak_memory_bytes,  # with all that the run has in memory besides
        "retrain_avg_memory_bytes": result.retrain_avg_memory_bytes,
        "retrain_peak_memory_bytes": peak,
        "met": peak <= found["limit_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--limit", default="0.5x")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides).recipe
    setting = {
        "network": recipe.model.name,
        "size": recipe.input.size,
        "batch_size": recipe.stages[0].batch_size,
        "limit": args.limit,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures = limited(recipe, args.limit, args.steps, Path(folder) / "run")
    keep(args.output, {**setting, **figures})


if __name__ == "__main__":
    main()
