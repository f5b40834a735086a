"""What INT8 is worth in depthwise convolutions: one range for all channels, one for each, or float.

    python benchmarks/depthwise_precision.py benchmarks/depthwise_precision.json [--size 160] [--images 64]
        [--weights xception=xception_imagenet_notop.fp16.safetensors mobilenetv2_100=mobilenetv2_notop.fp16.safetensors]

The other layers are INT8 in all three. Networks without weights are random, and so is every head: the error is that of
logits against the float network's, not of answers.

Invariant: latencies are of published IRs at OpenVINO's default precision, in turns, compiled anew in each round; the
ratios are of one round, and the median of the rounds counts. The environment says which instructions the processor has.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_targets import NETWORKS, pictures
from measuring import keep, summary
from numpy.typing import NDArray
from torch import nn

from compressor import environment
from compressor.benchmark import Candidate, audit, cpu_capabilities, measure_latency
from compressor.context import Context
from compressor.data.batches import to_input
from compressor.export import convert_float_ir, convert_ir, save_ir, trace_int8
from compressor.inference import frozen_copy
from compressor.models import build
from compressor.models.weights import load_into, read_tensors
from compressor.quantize_stage import calibration, quantize_as_told
from compressor.recipe import Quantize
from compressor.runtime import F32, predict

ROUNDS, CALLS, CALIBRATION = 7, 100, 32
ARGUMENTS = {"mobilenetv2_100": {"pad_type": "same", "bn_eps": 1e-3}}  # what its weights at hand were trained with


def depthwise(module: nn.Module) -> list[str]:
    """Names of convolutions of one filter a channel."""
    return [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels]


def sqnr_db(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Signal to quantization noise, in dB; of the logits' differences from their mean, which is all that decides."""
    centred = wanted - wanted.mean(0)
    return float(10 * np.log10((centred**2).sum() / ((found - wanted) ** 2).sum()))


def compared(name: str, module: nn.Module, context: Context, images: int) -> dict[str, Any]:
    """Latency and error of a network with its depthwise convolutions in each precision."""
    layers = depthwise(module)
    stages = {
        "per_tensor": Quantize(subset_size=CALIBRATION),
        "per_channel": Quantize(subset_size=CALIBRATION, per_channel_activations=True),
        "float_depthwise": Quantize(subset_size=CALIBRATION, ignored_scope=tuple(layers)),
    }
    data = context.data
    shown = np.asarray(data.train.images[:images])
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.xml" for kind in ("float", *stages)}
        save_ir(convert_float_ir(module, data.spec, data.labels), files["float"])
        for kind, stage in stages.items():
            batches = calibration(stage, context, seed=0)
            quantized = quantize_as_told(frozen_copy(module), stage, batches, context, where=kind).module
            save_ir(convert_ir(trace_int8(quantized, data.spec), data.spec, data.labels), files[kind])
        candidates = {kind: Candidate(xml) for kind, xml in files.items()}
        rounds = [measure_latency(candidates, shown[:8], calls=CALLS) for _ in range(ROUNDS)]
        wanted = predict(files["float"], shown, F32)
        rows = {}
        for kind, xml in files.items():
            ran = audit(xml)
            rows[kind] = {
                "latency_ms": summary([found[kind].median_ms for found in rounds]),
                "of_per_tensor": summary([found[kind].median_ms / found["per_tensor"].median_ms for found in rounds]),
                "sqnr_db": None if kind == "float" else sqnr_db(wanted, predict(xml, shown)),
                "convolutions": ran["convolutions"],
                "reorders": ran["reorders"],
                "threads": rounds[0][kind].threads,
            }
    return {"network": name, "depthwise_layers": len(layers), "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--networks", nargs="+", default=["xception", "mobilenetv2_100"], choices=list(NETWORKS))
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    args = parser.parse_args()
    environment.prepare_process()
    weights = dict(entry.split("=", 1) for entry in args.weights)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(args.size, Path(folder) / "data")
        context = Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", Path(folder))
        for name in args.networks:
            source, architecture = NETWORKS[name]
            torch.manual_seed(0)
            module = build(source, architecture, ARGUMENTS.get(name, {}), len(data.labels)).eval()
            if name in weights:
                load_into(
                    module,
                    read_tensors(Path(weights[name])),
                    head="classifier" if source == "timm" else "fc",
                    source=name,
                    sha256=None,
                )
            rows.append(
                compared(name, module, context, args.images) | {"weights": Path(weights.get(name, "none")).name}
            )
            print(rows[-1], flush=True)
    keep(
        args.output,
        {"size": args.size, "images": args.images, "rounds": ROUNDS, "cpu": cpu_capabilities(), "rows": rows},
    )


if __name__ == "__main__":
    main()
