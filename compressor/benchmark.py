"""Latency, throughput and an audit of what really runs, for published IRs on the CPU.

Invariant: needs only openvino and numpy (the edge device has no torch); candidates that are compared are measured in
turns within one process, so that a change of the load of the machine falls on all of them.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from compressor.energy import joules_between, read_counters
from compressor.environment import BF16_FEATURES, INT8_FEATURES, cpu_flags
from compressor.errors import DataError
from compressor.openvino_core import core
from compressor.runtime import DEFAULT, F32, compile_ir, network_size, stream

log = logging.getLogger(__name__)

ROUNDS = 3  # a compiled network keeps the luck of where its memory lies: each round compiles all anew
STEADY, PATIENCE = 1.05, 2  # see `steady`; so many times the rounds are run at most
_TURN_CALLS = 5
_THROUGHPUT_TURNS = 3
_CONVOLUTIONS = ("Convolution", "GroupConvolution")


@dataclass(frozen=True)
class Candidate:
    """An IR to time, with the CPU properties it is compiled with (`runtime.F32`, `runtime.DEFAULT`).

    `images` are fed to this one instead of those for all, where its network takes another size.
    """

    xml: Path
    config: Mapping[str, str] = field(default_factory=dict)
    images: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Latency:
    """Times of single synchronous requests, batch 1, LATENCY hint."""

    median_ms: float
    p95_ms: float
    calls: int
    threads: int


@dataclass(frozen=True)
class Throughput:
    """Several requests at once. `joules_per_image` is of the whole processor; None where it has no counters."""

    fps: float
    joules_per_image: float | None


def measure_latency(
    candidates: Mapping[str, Candidate],
    images: NDArray[np.uint8],
    *,
    calls: int = 100,
    warmup: int = 10,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Latency]:
    """Time several IRs in turns on the same images.

    Where the machine was disturbed in some rounds, as the first candidate's time tells, more are run, and the rounds in
    which that one was fastest count: what disturbs a machine slows small networks more than large ones (Xception on a
    shared processor: FP32 by 1.2, INT8 at 0.15x of its operations by 1.75), so that comparisons depended on the moment.

    The IR is compiled as published, with its dynamic input: the network behind the resize is static either way, and
    fixing the input size changed nothing measurable (Xception at 160 px, openvino 2026.4).

    Args:
        candidates: Name to IR and properties. The first is what the others are compared with.
        images: (N, h, w, 3) RGB, fed one by one in turn.
        calls: Timed calls of each candidate in all, at least 100 for figures in a report.
        warmup: Untimed calls of each before the first turn of a round.
        threads: Inference threads; None leaves the choice to OpenVINO.
        rounds: How often all are compiled at least; figures are of the calls of so many rounds.

    Returns:
        Name to figures; times include the copy of the image and of the logits.
    """
    if not len(images):
        raise DataError("latency: no images to time with")
    own = {name: images if c.images is None else c.images for name, c in candidates.items()}
    singles = {name: [np.ascontiguousarray(image)[None] for image in fed] for name, fed in own.items()}
    used: dict[str, int] = {}
    rounds = min(rounds, calls)
    each = -(-calls // rounds)
    timed: list[dict[str, list[float]]] = []
    reference: list[float] = []
    for number in range(PATIENCE * rounds):
        runners = {}
        for name, candidate in candidates.items():
            compiled = compile_ir(candidate.xml, "LATENCY", _with_threads(candidate.config, threads))
            runners[name] = _runner(compiled)
            used[name] = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        here = range(each * number, each * (number + 1))
        timed.append({name: [] for name in candidates})
        time_in_turns(runners, singles, timed[-1], here, warmup=warmup)
        reference.append(float(np.median(next(iter(timed[-1].values())))))
        if len(timed) >= rounds and (len(candidates) == 1 or steady(reference, rounds)):
            break
    if len(candidates) > 1 and not steady(reference, rounds):
        log.info("latency: the machine was busy with something else; measured all the same, in its best moments")
    chosen = fastest_rounds(reference, rounds)
    times = {name: [value for place in chosen for value in timed[place][name]][:calls] for name in candidates}
    return {
        name: Latency(
            median_ms=float(np.median(values) * 1e3),
            p95_ms=float(np.percentile(values, 95) * 1e3),
            calls=len(values),
            threads=used[name],
        )
        for name, values in times.items()
    }


def steady(reference: Sequence[float], wanted: int, fastest: float = np.inf) -> bool:
    """Whether in `wanted` rounds the reference was about as fast as it can be, as far as is known.

    Args:
        reference: Its time in each round.
        wanted: Rounds that are needed.
        fastest: Its time at another moment.
    """
    return sorted(reference)[wanted - 1] <= STEADY * min(fastest, *reference)


def fastest_rounds(reference: Sequence[float], wanted: int) -> list[int]:
    """Places of the `wanted` rounds in which the reference was fastest, which says nothing of the others' luck."""
    return sorted(sorted(range(len(reference)), key=reference.__getitem__)[:wanted])


def _runner(compiled: ov.CompiledModel) -> Callable[[NDArray[np.uint8]], object]:
    request = compiled.create_infer_request()
    return lambda image: request.infer({0: image})


def time_in_turns(
    runners: Mapping[str, Callable[[Any], object]],
    inputs: Mapping[str, Sequence[Any]],
    times: Mapping[str, list[float]],
    calls: range,
    *,
    warmup: int,
) -> None:
    """Call several functions in turns, a few times each, and add the seconds of each call.

    Args:
        runners: Name to a function of one input.
        inputs: What each is given, over and over.
        times: Lists that are added to.
        calls: Numbers of these calls among all; which input comes first.
        warmup: Untimed calls of each beforehand.
    """
    for name, run in runners.items():
        for index in range(warmup):
            run(inputs[name][index % len(inputs[name])])
    for first in range(calls.start, calls.stop, _TURN_CALLS):
        for name, run in runners.items():
            mine = inputs[name]
            run(mine[first % len(mine)])  # untimed: the other candidate emptied the caches
            for index in range(first, min(first + _TURN_CALLS, calls.stop)):
                value = mine[index % len(mine)]
                start = time.perf_counter()
                run(value)
                times[name].append(time.perf_counter() - start)


def measure_throughput(
    candidates: Mapping[str, Candidate],
    images: NDArray[np.uint8],
    *,
    seconds: float = 3.0,
    threads: int | None = None,
) -> dict[str, Throughput]:
    """Images per second, and energy, with the plugin's preferred number of requests kept busy; in turns.

    Args:
        candidates: Name to IR and properties.
        images: (N, h, w, 3) RGB, fed in turn.
        seconds: How long requests of each candidate are started, over all its turns; those under way at the end of a
            turn are waited for and counted.
        threads: Inference threads; None leaves the choice to OpenVINO.

    Returns:
        Name to figures.
    """
    if not len(images):
        raise DataError("throughput: no images to time with")
    models = {
        name: compile_ir(candidate.xml, "THROUGHPUT", _with_threads(candidate.config, threads))
        for name, candidate in candidates.items()
    }
    own = {name: images if c.images is None else c.images for name, c in candidates.items()}
    for name, compiled in models.items():
        for _ in stream(compiled, [*own[name]] * 2):
            pass
    calls, spent = dict.fromkeys(models, 0), dict.fromkeys(models, 0.0)
    used: dict[str, list[float | None]] = {name: [] for name in models}
    for _ in range(_THROUGHPUT_TURNS):
        for name, compiled in models.items():
            start, before = time.perf_counter(), read_counters()
            calls[name] += sum(1 for _ in stream(compiled, _fed(own[name], start + seconds / _THROUGHPUT_TURNS)))
            spent[name] += time.perf_counter() - start
            used[name].append(joules_between(before, read_counters()))
    joules = {name: [j for j in turns if j is not None] for name, turns in used.items()}
    return {
        name: Throughput(
            calls[name] / spent[name],
            sum(joules[name]) / calls[name] if len(joules[name]) == _THROUGHPUT_TURNS else None,
        )
        for name in models
    }


def _fed(images: NDArray[np.uint8], until: float) -> Iterator[NDArray[np.uint8]]:
    """Images in turn until the clock says `until`, at least one."""
    for index in itertools.count():
        if index and time.perf_counter() >= until:
            return
        yield images[index % len(images)]


def _with_threads(config: Mapping[str, str], threads: int | None) -> dict[str, str]:
    return {**config, **({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})}


def audit(xml: Path, config: Mapping[str, str] = DEFAULT) -> dict[str, dict[str, int]]:
    """Count what the compiled model executes; an INT8 file proves nothing about what the CPU computes.

    Returns:
        `convolutions` per runtime precision; `reorders`, conversions of layout or precision, per precision; and all
        `operations` per `type precision`, constants left out.
    """
    convolutions: dict[str, int] = {}
    reorders: dict[str, int] = {}
    operations: dict[str, int] = {}
    for node in compile_ir(xml, "LATENCY", config).get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if kind == "Const":
            continue
        _count(operations, f"{kind} {precision}")
        if kind in _CONVOLUTIONS:
            _count(convolutions, precision)
        elif kind == "Reorder":
            _count(reorders, precision)
    return {"convolutions": convolutions, "reorders": reorders, "operations": dict(sorted(operations.items()))}


def _count(table: dict[str, int], key: str) -> None:
    table[key] = table.get(key, 0) + 1


def cpu_capabilities() -> dict[str, list[str]]:
    """INT8 and bf16 instruction sets of this CPU, and the precisions OpenVINO says it speeds up."""
    flags = cpu_flags()
    return {
        "int8": [name for name in INT8_FEATURES if name in flags],
        "bf16": [name for name in BF16_FEATURES if name in flags],
        "openvino": list(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
    }


def bench_target(target: Path, *, calls: int = 100, threads: int | None = None, seconds: float = 3.0) -> dict[str, Any]:
    """Time a run's baseline against its result, or one IR, on random images of the network's size.

    Args:
        target: A run folder with `artifacts/`, or an IR's .xml.
        calls: Timed calls of each candidate.
        threads: Inference threads; None leaves the choice to OpenVINO.
        seconds: Duration of each throughput measurement.

    Returns:
        JSON-able: `size` (h, w), `latency`, `throughput_fps`, `joules_per_image` and `audit` per candidate, `cpu`.

    Raises:
        DataError: Neither a run folder with artifacts nor a published IR.
    """
    candidates = {name: replace(c, images=random_images(c.xml)) for name, c in candidates_of(target).items()}
    images = next(iter(candidates.values())).images
    assert images is not None
    latency = measure_latency(candidates, images, calls=calls, threads=threads)
    throughput = measure_throughput(candidates, images, seconds=seconds, threads=threads)
    return {
        "target": str(target),
        "size": {name: list(c.images.shape[1:3]) for name, c in candidates.items() if c.images is not None},
        "cpu": cpu_capabilities(),
        "latency": {name: asdict(figures) for name, figures in latency.items()},
        "throughput_fps": {name: figures.fps for name, figures in throughput.items()},
        "joules_per_image": {name: figures.joules_per_image for name, figures in throughput.items()},
        "audit": {name: audit(candidate.xml, candidate.config) for name, candidate in candidates.items()},
    }


def random_images(xml: Path) -> NDArray[np.uint8]:
    """A few images (8, h, w, 3) of the size that a published IR's network takes."""
    size = network_size(xml)
    if size is None:
        raise DataError(f"{xml}: its model_info has no orig_height and orig_width, so the image size is unknown")
    return np.random.default_rng(0).integers(0, 256, (8, *size, 3), dtype=np.uint8)


def candidates_of(target: Path) -> dict[str, Candidate]:
    """What there is to time of a run folder, or of one IR; without images.

    Raises:
        DataError: It is neither.
    """
    if target.suffix == ".xml":
        return {"f32": Candidate(target, F32), "default": Candidate(target)}
    folder = target / "artifacts"
    results = [path for path in (folder / "result_int8.xml", folder / "result_fp32.xml") if path.is_file()]
    baseline = folder / "baseline_fp32.xml"
    if not results or not baseline.is_file():
        raise DataError(
            f"{target}: neither an IR (.xml) nor a run folder with artifacts/baseline_fp32.xml and a result; "
            "a run that missed its gates or budget keeps no artifacts"
        )
    return {
        "baseline": Candidate(baseline, F32),
        "baseline_default": Candidate(baseline),
        "result": Candidate(results[0]),
    }


def format_bench(result: Mapping[str, Any]) -> str:
    """Lay out what `bench_target` returned as a small table for people."""
    instructions = ", ".join([*result["cpu"]["int8"], *result["cpu"]["bf16"]]) or "no INT8 or bf16 instructions"
    lines = [
        f"{result['target']}: batch 1, {instructions}",
        f"{'':18}{'pixels':>10}{'median ms':>10}{'p95 ms':>10}{'images/s':>10}{'threads':>9}  convolutions",
    ]
    for name, figures in result["latency"].items():
        counts = ", ".join(f"{n} {kind}" for kind, n in result["audit"][name]["convolutions"].items()) or "none"
        height, width = result["size"][name]
        lines.append(
            f"{name:18}{f'{width}x{height}':>10}{figures['median_ms']:10.2f}{figures['p95_ms']:10.2f}{result['throughput_fps'][name]:10.1f}"
            f"{figures['threads']:9d}  {counts}"
        )
    latency = result["latency"]
    if "baseline" in latency and "result" in latency:
        lines.append(f"result is {latency['baseline']['median_ms'] / latency['result']['median_ms']:.2f}x as fast")
    return "\n".join(lines)
