"""From trained networks to published artifacts and a verdict: export, parity, accuracy, latency, audit.

Invariant: everything in the report is measured on the files that are published, and test images are read here only
(`measurement` times with a few of them).
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressor import environment
from compressor.artifacts import Artifact, sha256_of
from compressor.clock import Clock
from compressor.context import Context
from compressor.data import Dataset
from compressor.export import convert_float_ir, ir_bytes, publish_float, publish_int8, save_ir
from compressor.layer_report import Costs, compare_layers, costs_of, recommend, untold
from compressor.measurement import Networks, footprint_of, measure_speed
from compressor.metrics import calibration_error, paired_interval, probabilities, top1, wilson_interval
from compressor.mistakes import mistakes_of
from compressor.parity import check_float, check_int8, violations
from compressor.profiling import profile
from compressor.recipe import Finetune, Quantize, Recipe
from compressor.recipe_loader import recipe_hash
from compressor.report import Footprint, Report
from compressor.retraining import retraining_memory
from compressor.runtime import DEFAULT, F32, predict

log = logging.getLogger(__name__)


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
        accuracy, mistakes = _accuracy(context, networks, files)
    with timed("benchmark"):
        speed = measure_speed(context, recipe.benchmark, networks, files)
    with timed("layers"):
        costs = _layers(context, recipe, networks, files, speed["latency"])
        extra += untold(costs)
    with timed("retraining memory"):
        retrain = _retrain_memory(context, recipe, records)
        if "error" in retrain:
            extra.append(f"retraining memory was not measured: {retrain['error']}")
    leading = [r for r in records if r["index"] < networks.lead]
    full, data = context.baseline_data, context.data
    baseline = footprint_of(full, networks.baseline, "baseline", files["baseline"], accuracy, speed, leading)
    result = dataclasses.replace(
        footprint_of(data, networks.result, "result", files["result"], accuracy, speed, records),
        retrain_avg_memory_bytes=retrain.get("average_bytes"),
        retrain_peak_memory_bytes=retrain.get("peak_bytes"),
    )
    missed += recipe.budget.violations(result.to_json(), baseline.to_json())
    extra += recipe.budget.overshoots(result.to_json(), baseline.to_json())
    recommended, reason = _recommend(recipe, files, speed["latency"], baseline, result)
    extra += [reason] if reason else []
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
            _describe(
                context.run_dir, path, (networks.baseline if "baseline" in path.stem else networks.result).input, data
            )
            for path in sorted(folder.iterdir())
        ),
        parity=parity,
        audit=speed.pop("audit"),
        benchmark={**speed, "accuracy": accuracy, "memory_floor_bytes": retrain.get("floor_bytes")},
        data={"fingerprint": full.fingerprint, "labels": list(full.labels), **full.info},
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
        mistakes=mistakes,
        recommended=None if missed else recommended,
        layers=compare_layers(costs["baseline"], costs["result"]),
        layer_totals={name: cost.totals for name, cost in costs.items()},
    )


def _export(folder: Path, context: Context, recipe: Recipe, networks: Networks, notes: list[str]) -> dict[str, Path]:
    """Write every artifact; returns the IR of the baseline and of the result, and what parity compares."""
    data, opset = context.data, recipe.export.opset
    files = {"baseline": folder / "baseline_fp32.xml"}
    save_ir(convert_float_ir(networks.baseline.module, context.baseline_data.spec, data.labels), files["baseline"])
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
    data, full = context.data, context.baseline_data
    order = np.random.default_rng(recipe.seed).permutation(len(data.test.labels))
    chosen = np.sort(order[: recipe.export.parity_images])
    images = data.test.images[chosen]
    dense = check_float(networks.baseline.module, None, files["baseline"], full.test.images[chosen], full.spec)
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


def _accuracy(context: Context, networks: Networks, files: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Top-1 on the test split, measured on the published IR through its own preprocessing; and the mistakes."""
    data = context.data
    labels = np.asarray(data.test.labels)
    logits = predict(files["result"], data.test.images, DEFAULT)
    right = {"result": top1(logits, labels)}
    if networks.baseline_trained:
        right["baseline"] = top1(predict(files["baseline"], context.baseline_data.test.images, F32), labels)
    figures: dict[str, Any] = {"test_images": len(labels)}
    for name, hits in right.items():
        correct, total = int(hits.sum()), len(hits)
        figures[name] = {"accuracy": correct / total, "ci": wilson_interval(correct, total)}
    if "baseline" in right:
        figures["difference_ci"] = paired_interval(right["result"], right["baseline"])
    figures["calibration_error"] = calibration_error(probabilities(logits).max(1), right["result"])
    return figures, mistakes_of(logits, labels, data.test.images, data.test.names)


def _layers(
    context: Context, recipe: Recipe, networks: Networks, files: Mapping[str, Path], latency: Mapping[str, Any]
) -> dict[str, Costs]:
    """What the layers of the baseline and of the result cost, each at the precision its latency was measured in."""
    pair = {
        "baseline": (networks.baseline, context.baseline_data, F32),
        "result": (networks.result, context.data, DEFAULT),
    }
    costs = {}
    for name, (network, data, config) in pair.items():
        images = data.test.images[:64]
        operations = profile(files[name], images, threads=recipe.benchmark.threads, config=config)
        costs[name] = costs_of(network.module, torch.zeros(1, *network.input), operations, latency[name]["median_ms"])
    return costs


def _recommend(
    recipe: Recipe, files: Mapping[str, Path], latency: Mapping[str, Any], baseline: Footprint, result: Footprint
) -> tuple[str, str | None]:
    """Which IR to deploy, see `recommend`; a float IR that would miss the budget is none to choose."""
    if "quantized" not in files:
        return recommend(None, None, result.accuracy)
    default = latency["result_fp32_default"]
    floating = dataclasses.replace(
        result,
        size_bytes=ir_bytes(files["floating"]),
        latency_ms=default["median_ms"],
        latency_p95_ms=default["p95_ms"],
        latency_default_ms=default["median_ms"],
    )
    missed, more = (recipe.budget.violations(f.to_json(), baseline.to_json()) for f in (result, floating))
    known = {line.partition(":")[0] for line in missed}
    more = [line for line in more if line.partition(":")[0] not in known]
    return recommend(latency["result"]["median_ms"], default["median_ms"], result.accuracy, more)


def _retrain_memory(context: Context, recipe: Recipe, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory of the last `finetune` rerun alone, from the final slim weights, in a process of its own.

    Those weights are the last stage's, unless they were quantized after that `finetune`: then the last float ones.
    """
    stages = recipe.stages
    last = max((i for i, stage in enumerate(stages) if isinstance(stage, Finetune)), default=None)
    if last is None:
        return {"error": "the recipe has no finetune stage"}
    slim = next((i - 1 for i in range(last, len(stages)) if isinstance(stages[i], Quantize)), len(stages) - 1)
    folder = context.run_dir / "stages" / f"{slim:02d}-{records[slim]['type']}"
    levers = (records[last]["details"].get("memory_levers") or {}).get("chosen")
    return retraining_memory(context.run_dir, folder, last, context.precision, recipe.model.model_dump(), levers)


def _describe(run: Path, path: Path, network_input: tuple[int, int, int], data: Dataset) -> Artifact:
    """What a user must know to feed a published file."""
    channels, height, width = network_input
    classes = len(data.labels)
    io = {
        ".onnx": {"image": f"float32 [N,{channels},{height},{width}] RGB 0-255", "logits": f"float32 [N,{classes}]"},
        ".xml": {"image": f"uint8 [1,?,?,{channels}] RGB", "logits": f"float32 [1,{classes}]"},
        ".bin": {},
    }[path.suffix]
    kind = "onnx" if path.suffix == ".onnx" else "openvino_ir"
    precision = "int8" if "int8" in path.stem else "fp32"
    return Artifact(path.relative_to(run).as_posix(), kind, precision, sha256_of(path), path.stat().st_size, io)
