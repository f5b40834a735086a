"""Benchmark figures are complete and ordered, need no torch, and say what ran."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from separable_network import LABELS, SPEC, normalised, pictures, trained
from torch import nn

from compressor import benchmark
from compressor.benchmark import (
    Candidate,
    audit,
    bench_target,
    cpu_capabilities,
    format_bench,
    measure_latency,
    measure_throughput,
)
from compressor.energy import Counter
from compressor.environment import INT8_FEATURES, cpu_flags
from compressor.errors import DataError
from compressor.export import Published, publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.profiling import precisions_of_layers, profile, times_of_layers
from compressor.quantization import quantize
from compressor.runtime import DEFAULT, F32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Published]:
    folder = tmp_path_factory.mktemp("bench")
    network = trained()
    floating = publish_float(network, SPEC, LABELS, folder / "float")
    fold_batchnorm(network, normalised(pictures(1)))
    quantized, _ = quantize(network, [normalised(pictures(8))])
    return floating, publish_int8(quantized, SPEC, LABELS, folder / "int8")


def test_latency_counts_calls_and_orders_quantiles(files: tuple[Published, Published]) -> None:
    candidates = {"baseline": Candidate(files[0].xml, F32), "result": Candidate(files[1].xml)}
    figures = measure_latency(candidates, pictures(3), calls=23, warmup=2, threads=1)
    assert list(figures) == ["baseline", "result"]
    for latency in figures.values():
        assert latency.calls == 23
        assert latency.threads == 1
        assert 0 < latency.median_ms <= latency.p95_ms
    native = measure_latency({"result": candidates["result"]}, pictures(2, size=600), calls=5)
    assert native["result"].median_ms > figures["result"].median_ms


@pytest.mark.parametrize(
    ("slowed", "run", "counted"),
    [([1.0] * 3, 3, 1.0), ([1.2, 1.2, 1.0, 1.0, 1.02], 5, 1.0), ([1.2] * 3, 3, 1.2), ([1.2, 1.0, 1.2] * 2, 6, 1.0)],
)
def test_rounds_in_which_the_machine_was_disturbed_do_not_count(
    files: tuple[Published, Published],
    monkeypatch: pytest.MonkeyPatch,
    slowed: list[float],
    run: int,
    counted: float,
) -> None:
    """What slows the baseline slows the result much more; an odd round of the result alone counts like any other."""
    told = iter(slowed)

    def time_in_turns(runners: Any, inputs: Any, times: dict[str, list[float]], calls: range, *, warmup: int) -> None:
        factor = next(told)
        times["baseline"] += [1e-3 * factor] * len(calls)
        times["result"] += [1e-3 * factor**4] * len(calls)

    monkeypatch.setattr(benchmark, "PATIENCE", 2)
    monkeypatch.setattr(benchmark, "time_in_turns", time_in_turns)
    candidates = {"baseline": Candidate(files[0].xml, F32), "result": Candidate(files[1].xml)}
    figures = measure_latency(candidates, pictures(1), calls=100, threads=1)
    assert len(list(told)) == len(slowed) - run
    assert figures["result"].calls == 100
    assert figures["result"].median_ms == pytest.approx(counted**4)


def test_throughput_counts_finished_images(files: tuple[Published, Published]) -> None:
    pair = {"float": Candidate(files[0].xml), "int8": Candidate(files[1].xml)}
    speed = measure_throughput(pair, pictures(2), seconds=0.2, threads=1)
    assert speed.keys() == pair.keys()
    assert min(figures.fps for figures in speed.values()) > 0


def test_energy_is_told_for_each_image_where_there_are_counters(
    files: tuple[Published, Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.count(0, 3_000_000)  # three joules pass between any two looks
    monkeypatch.setattr(benchmark, "read_counters", lambda: {"package": Counter(next(readings), 10**12)})
    seen: list[int] = []
    monkeypatch.setattr(benchmark, "stream", lambda _compiled, images: iter(seen.append(1) or i for i in images))
    figures = measure_throughput({"a": Candidate(files[0].xml)}, pictures(2), seconds=0.03, threads=1)["a"]
    assert figures.joules_per_image == pytest.approx(3 * 3.0 / (len(seen) - 4))  # four pictures warm up
    monkeypatch.setattr(benchmark, "read_counters", dict)
    figures = measure_throughput({"a": Candidate(files[0].xml)}, pictures(2), seconds=0.03, threads=1)["a"]
    assert figures.joules_per_image is None


def test_no_images_is_an_error(files: tuple[Published, Published]) -> None:
    candidate = Candidate(files[0].xml)
    with pytest.raises(DataError, match="no images"):
        measure_latency({"a": candidate}, pictures(0))
    with pytest.raises(DataError, match="no images"):
        measure_throughput({"a": candidate}, pictures(0))


def test_audit_tells_float_from_int8(files: tuple[Published, Published]) -> None:
    assert audit(files[0].xml, F32)["convolutions"] == {"f32": 7}
    counted = audit(files[1].xml)
    assert sum(counted["convolutions"].values()) == 7
    assert not any(name.startswith("Const") for name in counted["operations"])
    if cpu_flags() & set(INT8_FEATURES):
        assert set(counted["convolutions"]) <= {"u8", "i8"}


def test_time_and_precision_of_every_layer_are_found_under_its_name(files: tuple[Published, Published]) -> None:
    layers = {name for name, layer in trained().named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    int8 = {"u8", "i8"} if cpu_flags() & {"avx2", *INT8_FEATURES} else {"u8", "i8", "f32"}
    for published, config, allowed in ((files[0], F32, {"f32"}), (files[1], DEFAULT, int8)):
        operations = profile(published.xml, pictures(2), calls=20, threads=1, config=config)
        assert sum(operation.kind == "Convolution" for operation in operations) > 1
        assert not any(operation.kind == "Const" for operation in operations)
        precisions = precisions_of_layers(operations, layers)
        assert precisions.keys() == layers
        assert set(precisions.values()) <= allowed
        counted = sum(operation.kind == "Reorder" for operation in operations)
        assert counted == sum(audit(published.xml, config)["reorders"].values())
        times, rest = times_of_layers(operations, layers)
        assert times.keys() == layers, "preprocessing apart, all of the time belongs to a layer"
        assert sum(times.values()) + rest == pytest.approx(sum(operation.ms for operation in operations))
        assert sum(times.values()) > rest
        larger = profile(published.xml, pictures(2, size=600), calls=20, threads=1, config=config)
        resized = times_of_layers(larger, layers)[1]
        assert resized > rest, "resizing belongs to no layer; at native size it may take less than the counters' 1 us"


def test_cpu_capabilities_are_json() -> None:
    capabilities = cpu_capabilities()
    assert set(capabilities) == {"int8", "bf16", "openvino"}
    assert "FP32" in json.loads(json.dumps(capabilities))["openvino"]


def test_bench_of_a_run_and_of_an_ir(files: tuple[Published, Published], tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    for source, name in ((files[0], "baseline_fp32"), (files[1], "result_int8")):
        shutil.copy(source.xml, artifacts / f"{name}.xml")
        shutil.copy(source.bin, artifacts / f"{name}.bin")
    result = bench_target(tmp_path, calls=5, threads=1, seconds=0.1)
    assert result["size"] == {name: [32, 32] for name in ("baseline", "baseline_default", "result")}
    assert set(result["latency"]) == {"baseline", "baseline_default", "result"}
    assert json.loads(json.dumps(result)) == result
    text = format_bench(result)
    assert "x as fast" in text
    assert "7 f32" in text
    single = bench_target(files[1].xml, calls=5, seconds=0.1)
    assert set(single["throughput_fps"]) == {"f32", "default"}
    assert format_bench(single).count("32x32") == 2


def test_bench_of_something_else_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither an IR \(\.xml\) nor a run folder"):
        bench_target(tmp_path)
    with pytest.raises(DataError, match=r"none\.xml: no such file"):
        bench_target(tmp_path / "none.xml")
    (tmp_path / "bad.xml").write_text("<html/>")
    (tmp_path / "bad.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.xml: OpenVINO cannot read it"):
        bench_target(tmp_path / "bad.xml")


@pytest.mark.parametrize("module", ["compressor.benchmark", "compressor.evaluate"])
def test_edge_commands_load_no_training_libraries(module: str) -> None:
    heavy = ("torch", "nncf", "onnx", "onnxruntime", "pydantic")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
