"""Accuracy of quantization-aware training after equal epochs: our quantizers against NNCF's own, or BatchNorms folded
into the layers before them, as `quantize` does it, against BatchNorms that stay and are frozen.

    python benchmarks/qat_accuracy.py RUN/stages/03-finetune caltech101 caltech101.tar benchmarks/qat_accuracy.json
    python benchmarks/qat_accuracy.py ... benchmarks/qat_batchnorm.json --compare batchnorm

Takes the float network of a finished stage, quantizes every layer of it, and trains copies of the result: for each seed
one of either kind. NNCF's stock quantizers train in float32, all others in the precision `finetune` would choose here.

Invariant: start, data, order of images and learning rate are the same for both; what is compared is the network after
its last epoch, scored in float32, as near to what is deployed as torch comes; nothing is chosen on the images it is
scored on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from qat_step import stock_kernels, use_kernels
from torch import nn

from compressor import environment, training
from compressor.artifacts import write_json
from compressor.checkpoint import load_network
from compressor.data import calibration_indices, load_dataset
from compressor.data.batches import Augment, to_input
from compressor.fake_quantize import KERNELS
from compressor.feed import freezing
from compressor.folding import fold_batchnorm
from compressor.inference import evaluate
from compressor.preprocess import InputSpec
from compressor.quantization import quantize
from compressor.training import finetune


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy after training, averaged over the seeds so far."""
    names = {row["variant"] for row in rows}
    return {name: statistics.mean(row["after"] for row in rows if row["variant"] == name) for name in sorted(names)}


def evaluate_in_float32(*args: Any, **options: Any) -> tuple[float, float]:
    """What `finetune` validates with, in float32 whatever it trains in."""
    return evaluate(*args, **(options | {"dtype": torch.float32}))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", type=Path, help="folder of a finished stage, before any quantize")
    parser.add_argument("source", help="data.source")
    parser.add_argument("path", type=Path, help="data.path")
    parser.add_argument("output", type=Path, help="JSON file to write, after every training")
    parser.add_argument("--size", type=int, default=160, help="input side in pixels")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images-per-class", type=int, help="training images of a class at most (default: all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--compare", choices=("kernels", "batchnorm"), default="kernels")
    args = parser.parse_args()
    variants = {"kernels": ("stock", "ours"), "batchnorm": ("folded", "frozen")}[args.compare]
    spec = InputSpec(height=args.size, width=args.size)
    cache = environment.cache_dir() / "data"
    data = load_dataset(
        source=args.source, path=args.path, spec=spec, cache=cache, seed=0, images_per_class=args.images_per_class
    )
    settings = {
        "size": args.size,
        "epochs": args.epochs,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
    }
    training.evaluate = evaluate_in_float32
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for name in variants:
            kernels = stock_kernels() if name == "stock" else KERNELS
            use_kernels(kernels)
            module = load_network(args.stage).module
            if name != "frozen":
                fold_batchnorm(module, to_input(data.train.images[:1], spec, "cpu"))
            chosen = calibration_indices(data.train, 300, seed)
            torch.manual_seed(seed)
            network, _ = quantize(module, [to_input(data.train.images[i : i + 1], spec, "cpu") for i in chosen])
            use_kernels(kernels)  # `quantize` installs ours
            norms = {key for key, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
            with freezing(network, norms) as frozen:
                result = finetune(
                    network,
                    train=data.train,
                    val=data.test,
                    spec=spec,
                    epochs=args.epochs,
                    batch_size=args.batch,
                    learning_rate=args.learning_rate,
                    augment=Augment(),
                    precision="float32" if name == "stock" else "auto",
                    frozen=frozen,
                    seed=seed,
                )
            last = result.history[-1]
            row = {
                "variant": name,
                "batchnorms": len(norms),
                "seed": seed,
                "before": result.start_accuracy,
                "after": last.val_accuracy,
            }
            rows.append(row | {"loss": last.loss, "precision": result.precision, "seconds": round(last.seconds)})
            print(json.dumps(rows[-1]), flush=True)
            write_json(
                args.output, settings | {"mean": means(rows), "rows": rows, "environment": environment.describe()}
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
