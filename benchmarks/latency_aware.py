"""Whether channels chosen by what they cost beat one common ratio at the same measured latency.

    python benchmarks/latency_aware.py RECIPE OUTPUT.json --target 0.5x [--seeds 1 2 3] [--epochs 4] [--set KEY=VALUE]

Takes a recipe's data, network and leading finetune, and then prunes to the target twice: `ranking: latency`, which
takes the channels that cost most for what they were measured to matter, and `ranking: local`, which takes the same
share of every group, as much as the target asks for. Both networks get the same finetune. Each is an ordinary run that
ends in a published float IR; the baseline is trained once for each seed.

Invariant: both plans aim at one latency, measured on the exported network in turns with the baseline, and both figures
are kept: what the comparison rests on can be checked.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measuring import keep

from compressor.errors import RecipeError
from compressor.pipeline import compress, leading_finetunes
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe
from compressor.report import Report

RANKINGS = ("latency", "local")


def variant(recipe: Recipe, ranking: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe with its leading finetunes, one prune stage and one finetune: same in all but the ranking."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    lead = tree["stages"][: leading_finetunes(recipe)]
    prune = {
        "type": "prune",
        "importance": args.importance,
        "ranking": ranking,
        "target": {"latency_ms": args.target},
        "round_to": 8,
        "reconstruction_images": args.reconstruction_images,
    }
    if ranking == "latency":
        prune["sensitivity_images"] = args.sensitivity_images
    recovery = {"type": "finetune", "epochs": args.epochs, "learning_rate": args.learning_rate}
    recovery["augment"] = lead[-1].get("augment", {})
    return {**tree, "seed": seed, "stages": [*lead, prune, recovery], "budget": {}}


def baseline_of(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe the figures depend on; where its files lie does not matter."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    model = {**tree["model"], "weights": Path(tree["model"].get("weights", "none")).name}
    data = {key: value for key, value in tree["data"].items() if key != "path"}
    return {
        "model": model,
        "data": data,
        "input": tree["input"],
        "stages": tree["stages"][: leading_finetunes(recipe)],
    }


def figures(report: Report) -> dict[str, Any]:
    """What the comparison is about, of one run."""
    pruned, trained = report.stages[-2:]
    assert report.result.latency_ms is not None
    assert report.baseline.latency_ms is not None
    assert report.result.macs is not None
    assert report.baseline.macs is not None
    return {
        "latency": report.result.latency_ms / report.baseline.latency_ms,
        "latency_in_stage": pruned["details"]["targets"]["latency_ms"],
        "macs": report.result.macs / report.baseline.macs,
        "val_accuracy_before": pruned["footprint"]["val_accuracy"],
        "val_accuracy_after": trained["footprint"]["val_accuracy"],
        "accuracy_after": report.result.accuracy,
        "baseline_accuracy": report.baseline.accuracy,
        "baseline_val_accuracy": report.baseline.val_accuracy,
        "recipe_hash": report.recipe["hash"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--target", default="0.5x")
    parser.add_argument("--importance", default="taylor")
    parser.add_argument("--sensitivity-images", type=int, default=128)
    parser.add_argument("--reconstruction-images", type=int, help="of both plans; none = channels are only cut off")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides).recipe
    if not leading_finetunes(recipe):
        raise RecipeError(f"{args.recipe}: stages begin without a finetune, so there is no baseline to prune")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for ranking in RANKINGS:
                file = Path(folder) / f"{ranking}-{seed}.yaml"
                file.write_text(json.dumps(variant(recipe, ranking, seed, args)))  # YAML, too
                report = compress(file, Path(folder) / file.stem)
                rows.append({"seed": seed, "ranking": ranking, **figures(report)})
                print(json.dumps(rows[-1]), flush=True)
    means = {
        ranking: {
            key: sum(row[key] for row in rows if row["ranking"] == ranking) / len(args.seeds)
            for key in ("latency", "macs", "val_accuracy_before", "val_accuracy_after", "accuracy_after")
        }
        for ranking in RANKINGS
    }
    setting: dict[str, Any] = {
        "baseline": baseline_of(recipe),
        "target": args.target,
        "epochs": args.epochs,
        "importance": args.importance,
    }
    setting |= {"sensitivity_images": args.sensitivity_images, "reconstruction_images": args.reconstruction_images}
    keep(args.output, {**setting, "learning_rate": args.learning_rate, "means": means, "rows": rows})


if __name__ == "__main__":
    main()
