"""What the published networks cost: latency in turns, throughput, size, and the footprints made of it.

Invariant: what is timed is a published file; PyTorch's own time is measured for reference only.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from compressor.benchmark import Candidate, audit, cpu_capabilities, measure_latency, measure_throughput
from compressor.checkpoint import Network
from compressor.context import Context
from compressor.data import Dataset
from compressor.export import ir_bytes
from compressor.inference import evaluate
from compressor.models.counting import count
from compressor.recipe import BenchmarkSection
from compressor.report import Footprint
from compressor.runtime import F32


@dataclass(frozen=True)
class Networks:
    """The networks a run measures; `quantized` is None without a `quantize` stage."""

    baseline: Network
    baseline_trained: bool
    lead: int  # number of stages before the baseline
    floating: Network
    quantized: Network | None

    @property
    def result(self) -> Network:
        """What is deployed."""
        return self.quantized or self.floating


def measure_speed(
    context: Context, options: BenchmarkSection, networks: Networks, files: Mapping[str, Path]
) -> dict[str, Any]:
    """Latency interleaved over baseline and result, throughput, PyTorch for reference, and what really ran in INT8."""
    data = context.data
    images = data.test.images[:64]
    dense = context.baseline_data.test.images[:64]
    candidates = {
        "baseline": Candidate(files["baseline"], F32, dense),
        "baseline_default": Candidate(files["baseline"], images=dense),
        "result": Candidate(files["result"]),
    }
    if networks.quantized is not None:
        candidates["result_fp32"] = Candidate(files["floating"], F32)
        candidates["result_fp32_default"] = Candidate(files["floating"])
    latency = measure_latency(candidates, images, calls=options.calls, threads=options.threads)
    pair = {name: candidates[name] for name in ("baseline", "result")}
    native = measure_latency(
        {name: dataclasses.replace(candidate, images=None) for name, candidate in pair.items()},
        _native_images(data.native_size, images),
        calls=options.calls,
        threads=options.threads,
    )
    floating = latency.get("result_fp32_default")
    speed: dict[str, Any] = {
        # Of the same network at the same precision hint, float against quantized: what INT8 alone is good for here.
        "int8_gain": floating.median_ms / latency["result"].median_ms if floating else None,
        "latency": {name: dataclasses.asdict(value) for name, value in latency.items()},
        "latency_native": {name: dataclasses.asdict(value) for name, value in native.items()},
        "native_size": list(data.native_size),
        "audit": {name: audit(c.xml, c.config) for name, c in pair.items()},
        "torch_eager_ms": {
            "baseline": _eager_ms(networks.baseline),
            "result_float": _eager_ms(networks.floating),
        },
        "cpu": cpu_capabilities(),
    }
    if options.throughput_s:
        throughput = measure_throughput(pair, images, seconds=options.throughput_s, threads=options.threads)
        speed["throughput_fps"] = {name: figures.fps for name, figures in throughput.items()}
        speed["joules_per_image"] = {name: figures.joules_per_image for name, figures in throughput.items()}
    return speed


def _native_images(
    size: tuple[int, int], images: np.ndarray[Any, np.dtype[np.uint8]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A few images scaled to the data set's median size (height, width); only their size matters for the timing."""
    height, width = size
    scaled = [np.asarray(Image.fromarray(np.asarray(image)).resize((width, height))) for image in images[:8]]
    return np.stack(scaled)


@torch.no_grad()
def _eager_ms(network: Network, calls: int = 20) -> float:
    """Median milliseconds of PyTorch in eager mode, batch 1, float32, channels_last: for reference."""
    module = network.module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = torch.zeros(1, *network.input).to(memory_format=torch.channels_last)
    times = []
    for call in range(calls + 3):
        started = time.perf_counter()
        module(example)
        if call >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times))


def footprint_of(
    data: Dataset,
    network: Network,
    name: str,
    xml: Path,
    accuracy: Mapping[str, Any],
    speed: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> Footprint:
    """All that was measured on a published network; `records` are of the stages that led to it, `data` at its size."""
    latency, native = speed["latency"], speed["latency_native"]
    known = accuracy.get(name)
    counts = count(network.module, torch.zeros(1, *network.input))
    default = latency["baseline_default" if name == "baseline" else "result"]["median_ms"]
    return Footprint(
        params=counts.params,
        macs=counts.macs,
        size_bytes=ir_bytes(xml),
        latency_ms=latency[name]["median_ms"],
        latency_p95_ms=latency[name]["p95_ms"],
        latency_default_ms=default,
        latency_native_ms=native[name]["median_ms"],
        throughput_fps=speed.get("throughput_fps", {}).get(name),
        accuracy=known["accuracy"] if known else None,
        accuracy_ci=known["ci"] if known else None,
        # The last stage measured it on these very weights.
        val_accuracy=records[-1]["footprint"]["val_accuracy"]
        if records
        else evaluate(network.module, data.val, data.spec)[0],
        **_training_cost(records),
    )


def _training_cost(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, mean and peak memory over all stages that trained; None where none did."""
    costs = [r["footprint"] for r in records if r["footprint"].get("train_time_s")]
    if not costs:
        return {}
    seconds = sum(c["train_time_s"] for c in costs)
    return {
        "train_time_s": seconds,
        "train_avg_memory_bytes": round(sum(c["train_avg_memory_bytes"] * c["train_time_s"] for c in costs) / seconds),
        "train_peak_memory_bytes": max(c["train_peak_memory_bytes"] for c in costs),
    }
