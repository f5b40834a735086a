"""`eval` and `bench` on the edge device: openvino, numpy and pillow are all they may need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from separable_network import LABELS, SPEC, pictures, trained

from compressor.export import publish_float
from compressor.runtime import predict, read_labels

REPOSITORY = Path(__file__).resolve().parent.parent
# None in sys.modules makes an import fail as if the package were not installed.
WITHOUT = """
import sys
absent = "torch nncf onnx onnxruntime safetensors pydantic rich psutil yaml"
for name in absent.split():
    sys.modules[name] = None
import functools
from compressor import benchmark
from compressor.cli import main
benchmark.bench_target = functools.partial(benchmark.bench_target, seconds=0.1)
sys.exit(main(sys.argv[1:]))
"""


def device(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def xml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_float(trained(), SPEC, LABELS, tmp_path_factory.mktemp("run") / "net").xml


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index, label in enumerate(LABELS):
        (root / "test" / label).mkdir(parents=True)
        for number, image in enumerate(pictures(2, size=40, seed=index)):
            Image.fromarray(image).save(root / "test" / label / f"{number}.png")
    return root


def test_eval_scores_folders_without_the_training_packages(xml: Path, images: Path) -> None:
    done = device("eval", xml, images, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    right = sum(int((predict(xml, pictures(2, size=40, seed=i)).argmax(1) == i).sum()) for i in range(len(LABELS)))
    assert result["n"] == 12
    assert result["top1"] == pytest.approx(right / 12)
    assert list(result["per_class"]) == list(read_labels(xml))
    plain = device("eval", xml, images)
    assert plain.stdout.startswith(f"top-1 {right / 12:.4f} ")


def test_bench_times_one_ir_without_the_training_packages(xml: Path) -> None:
    done = device("bench", xml, "--calls", "7", "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert set(result["latency"]) == {"f32", "default"}
    for figures in result["latency"].values():
        assert (figures["calls"], figures["threads"]) == (7, 1)
        assert 0 < figures["median_ms"] <= figures["p95_ms"]
    assert result["size"] == {"f32": [32, 32], "default": [32, 32]}
    assert "median ms" in device("bench", xml, "--calls", "3").stdout


def test_bench_of_a_run_compares_baseline_and_result(xml: Path, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    for name in ("baseline_fp32", "result_int8"):
        for part in (xml, xml.with_suffix(".bin")):
            (tmp_path / "artifacts" / f"{name}{part.suffix}").write_bytes(part.read_bytes())
    done = device("bench", tmp_path, "--calls", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "x as fast" in done.stdout.splitlines()[-1]


def test_what_needs_the_other_packages_names_the_missing_one() -> None:
    for command, package in (("plan", "rich"), ("validate", "yaml")):
        done = device(command, "recipes/xception_slim.yaml", "--json")
        assert done.returncode == 5
        assert "is not installed; pip install compressor" in json.loads(done.stdout)["error"]
        assert f"'{package}'" in done.stderr


def test_faults_keep_their_exit_codes_there(xml: Path, images: Path, tmp_path: Path) -> None:
    assert device("eval", tmp_path / "absent.xml", images).returncode == 4
    assert device("eval", xml, tmp_path / "absent").returncode == 4
    done = device("bench", tmp_path)
    assert done.returncode == 4
    assert "neither an IR (.xml) nor a run folder" in done.stderr
