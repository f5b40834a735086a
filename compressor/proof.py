"""From trained networks to published artifacts and a verdict: export, parity, accuracy, latency, audit.

Invariant: everything in the report is measured on the files that are published, and test images are read here only.
"""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from compressor import environment
from compressor.artifacts import Artifact, sha256_of
from compressor.benchmark import Candidate, audit, cpu_capabilities, measure_latency, measure_throughput
from compressor.checkpoint import Network
from compressor.clock import Clock
from compressor.context import Context
from compressor.export import convert_float_ir, publish_float, publish_int8, save_ir
from compressor.inference import evaluate
from compressor.metrics import paired_interval, top1, wilson_interval
from compressor.models.counting import count
from compressor.parity import check_float, check_int8, violations
from compressor.recipe import Finetune, Quantize, Recipe
from compressor.recipe_loader import recipe_hash
from compressor.report import Footprint, Report
from compressor.runtime import DEFAULT, F32, predict

log = logging.getLogger(__name__)
RETRAIN_STEPS = 12  # enough for the optimiser's state and the largest activations to be resident


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


def prove(
    context: Context,
    recipe: Recipe,
    networks: Networks,
    *,
    records: Sequence[dict[str, Any]],
    precision: Mapping[str, Any],
    clock: Clock,
    weights: dict[str, Any],
    notes: Sequence[str],
) -> Report:
    """Publish the networks, measure them, and judge the result.

    A failed gate or budget removes `artifacts/`; everything measured stays in the report.
    """
    folder = context.run_dir / "artifacts"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    extra: list[str] = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        log.info("%s", name)
        with clock(name):
            yield

    with timed("export"):
        files = _export(folder, context, recipe, networks, extra)
    with timed("parity"):
        parity, missed = _parity(context, recipe, networks, files)
    with timed("accuracy"):
        accuracy = _accuracy(context, networks, files)
    with timed("benchmark"):
        speed = _benchmark(context, recipe, networks, files)
    with timed("retraining memory"):
        retrain = _retrain_memory(context, recipe, records)
        if "error" in retrain:
            extra.append(f"retraining memory was not measured: {retrain['error']}")
    leading = [r for r in records if r["index"] < networks.lead]
    baseline = _footprint(context, networks.baseline, "baseline", files["baseline"], accuracy, speed, leading)
    result = dataclasses.replace(
        _footprint(context, networks.result, "result", files["result"], accuracy, speed, records),
        retrain_avg_memory_bytes=retrain.get("average_bytes"),
        retrain_peak_memory_bytes=retrain.get("peak_bytes"),
    )
    missed += recipe.budget.violations(result.to_json(), baseline.to_json())
    extra += recipe.budget.overshoots(result.to_json(), baseline.to_json())
    if missed:
        shutil.rmtree(folder)
    for line in missed:
        log.warning("missed: %s", line)
    return Report(
        verdict={"status": "failed" if missed else "passed", "reasons": missed},
        baseline=baseline,
        result=result,
        stages=tuple(records),
        artifacts=()
        if missed
        else tuple(
            _describe(context.run_dir, path, networks.result.input, len(context.data.labels))
            for path in sorted(folder.iterdir())
        ),
        parity=parity,
        audit=speed.pop("audit"),
        benchmark={**speed, "accuracy": accuracy, "memory_floor_bytes": retrain.get("floor_bytes")},
        data={"fingerprint": context.data.fingerprint, "labels": list(context.data.labels), **context.data.info},
        weights=weights,
        recipe={"hash": recipe_hash(recipe), **recipe.model_dump(mode="json")},
        environment={
            **environment.describe(),
            "torch_threads": torch.get_num_threads(),
            "training_device": context.device,
            "training_precision": precision,
        },
        timing={**clock.seconds, "total": clock.elapsed()},
        notes=(*notes, *extra),
    )


def _export(folder: Path, context: Context, recipe: Recipe, networks: Networks, notes: list[str]) -> dict[str, Path]:
    """Write every artifact; returns the IR of the baseline and of the result, and what parity compares."""
    data, opset = context.data, recipe.export.opset
    files = {"baseline": folder / "baseline_fp32.xml"}
    save_ir(convert_float_ir(networks.baseline.module, data.spec, data.labels), files["baseline"])
    published = publish_float(networks.floating.module, data.spec, data.labels, folder / "result_fp32", opset=opset)
    assert published.onnx is not None
    files["floating"], files["floating_onnx"], files["result"] = published.xml, published.onnx, published.xml
    if networks.quantized is not None:
        published = publish_int8(networks.quantized.module, data.spec, data.labels, folder / "result_int8", opset=opset)
        files["result"] = files["quantized"] = published.xml
        if published.onnx is None:
            notes.append("no INT8 ONNX: onnxruntime refuses per-channel activations (quantize.per_channel_activations)")
        else:
            files["quantized_onnx"] = published.onnx
    return files


def _parity(
    context: Context, recipe: Recipe, networks: Networks, files: Mapping[str, Path]
) -> tuple[dict[str, Any], list[str]]:
    """Compare torch, ONNX and IR on seeded test images; returns the figures and what missed the gate."""
    data = context.data
    order = np.random.default_rng(recipe.seed).permutation(len(data.test.labels))
    chosen = np.sort(order[: recipe.export.parity_images])
    images = data.test.images[chosen]
    dense = check_float(networks.baseline.module, None, files["baseline"], images, data.spec)
    floating = check_float(networks.floating.module, files["floating_onnx"], files["floating"], images, data.spec)
    figures: dict[str, Any] = {
        "images": len(images),
        "baseline": dataclasses.asdict(dense),
        "float": dataclasses.asdict(floating),
    }
    missed = [f"baseline: {line}" for line in violations(dense)] + violations(floating)
    if networks.quantized is not None:
        int8 = check_int8(networks.quantized.module, files.get("quantized_onnx"), files["quantized"], images, data.spec)
        figures["int8"] = dataclasses.asdict(int8)
        missed += violations(int8)
    return figures, [f"parity: {line}" for line in missed]


def _accuracy(context: Context, networks: Networks, files: Mapping[str, Path]) -> dict[str, Any]:
    """Top-1 on the test split, measured on the published IR through its own preprocessing."""
    data = context.data
    labels = np.asarray(data.test.labels)
    right = {"result": top1(predict(files["result"], data.test.images, DEFAULT), labels)}
    if networks.baseline_trained:
        right["baseline"] = top1(predict(files["baseline"], data.test.images, F32), labels)
    figures: dict[str, Any] = {"test_images": len(labels)}
    for name, hits in right.items():
        correct, total = int(hits.sum()), len(hits)
        figures[name] = {"accuracy": correct / total, "ci": wilson_interval(correct, total)}
    if "baseline" in right:
        figures["difference_ci"] = paired_interval(right["result"], right["baseline"])
    return figures


def _benchmark(context: Context, recipe: Recipe, networks: Networks, files: Mapping[str, Path]) -> dict[str, Any]:
    """Latency interleaved over baseline and result, throughput, PyTorch for reference, and what really ran in INT8."""
    data, options = context.data, recipe.benchmark
    images = data.test.images[: min(64, len(data.test.labels))]
    candidates = {
        "baseline": Candidate(files["baseline"], F32),
        "baseline_default": Candidate(files["baseline"]),
        "result": Candidate(files["result"]),
    }
    if networks.quantized is not None:
        candidates["result_fp32"] = Candidate(files["floating"], F32)
        candidates["result_fp32_default"] = Candidate(files["floating"])
    latency = measure_latency(candidates, images, calls=options.calls, threads=options.threads)
    pair = {name: candidates[name] for name in ("baseline", "result")}
    native = measure_latency(
        pair, _native_images(data.native_size, images), calls=options.calls, threads=options.threads
    )
    speed: dict[str, Any] = {
        "latency": {name: dataclasses.asdict(value) for name, value in latency.items()},
        "latency_native": {name: dataclasses.asdict(value) for name, value in native.items()},
        "native_size": list(data.native_size),
        "audit": {name: audit(c.xml, c.config) for name, c in pair.items()},
        "torch_eager_ms": {
            "baseline": _eager_ms(networks.baseline, context),
            "result_float": _eager_ms(networks.floating, context),
        },
        "cpu": cpu_capabilities(),
    }
    if options.throughput_s:
        speed["throughput_fps"] = measure_throughput(
            pair, images, seconds=options.throughput_s, threads=options.threads
        )
    return speed


def _native_images(
    size: tuple[int, int], images: np.ndarray[Any, np.dtype[np.uint8]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A few images scaled to the data set's median size (height, width); only their size matters for the timing."""
    height, width = size
    scaled = [np.asarray(Image.fromarray(np.asarray(image)).resize((width, height))) for image in images[:8]]
    return np.stack(scaled)


@torch.no_grad()
def _eager_ms(network: Network, context: Context, calls: int = 20) -> float:
    """Median milliseconds of PyTorch in eager mode, batch 1, float32, channels_last: for reference."""
    module = network.module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = context.example.to(memory_format=torch.channels_last)
    times = []
    for call in range(calls + 3):
        started = time.perf_counter()
        module(example)
        if call >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times))


def _retrain_memory(context: Context, recipe: Recipe, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory of the last `finetune` rerun alone, from the final slim weights, in a process of its own.

    Those weights are the last stage's, unless they were quantized after that `finetune`: then the last float ones.
    """
    stages = recipe.stages
    last = max((i for i, stage in enumerate(stages) if isinstance(stage, Finetune)), default=None)
    if last is None:
        return {"error": "the recipe has no finetune stage"}
    name = recipe.model.name or ""
    if recipe.model.source == "custom" and ":" not in name:
        return {
            "error": f"another process cannot rebuild {name}, which was given as an object; --factory names one it can"
        }
    slim = next((i - 1 for i in range(last, len(stages)) if isinstance(stages[i], Quantize)), len(stages) - 1)
    folder = context.run_dir / "stages" / f"{slim:02d}-{records[slim]['type']}"
    command = [
        sys.executable,
        "-P",  # what lies in the working folder is not imported
        "-m",
        "compressor.retrain",
        str(context.run_dir),
        str(folder),
        str(last),
        str(RETRAIN_STEPS),
        context.precision,
        *([name] if recipe.model.source == "custom" else []),  # `compress` has put the factory's name there itself
    ]
    # The toolkit may run from a checkout that is not installed, in another working folder.
    search = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    if recipe.model.source == "custom":
        search += sys.path  # the factory was found somewhere there
    child = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _footprint(
    context: Context,
    network: Network,
    name: str,
    xml: Path,
    accuracy: Mapping[str, Any],
    speed: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> Footprint:
    """All that was measured on one published network; `records` are of the stages that led to it."""
    latency, native = speed["latency"], speed["latency_native"]
    known = accuracy.get(name)
    counts = count(network.module, context.example)
    default = latency["baseline_default" if name == "baseline" else "result"]["median_ms"]
    return Footprint(
        params=counts.params,
        macs=counts.macs,
        size_bytes=xml.stat().st_size + xml.with_suffix(".bin").stat().st_size,
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
        else evaluate(network.module, context.data.val, context.data.spec)[0],
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


def _describe(run: Path, path: Path, network_input: tuple[int, int, int], classes: int) -> Artifact:
    """What a user must know to feed a published file."""
    channels, height, width = network_input
    io = {
        ".onnx": {"image": f"float32 [N,{channels},{height},{width}] RGB 0-255", "logits": f"float32 [N,{classes}]"},
        ".xml": {"image": f"uint8 [1,?,?,{channels}] RGB", "logits": f"float32 [1,{classes}]"},
        ".bin": {},
    }[path.suffix]
    kind = "onnx" if path.suffix == ".onnx" else "openvino_ir"
    precision = "int8" if "int8" in path.stem else "fp32"
    return Artifact(path.relative_to(run).as_posix(), kind, precision, sha256_of(path), path.stat().st_size, io)
