"""The commands that run on the edge device, `eval` and `bench`: openvino, numpy and pillow are enough.

Invariant: figures come from `evaluate` and `benchmark`, the very functions a run's report is made with.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.benchmark import Candidate, audit, cpu_capabilities, measure_latency, measure_throughput
from compressor.environment import cpu_model
from compressor.errors import DataError
from compressor.evaluate import Evaluation
from compressor.runtime import DEFAULT, F32, network_size

BASELINE, RESULTS = "baseline_fp32.xml", ("result_int8.xml", "result_fp32.xml")


def candidates_of(target: Path) -> dict[str, Candidate]:
    """The IRs to time: a run's baseline and result, or one IR as deployed and in float32.

    Raises:
        DataError: no IR is there.
    """
    if target.suffix == ".xml":
        return {"default precision": Candidate(target, DEFAULT), "f32": Candidate(target, F32)}
    folder = target / "artifacts"
    result = next((folder / name for name in RESULTS if (folder / name).is_file()), None)
    if result is None or not (folder / BASELINE).is_file():
        raise DataError(
            f"{target}: expected an IR (.xml), or a finished run with artifacts/{BASELINE} and artifacts/{RESULTS[1]}"
        )
    return {
        "baseline f32": Candidate(folder / BASELINE, F32),
        "baseline default": Candidate(folder / BASELINE, DEFAULT),
        f"{result.stem} default": Candidate(result, DEFAULT),
    }


def bench(target: Path, *, calls: int, threads: int | None, seconds: float = 3.0) -> dict[str, Any]:
    """Time a run or an IR on this machine with random images at the network's size.

    Returns:
        JSON: `cpu`, `isa`, and per candidate `latency`, `throughput` and `audit`.
    """
    extra = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    found = {name: Candidate(c.xml, {**c.config, **extra}) for name, c in candidates_of(target).items()}
    images = _images(next(iter(found.values())).xml)
    latency = measure_latency(found, images, calls=calls)
    rows = {
        name: {
            "xml": str(c.xml),
            "latency": dataclasses.asdict(latency[name]),
            "throughput": dataclasses.asdict(measure_throughput(c.xml, images, seconds=seconds, config=c.config)),
            "audit": dataclasses.asdict(audit(c.xml, c.config)),
        }
        for name, c in found.items()
    }
    return {"cpu": cpu_model(), "isa": cpu_capabilities(), "candidates": rows}


def _images(xml: Path) -> NDArray[np.uint8]:
    """Eight random images of the network's size; the time of a convolution does not depend on their content."""
    height, width = network_size(xml) or (224, 224)
    return np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)


def format_bench(result: dict[str, Any]) -> str:
    """A plain table for people."""
    lines = [f"{result['cpu']}; {', '.join(result['isa']['int8'] + result['isa']['bf16']) or 'no VNNI, no bf16'}"]
    lines.append(
        f"{'model':<24}{'median ms':>10}{'p95 ms':>9}{'images/s':>10}{'threads':>9}  convolutions by precision"
    )
    for name, row in result["candidates"].items():
        latency = row["latency"]
        lines.append(
            f"{name:<24}{latency['median_ms']:>10.2f}{latency['p95_ms']:>9.2f}{row['throughput']['fps']:>10.0f}"
            f"{latency['threads']:>9}  {json.dumps(row['audit']['convolutions'])}"
        )
    return "\n".join(lines)


def format_evaluation(evaluation: Evaluation) -> str:
    """Accuracy with its interval, and the classes that do worst."""
    low, high = evaluation.interval
    lines = [f"top-1 {evaluation.top1:.4f} ({low:.4f} to {high:.4f}, 95 %) on {evaluation.n} images"]
    if evaluation.top5 is not None:
        lines.append(f"top-5 {evaluation.top5:.4f}")
    worst = sorted(evaluation.per_class.items(), key=lambda item: item[1].correct / max(item[1].total, 1))[:5]
    lines += [f"  {label}: {c.correct} of {c.total} right" for label, c in worst if c.correct < c.total]
    return "\n".join(lines)
