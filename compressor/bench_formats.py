"""The result of a run in each of its formats, timed in turns: PyTorch, ONNX and IR, float and INT8.

Invariant: what is not installed here or was not published is a row that says so, never one that is missing.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.benchmark import ROUNDS, random_images, time_in_turns
from compressor.errors import CompressorError
from compressor.runtime import DEFAULT, F32, compile_ir


@dataclass(frozen=True)
class Runner:
    """Something that takes one image: how, what it is fed, and how many threads it has."""

    call: Callable[[Any], object]
    inputs: list[Any]
    threads: int | None


Make = Callable[[Path, NDArray[np.uint8], int | None, ExitStack], Runner]


def bench_formats(run: Path, *, calls: int = 100, threads: int | None = None) -> list[dict[str, Any]]:
    """Time the networks of a run in every format.

    Args:
        run: A finished run with artifacts.
        calls: Timed calls of each format.
        threads: Of each; None leaves the choice to the format's own runtime.

    Returns:
        JSON-able rows: `format`, `file`, `size_bytes`, `median_ms`, `p95_ms`, `fps` (1000 / median), `threads`, and
        `status` (`ok`, or why there are no figures).
    """
    artifacts = run / "artifacts"
    report = json.loads((run / "report.json").read_text())
    stage = _float_stage(run, report["stages"])
    formats: list[tuple[str, Path, Make]] = [
        ("PyTorch, eager, float32", stage / "model.safetensors", _torch),
        ("ONNX float32, onnxruntime", artifacts / "result_fp32.onnx", _onnx),
        ("ONNX INT8, onnxruntime", artifacts / "result_int8.onnx", _onnx),
        ("IR float32, OpenVINO at f32", artifacts / "result_fp32.xml", _ir(F32)),
        ("IR float32, OpenVINO's default", artifacts / "result_fp32.xml", _ir(DEFAULT)),
        ("IR INT8, OpenVINO's default", artifacts / "result_int8.xml", _ir(DEFAULT)),
    ]
    images = random_images(artifacts / "result_fp32.xml")
    rows: list[dict[str, Any]] = []
    times: dict[str, list[float]] = {}
    used: dict[str, int | None] = {}
    status: dict[str, str] = {}
    for number in range(min(ROUNDS, calls)):
        with ExitStack() as opened:
            runners: dict[str, Runner] = {}
            for name, path, make in formats:
                if not path.is_file():
                    status[name] = "not published"
                elif status.get(name, "ok") == "ok":
                    try:
                        runners[name] = make(path, images, threads, opened)
                        status[name] = "ok"
                    except ModuleNotFoundError as error:
                        status[name] = f"{error.name} is not installed"
                    except CompressorError as error:
                        status[name] = str(error)
            part = range(calls * number // min(ROUNDS, calls), calls * (number + 1) // min(ROUNDS, calls))
            for name in runners:
                times.setdefault(name, [])
                used[name] = runners[name].threads
            time_in_turns(
                {name: runner.call for name, runner in runners.items()},
                {name: runner.inputs for name, runner in runners.items()},
                times,
                part,
                warmup=5,
            )
    for name, path, _ in formats:
        values = times.get(name)
        median = None if not values else float(np.median(values) * 1e3)
        rows.append(
            {
                "format": name,
                "file": path.relative_to(run).as_posix(),
                "size_bytes": _size(path),
                "median_ms": median,
                "p95_ms": float(np.percentile(values, 95) * 1e3) if values else None,
                "fps": None if median is None else 1e3 / median,
                "threads": used.get(name),
                "status": status[name],
            }
        )
    return rows


def _float_stage(run: Path, stages: list[dict[str, Any]]) -> Path:
    """The folder of the last stage before the network was quantized."""
    first = next((stage["index"] for stage in stages if stage["type"] == "quantize"), len(stages))
    last = stages[max(first - 1, 0)]
    return run / "stages" / f"{last['index']:02d}-{last['type']}"


def _size(path: Path) -> int | None:
    if not path.is_file():
        return None
    parts = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return sum(part.stat().st_size for part in parts)


def _pixels(images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Images as the published ONNX takes them: float32 (1, 3, h, w), RGB 0-255."""
    return [np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) for image in images]


def _torch(path: Path, images: NDArray[np.uint8], threads: int | None, opened: ExitStack) -> Runner:
    import torch

    from compressor.checkpoint import load_network

    module = load_network(path.parent).module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = torch.get_num_threads()
    if threads is not None:
        opened.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
    inputs = [torch.from_numpy(x / 255).to(memory_format=torch.channels_last) for x in _pixels(images)]

    def call(x: Any) -> object:
        with torch.no_grad():
            return module(x)

    return Runner(call, inputs, threads or before)


def _onnx(path: Path, images: NDArray[np.uint8], threads: int | None, opened: ExitStack) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Runner(lambda x: session.run(None, {"image": x}), _pixels(images), threads)


def _ir(config: dict[str, str]) -> Make:
    def make(path: Path, images: NDArray[np.uint8], threads: int | None, opened: ExitStack) -> Runner:
        told = {**config, **({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})}
        compiled = compile_ir(path, "LATENCY", told)
        request = compiled.create_infer_request()
        singles = [np.ascontiguousarray(image)[None] for image in images]
        return Runner(
            lambda image: request.infer({0: image}), singles, int(compiled.get_property("INFERENCE_NUM_THREADS"))
        )

    return make


def format_formats(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out for people."""
    lines = [f"{'format':34}{'size MB':>9}{'median ms':>11}{'p95 ms':>9}{'images/s':>10}{'threads':>9}"]
    for row in rows:
        size = "" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.2f}"
        if row["median_ms"] is None:
            lines.append(f"{row['format']:34}{size:>9}  {row['status']}")
            continue
        threads = "default" if row["threads"] is None else str(row["threads"])
        lines.append(
            f"{row['format']:34}{size:>9}{row['median_ms']:11.2f}{row['p95_ms']:9.2f}{row['fps']:10.1f}{threads:>9}"
        )
    return "\n".join(lines)
