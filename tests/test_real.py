"""Real photographs, real ImageNet weights: the Caltech-101 recipe, cut short, and a second opinion on its IR."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from compressor import parity
from compressor.openvino_core import core
from compressor.pipeline import compress

pytestmark = pytest.mark.slow
SHORT = (
    *("input.size=96", "data.images_per_class=12", "budget={}", "benchmark.throughput_s=null"),
    *("stages[0].epochs=null", "stages[0].steps=40"),
    *("stages[1].count=2", "stages[1].metric_images=32", "stages[1].recovery.steps=4"),
    *("stages[2].target.macs=0.7x", "stages[2].importance_batches=2", "stages[2].recovery.steps=4"),
    *("stages[3].epochs=null", "stages[3].steps=20"),
    "stages[4].subset_size=64",
    *("stages[5].epochs=null", "stages[5].steps=2"),
)


def test_the_caltech_recipe_learns_and_its_ir_scores_as_reported(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So short a training leaves many photographs undecided, which INT8 may tip: its gate is for whole runs.
    monkeypatch.setattr(parity, "INT8_AGREEMENT", 0.8)
    archive = shared / "data" / "caltech101.tar"
    weights = shared / "weights" / "xception_imagenet_notop.fp16.safetensors"
    recipe = REPOSITORY / "recipes" / "xception_caltech101.yaml"
    given = (f"data.path={archive}", f"model.weights={weights}", *SHORT)
    report = compress(recipe, tmp_path / "run", overrides=given)
    assert report.passed, report.verdict
    chance = 1 / 101
    assert report.baseline.accuracy is not None
    assert report.result.accuracy is not None
    assert report.baseline.accuracy > 20 * chance
    assert report.result.accuracy > 5 * chance
    assert report.result.macs <= 0.7 * report.baseline.macs
    assert set(report.weights["missing"]) == {"fc.weight", "fc.bias"}
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, [m for m in tar if m.name.startswith("caltech101/test/")], filter="data")
    artifacts, images = tmp_path / "run" / "artifacts", tmp_path / "caltech101" / "test"
    right, total = score(artifacts / "result_int8.xml", images)
    assert total == report.benchmark["accuracy"]["test_images"]
    assert right / total == pytest.approx(report.result.accuracy, abs=0.003)
    right, total = score(artifacts / "baseline_fp32.xml", images, {"INFERENCE_PRECISION_HINT": "f32"})
    assert right / total == pytest.approx(report.baseline.accuracy, abs=0.003)


def score(xml: Path, images: Path, config: dict[str, str] | None = None) -> tuple[int, int]:
    """Right answers and images, by plain openvino and Pillow: what somebody does who knows nothing of the toolkit."""
    model = core().read_model(xml)
    labels = model.get_rt_info(["model_info", "labels"]).astype(str).split()
    compiled = core().compile_model(model, "CPU", config or {})
    right = total = 0
    for folder in sorted(images.iterdir()):
        for path in folder.iterdir():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            answer = int(np.argmax(compiled(pixels[None])[0]))
            right += labels[answer] == folder.name.replace(" ", "_")
            total += 1
    return right, total
