"""What a network still knows after a cut, before any training: readers refitted to what stays, or only cut off.

    python benchmarks/reconstruction.py RUN OUT.json [--ratios 0.125 0.25 0.5] [--images 512] [--importance taylor]

RUN has trained a baseline, finished or not (RUN or RUN.partial). Copies of it lose the same share of every channel
group; each is scored on validation as it comes out, and with BatchNorm statistics estimated anew.

Invariant: both ways remove the same channels.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

from measuring import keep

from compressor import environment
from compressor.backbone import input_spec, resolve_input
from compressor.channel_stages import loss_batches, moments_of
from compressor.checkpoint import load_network
from compressor.context import Context
from compressor.data.batches import to_input
from compressor.inference import evaluate, reestimate_batchnorm
from compressor.pipeline import leading_finetunes
from compressor.pruning.apply import apply_plan
from compressor.pruning.groups import find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import decide_plan
from compressor.pruning.reconstruction import reconstruct
from compressor.recipe import Prune
from compressor.recipe_loader import load_recipe
from compressor.resolution import load_data

BN_BATCHES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--importance", default="taylor")
    args = parser.parse_args()
    environment.prepare_process()
    recipe = resolve_input(load_recipe(args.run / "recipe.yaml").recipe, None)
    network = load_network(args.run / "stages" / f"{leading_finetunes(recipe) - 1:02d}-finetune").module.eval()
    data = load_data(recipe, input_spec(recipe, None))
    example = to_input(data.train.images[:1], data.spec, "cpu")
    context = Context(example, data, "cpu", args.run)
    groups = find_groups(network, example, ignored=())
    stage = Prune(pruning_ratio=0.5, importance=args.importance, reconstruction_images=args.images)
    batches = loss_batches(context, stage.importance_batches, 32, recipe.seed)
    scores = score_groups(network, groups, kind=stage.importance, loss_batches=batches, seed=recipe.seed)
    moments = moments_of(network, stage, groups, context, recipe.seed)
    rows: list[dict[str, Any]] = []
    for ratio in args.ratios:
        plan = decide_plan(
            network,
            example,
            groups=groups,
            scores=scores,
            ranking="local",
            pruning_ratio=ratio,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
        )
        for images, known in ((None, {}), (args.images, moments)):
            twin = copy.deepcopy(network)
            reconstruct(twin, groups, plan.keep, known)
            apply_plan(twin, plan, example)
            row: dict[str, Any] = {"pruning_ratio": ratio, "reconstruction_images": images}
            for bn_batches in (0, BN_BATCHES):
                reestimate_batchnorm(twin, data.train, data.spec, passes=bn_batches, seed=recipe.seed)
                accuracy, loss = evaluate(twin, data.val, data.spec)
                row[f"bn_batches_{bn_batches}"] = {"val_accuracy": accuracy, "val_loss": loss}
            rows.append(row)
            print(row, flush=True)
    accuracy, loss = evaluate(network, data.val, data.spec)
    setting = {"network": recipe.model.name, "input": list(example.shape[2:]), "val_images": len(data.val.labels)}
    setting["importance"] = args.importance
    keep(args.output, {**setting, "whole": {"val_accuracy": accuracy, "val_loss": loss}, "rows": rows})


if __name__ == "__main__":
    main()
