"""Law: every format of a run is a row, timed with the others or with the reason why not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_networks import stand_in

from compressor.bench_formats import bench_formats, format_formats
from compressor.benchmark import bench_target
from compressor.cli import main
from compressor.export import convert_float_ir, save_ir
from compressor.models import build
from compressor.preprocess import InputSpec

ORDER = ("PyTorch", "ONNX float32", "ONNX INT8", "IR float32", "IR float32", "IR INT8")


def test_every_format_is_timed(finished_run: Path) -> None:
    with stand_in():
        rows = bench_formats(finished_run, calls=9, threads=1)
    assert [row["format"].startswith(start) for row, start in zip(rows, ORDER, strict=True)] == [True] * 6
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["fps"] == pytest.approx(1000 / row["median_ms"])
        assert row["threads"] == 1
        assert row["size_bytes"] > 1000
    assert json.loads(json.dumps(rows)) == rows
    text = format_formats(rows)
    assert len(text.splitlines()) == 7


def test_what_is_missing_is_a_row_that_says_so(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "artifacts" / "result_int8.onnx").unlink()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "compressor.checkpoint", None)
    rows = bench_formats(run, calls=3, threads=1)
    told = {row["format"]: row["status"] for row in rows}
    assert told["PyTorch, eager, float32"] == "compressor.checkpoint is not installed"
    assert told["ONNX float32, onnxruntime"] == "onnxruntime is not installed"
    assert told["ONNX INT8, onnxruntime"] == "not published"
    assert [row["status"] for row in rows[3:]] == ["ok"] * 3
    assert "onnxruntime is not installed" in format_formats(rows)


def test_bench_of_a_run_prints_both_tables(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in():
        assert main(["bench", str(finished_run), "--calls", "3"]) == 0
    told = capsys.readouterr().out
    assert "x as fast" in told
    assert "ONNX INT8, onnxruntime" in told
    assert main(["bench", str(finished_run), "--calls", "3", "--quick"]) == 0
    assert "onnxruntime" not in capsys.readouterr().out


@pytest.mark.slow
def test_bench_agrees_with_benchmark_app(tmp_path: Path) -> None:
    """A network as large as real ones, one thread, in turns; the better of three each."""
    xml = tmp_path / "xception.xml"
    network = build("builtin", "xception", {}, 2).eval()
    save_ir(convert_float_ir(network, InputSpec(160, 160), ("ok", "defect")), xml)
    app = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(xml), "-d", "CPU", "-shape", "[1,160,160,3]"]
    app += ["-hint", "none", "-nstreams", "1", "-nthreads", "1", "-api", "sync", "-niter", "100"]
    app += ["-json_stats", "-report_type", "no_counters", "-report_folder", str(tmp_path)]
    ours, theirs = [], []
    for _ in range(3):
        ours.append(bench_target(xml, calls=100, threads=1, seconds=0.1)["latency"]["default"]["median_ms"])
        subprocess.run(app, check=True, capture_output=True)
        stats = json.loads((tmp_path / "benchmark_report.json").read_text())
        theirs.append(float(stats["execution_results"]["latency (ms)"]))
    print(f"bench {ours}, benchmark_app {theirs}")
    assert min(ours) == pytest.approx(min(theirs), rel=0.1)
