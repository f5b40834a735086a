"""Time to publish a network in FP32 and INT8 and to check the files against it, at the size Xception is deployed at.

    python benchmarks/export_time.py benchmarks/export_time.json [--weights xception_imagenet.safetensors]

Each round is a fresh process, as each run is, so that nothing is warm: it traces, simplifies, writes ONNX and IR of
both, and compares torch, onnxruntime and OpenVINO on the images. Quantizing itself comes before and is not counted.

Invariant: the functions are those a run calls, in its order, nothing left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import keep, summary

from compressor import environment
from compressor.data.batches import to_input
from compressor.export import publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.models.weights import load_weights
from compressor.models.xception import Xception
from compressor.parity import Parity, check_float, check_int8
from compressor.preprocess import InputSpec
from compressor.quantization import quantize


def farthest(parity: Parity) -> float:
    """Largest difference of a logit between any two runtimes, as a fraction of the logits' range."""
    return max(float("inf") if pair.difference is None else pair.difference for pair in parity.pairs.values())


def once(size: int, images: int, weights: Path | None) -> dict[str, Any]:
    """Seconds of each part, and how well the runtimes agree."""
    environment.prepare_process()
    torch.manual_seed(0)
    spec = InputSpec(height=size, width=size)
    pictures = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    labels = [f"class {index}" for index in range(101)]
    network = Xception(len(labels))
    if weights:
        load_weights(network, name="xception", weights=str(weights), head="fc")
    network.eval()
    fold_batchnorm(network, to_input(pictures[:1], spec, "cpu"))
    quantized, _ = quantize(network, [to_input(pictures[i : i + 1], spec, "cpu") for i in range(4)])
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        floating = publish_float(network, spec, labels, Path(folder) / "fp32")
        seconds["export fp32"] = time.perf_counter() - started
        integer = publish_int8(quantized, spec, labels, Path(folder) / "int8")
        seconds["export int8"] = time.perf_counter() - started - sum(seconds.values())
        dense = check_float(network, floating.onnx, floating.xml, pictures, spec)
        seconds["parity fp32"] = time.perf_counter() - started - sum(seconds.values())
        int8 = check_int8(quantized, integer.onnx, integer.xml, pictures, spec)
        seconds["parity int8"] = time.perf_counter() - started - sum(seconds.values())
    seconds["total"] = sum(seconds.values())
    return {"seconds": seconds, "fp32_difference": farthest(dense), "int8_difference": farthest(int8)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--weights", type=Path, help="safetensors file; random weights without")
    parser.add_argument("--size", type=int, default=299, help="input side in pixels")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(once(args.size, args.images, args.weights)))
        return 0
    command = [sys.executable, __file__, "--child", "--size", str(args.size), "--images", str(args.images)]
    command += ["--weights", str(args.weights)] if args.weights else []
    rounds = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(args.rounds)
    ]
    figures = {name: summary([found["seconds"][name] for found in rounds]) for name in rounds[0]["seconds"]}
    setting = {"size": args.size, "images": args.images, "rounds": args.rounds, "pretrained": args.weights is not None}
    agreement = {name: max(found[name] for found in rounds) for name in ("fp32_difference", "int8_difference")}
    keep(args.output, {**setting, "seconds": figures, **agreement})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
