"""Whether latency targets are met: networks pruned to fractions of their dense FP32 latency, deployed in INT8.

    python benchmarks/latency_targets.py benchmarks/latency_targets.json [--size 160] [--targets 0.25x 0.15x 0.08x]

Weights are random, which the clock does not mind. Each network is pruned as a recipe's `prune` stage does it; then the
INT8 network is exported once more and timed beside its dense FP32 IR, apart from the measurements the stage chose by.

Invariant: a row is a target that was met (or missed, as measured), or refused with the range that can be reached.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import keep
from pydantic import TypeAdapter
from torch import nn

from compressor import environment
from compressor.benchmark import Candidate, measure_latency
from compressor.channel_stages import prune_stage
from compressor.context import Assignment, Context, Work
from compressor.data import Dataset, load_dataset
from compressor.data.batches import to_input
from compressor.errors import RecipeError
from compressor.export import convert_float_ir, save_ir
from compressor.inference import frozen_copy
from compressor.models import build
from compressor.models.counting import count
from compressor.preprocess import InputSpec
from compressor.quantize_stage import deployed_ir
from compressor.recipe import Prune, Quantize
from compressor.recipe_bounds import LATENCY_TOLERANCE, OVERSHOOT
from compressor.report import Footprint
from compressor.runtime import F32

NETWORKS = {
    "xception": ("builtin", "xception"),
    "mobilenetv2_100": ("timm", "mobilenetv2_100"),
    "resnet18": ("timm", "resnet18"),
}
CALLS, ROUNDS = 300, 5
QUANTIZE = ("stages[1]", Quantize(subset_size=32))


def pictures(size: int, cache: Path) -> Dataset:
    """Images to calibrate and time with; what they show does not matter."""
    return load_dataset(
        source="synthetic_pcb",
        path=None,
        spec=InputSpec(size, size),
        cache=cache,
        train_per_class=16,
        val_per_class=4,
        test_per_class=4,
    )


def tried(name: str, module: nn.Module, target: str, context: Context) -> dict[str, Any]:
    """Prune a copy to the target and measure what came out."""
    dense = frozen_copy(module)
    counts = count(dense, context.example)
    network = frozen_copy(module)
    stage = TypeAdapter(Prune).validate_python(
        {"type": "prune", "ranking": "latency", "target": {"latency_ms": target}, "round_to": 8, "bn_batches": 0}
    )
    work = Work({}, [], [])
    assignment = Assignment(0, 0, dense, Footprint(params=counts.params, macs=counts.macs), QUANTIZE)
    row: dict[str, Any] = {"network": name, "target": target}
    started = time.perf_counter()
    try:
        prune_stage(network, stage, context, assignment, work)
    except RecipeError as error:
        return row | {"status": "refused", "reason": str(error), "seconds": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.xml", "result": Path(folder) / "result.xml"}
        save_ir(convert_float_ir(dense, context.data.spec, context.data.labels), files["dense"])
        save_ir(deployed_ir(network, QUANTIZE[1], context, where=QUANTIZE[0]), files["result"])
        candidates = {"dense": Candidate(files["dense"], F32), "result": Candidate(files["result"])}
        times = measure_latency(candidates, np.asarray(context.data.train.images[:8]), calls=CALLS, rounds=ROUNDS)
    fraction = times["result"].median_ms / times["dense"].median_ms
    asked = float(target.removesuffix("x"))
    found = work.details["targets"]["latency_ms"]
    predicted = found["predicted"] / found["goal"] * asked
    return row | {
        "status": "met" if fraction <= LATENCY_TOLERANCE * asked else "missed",
        "overshoot": fraction < OVERSHOOT * asked,
        "fraction": fraction,
        "dense_ms": times["dense"].median_ms,
        "result_ms": times["result"].median_ms,
        "fraction_in_stage": found["measured"] / found["goal"] * asked,
        "fraction_predicted": predicted,
        "prediction_error": predicted / fraction - 1,
        "probes": len(found["probes"]),
        "model": work.details["latency_model"],
        "macs": count(network, context.example).macs / counts.macs,
        "left_alone": work.notes,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--targets", nargs="+", default=["0.25x", "0.15x", "0.08x"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    args = parser.parse_args()
    environment.prepare_process()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(args.size, Path(folder) / "data")
        context = Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", Path(folder))
        for name in args.networks:
            torch.manual_seed(0)
            module = build(*NETWORKS[name], {}, len(data.labels)).eval()
            for target in args.targets:
                rows.append(tried(name, module, target, context))
                print(rows[-1], flush=True)
    keep(args.output, {"size": args.size, "precision": "int8", "rows": rows})


if __name__ == "__main__":
    main()
