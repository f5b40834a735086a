"""What each lever takes from Xception's latency: smaller images, fewer blocks, INT8, alone and together.

    python benchmarks/levers.py benchmarks/levers.json [--sizes 160 144 128 112 96] [--drops 0 2 4 6 8]

Weights are random, which the clock does not mind. Each variant is deployed in INT8 and timed in turns with the dense
network at the first size, at f32 and at OpenVINO's default precision.

Invariant: every ratio is of two figures of the same turns.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from latency_targets import pictures
from measuring import keep

from compressor import environment
from compressor.benchmark import Candidate, measure_latency
from compressor.context import Context
from compressor.data.batches import to_input
from compressor.export import convert_float_ir, save_ir
from compressor.inference import frozen_copy
from compressor.models import build
from compressor.pruning.blocks import drop_blocks
from compressor.quantize_stage import deployed_ir
from compressor.recipe import Quantize
from compressor.runtime import F32

CLASSES = 101
CALLS = 150
MIDDLE = [f"block{i}" for i in range(4, 12)]  # Xception's middle flow: eight blocks alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 144, 128, 112, 96])
    parser.add_argument("--drops", type=int, nargs="+", default=[0, 2, 4, 6, 8])
    args = parser.parse_args()
    environment.prepare_process()
    torch.manual_seed(0)
    dense = build("builtin", "xception", {}, CLASSES).eval()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        baseline = folder / "dense.xml"
        for size in args.sizes:
            data = pictures(size, folder / "data")
            data = dataclasses.replace(data, labels=tuple(map(str, range(CLASSES))))
            context = Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", folder)
            images = np.asarray(data.train.images[:8])
            if size == args.sizes[0]:
                save_ir(convert_float_ir(dense, data.spec, data.labels), baseline)
                shown = images
            for drops in args.drops:
                network = frozen_copy(dense)
                drop_blocks(network, MIDDLE[:drops])
                variant = folder / f"{size}-{drops}.xml"
                save_ir(deployed_ir(network, Quantize(subset_size=32), context, where="stages[0]"), variant)
                candidates = {
                    "dense_f32": Candidate(baseline, F32, shown),
                    "dense_default": Candidate(baseline, {}, shown),
                    "int8": Candidate(variant, {}, images),
                }
                timed = {
                    key: found.median_ms for key, found in measure_latency(candidates, images, calls=CALLS).items()
                }
                row = {"size": size, "dropped_blocks": drops, **{f"{key}_ms": ms for key, ms in timed.items()}}
                row |= {"times_f32": timed["dense_f32"] / timed["int8"]}
                row |= {"times_default": timed["dense_default"] / timed["int8"]}
                rows.append(row)
                print(row, flush=True)
    keep(args.output, {"network": "xception", "classes": CLASSES, "rows": rows})


if __name__ == "__main__":
    main()
