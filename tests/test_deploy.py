"""Laws: a bundle holds what the run proved, no more, and works where there is only openvino, numpy and pillow."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.artifacts import sha256_of, verify_manifest
from compressor.cli import main
from compressor.deploy import deploy
from compressor.errors import DataError, RecipeError
from compressor.runtime import predict, read_labels

FILES = ["benchmark.json", "labels.txt", "manifest.json", "model.bin", "model.xml", "model_card.md", "predict.py"]


@pytest.fixture(scope="module")
def bundle(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deploy") / "edge"
    deploy(finished_run, out, ir="int8", calls=5)
    return out


def linked(folder: Path, *packages: str) -> Path:
    """A folder to import from with what pip puts there for these packages, and nothing more."""
    for package in packages:
        files = importlib.metadata.files(package)
        assert files
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(importlib.metadata.distribution(package).locate_file(top))
    return folder


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(tmp_path_factory.mktemp("bare"), "openvino", "numpy", "pillow")


def alone(bare_packages: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python without its own site-packages."""
    environment = {"PYTHONPATH": str(bare_packages), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)


def test_a_bundle_is_the_proven_network_and_what_belongs_to_it(bundle: Path, finished_run: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == FILES
    for suffix in (".xml", ".bin"):
        assert sha256_of(bundle / f"model{suffix}") == sha256_of(finished_run / f"artifacts/result_int8{suffix}")
    assert (bundle / "labels.txt").read_text().split() == list(read_labels(bundle / "model.xml"))
    assert (bundle / "model_card.md").read_bytes() == (finished_run / "model_card.md").read_bytes()
    assert verify_manifest(bundle) == []
    timed = json.loads((bundle / "benchmark.json").read_text())
    assert timed["target"] == "model.xml"
    assert timed["latency"]["default"]["calls"] == 5
    assert len((bundle / "predict.py").read_text().splitlines()) <= 40


def test_the_zip_holds_the_folder(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle.with_name("edge.zip")) as archive:
        archive.extractall(tmp_path)
    assert verify_manifest(tmp_path / "edge") == []
    assert sorted(path.name for path in (tmp_path / "edge").iterdir()) == FILES


def test_it_predicts_in_a_clean_environment(bundle: Path, bare_packages: Path, tmp_path: Path) -> None:
    absent = alone(bare_packages, "-c", "import torch")
    assert "No module named 'torch'" in absent.stderr
    noise = np.random.default_rng(0).normal(110, 25, (70, 90, 3))
    pixels = np.clip(noise + np.array([0, 70, 0]), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    done = alone(bare_packages, bundle / "predict.py", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    best = read_labels(bundle / "model.xml")[int(predict(bundle / "model.xml", [pixels]).argmax())]
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: {best} ")
    assert "pip install openvino numpy pillow" in alone(bare_packages, bundle / "predict.py").stderr


MODEL_API = """
import json, sys
sys.modules["openvino_telemetry"] = None
from pathlib import Path
import numpy as np
from PIL import Image
from model_api.models import Model
network = Model.create_model(sys.argv[1])
right = total = 0
for path in sorted(Path(sys.argv[2]).glob("*/*.png")):
    named = network(np.asarray(Image.open(path).convert("RGB"))).top_labels[0].name
    right, total = right + (named == path.parent.name), total + 1
print(json.dumps([right, total]))
"""


def test_model_api_gives_the_reported_accuracy_in_a_clean_environment(
    bundle: Path, finished_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("model_api", reason="openvino-model-api is not installed")
    packages = linked(tmp_path, "openvino", "numpy", "pillow", "openvino-model-api", "opencv-python-headless")
    test = finished_run.parent / "images" / "test"
    done = alone(packages, "-c", MODEL_API, bundle / "model.xml", test)
    assert done.returncode == 0, done.stderr
    right, total = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((finished_run / "report.json").read_text())
    assert total == report["benchmark"]["accuracy"]["test_images"]
    assert abs(right / total - report["result"]["accuracy"]) <= 0.005


@pytest.mark.parametrize("file", ["artifacts/result_int8.bin", "model_card.md"])
def test_a_run_that_was_changed_is_not_bundled(finished_run: Path, tmp_path: Path, file: str) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    data = bytearray((run / file).read_bytes())
    data[len(data) // 2] ^= 1
    (run / file).write_bytes(data)
    with pytest.raises(DataError, match=rf"1 files are not what the run wrote, first {file}"):
        deploy(run, tmp_path / "edge", calls=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_artifacts_is_not_bundled(finished_run: Path, tmp_path: Path) -> None:
    from compressor.artifacts import write_json, write_manifest

    run = shutil.copytree(finished_run, tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    write_json(run / "report.json", {**report, "artifacts": []})
    write_manifest(run)
    with pytest.raises(DataError, match="missed a gate or its budget"):
        deploy(run, tmp_path / "edge", calls=1)
    with pytest.raises(DataError, match="no manifest; give the folder of a finished run"):
        deploy(tmp_path, tmp_path / "edge", calls=1)


def test_what_is_there_is_replaced_only_when_asked(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "edge"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(RecipeError, match=r"it exists, .* add --force"):
        deploy(finished_run, out, calls=1)
    assert (out / "mine.txt").read_text() == "precious"
    assert main(["deploy", str(finished_run), "--out", str(out), "--force", "--calls", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edge", "edge.zip"]


def test_an_ir_that_the_run_has_not_is_told(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", str(finished_run), "--out", str(tmp_path / "a"), "--ir", "fp16"]) == 2
    assert "invalid choice: 'fp16'" in capsys.readouterr().err
    made = deploy(finished_run, tmp_path / "a", ir="fp32", calls=1)
    assert made["ir"] == "artifacts/result_fp32.xml"
