"""Running a shipped recipe from end to end with the real network: few images, one step per training."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from compressor import latency_target, parity, proof
from compressor.artifacts import verify_manifest
from compressor.pipeline import compress
from compressor.recipe import Recipe
from compressor.recipe_bounds import LATENCY_TOLERANCE
from compressor.recipe_loader import load_recipe
from compressor.runtime import read_labels

SIZE, SMALLER = 48, 40
SHARE = "0.5x"  # images this small take little beside what no channel costs
STUDIES = REPOSITORY / "recipes" / "studies"  # which are tested in test_study.py; the recipes of their rows are here
RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent != STUDIES)
# These name no layer, and rows of studies are run with several networks anyway.
ANY_NETWORK = ("dense.yaml", "ptq.yaml", "slim.yaml", "xception_caltech101_edge.yaml", "xception_deeppcb.yaml")
# Their latency targets are aimed at. In the other recipes as many multiply-accumulates stand in, for every candidate of
# a search is quantized, exported and timed, which takes minutes in all.
TIMED = ("xception_slim.yaml", "slim.yaml")
TREES = {"caltech101": ("anchor", "sea horse", "wild_cat"), "deeppcb": ("defect", "ok")}
SMALL = {
    "subset_size": 8,
    "importance_batches": 1,
    "metric_images": 8,
    "sensitivity_images": 8,
    "reconstruction_images": 8,
    "bn_batches": 1,
}


def make_tree(folder: Path, source: str) -> Path:
    """A class-per-folder tree as the source lays it out; names begin with a board's five digits."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for label, name in enumerate(TREES[source]):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 140, (70, 60, 3)) + 80 * (np.arange(3) == label)
                board = 10000 + 100 * (split == "test") + 10 * label + i % 4
                path = folder / split / name / f"{board}{i:03d}_{split}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def shrink(path: Path, recipe: Recipe, folder: Path) -> Iterator[str]:
    """Overrides that leave every stage in its place and take the time out of them."""
    yield from (f"input.size={SIZE}", "model.weights=none", "budget={}", "benchmark.throughput_s=null")
    if recipe.model.source == "timm":
        yield "model.name=resnet18"  # MobileNet-like ones with random weights amplify every rounding of INT8
    elif path.name in ANY_NETWORK:
        yield from ("model.source=timm", "model.name=resnet18")
    if recipe.data.source == "synthetic_pcb":
        yield from ("data.train_per_class=6", "data.val_per_class=2", "data.test_per_class=3")
    else:
        yield f"data.path={make_tree(folder / 'images', recipe.data.source)}"
    for index, stage in enumerate(recipe.model_dump(mode="json")["stages"]):
        where = f"stages[{index}]"
        yield from (f"{where}.{key}={value}" for key, value in SMALL.items() if stage.get(key) is not None)
        if (stage.get("iterations") or 1) > 2:
            yield f"{where}.iterations=2"
        if stage.get("count"):
            yield f"{where}.count={min(stage['count'], 4)}"  # as many as ResNet-18 has
        if stage["type"] == "reduce_resolution":
            yield f"{where}.size={SMALLER}"
        if (stage.get("target") or {}).get("latency_ms"):
            if path.name in TIMED:
                yield f"{where}.target.latency_ms={SHARE}"
            else:
                yield from (f"{where}.target={{macs: {SHARE}}}", f"{where}.ranking=global")
        for options, training in ((where, stage), (f"{where}.recovery", stage.get("recovery"))):
            if training and "learning_rate" in training:
                yield from (f"{options}.epochs=null", f"{options}.steps=1", f"{options}.batch_size=8")


def targets(recipe: Recipe) -> Mapping[str, float]:
    """The smallest fractions of the baseline that any stage aims at."""
    wanted: dict[str, float] = {}
    for stage in recipe.stages:
        for name, bound in getattr(stage, "target", None) or ():
            if bound is not None and bound.relative:
                wanted[name] = min(bound.value, wanted.get(name, 1.0))
    return wanted


def run_shipped(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a shipped recipe at a small size, and look at everything that comes out."""
    # After one step, which class is on top is chance, and so is whether INT8 keeps it: how far the logits move is not.
    monkeypatch.setattr(parity, "INT8_AGREEMENT", 0.0)
    monkeypatch.setattr(latency_target, "RANDOM_COPIES", 1)  # each one is quantized and exported
    for name, less in {"ROUNDS": 3, "PATIENCE": 1, "CALLS": 20, "PROFILES": 1}.items():  # targets are wide
        monkeypatch.setattr(latency_target, name, less)
    monkeypatch.setattr(proof, "_retrain_memory", lambda *_: {"error": "not asked for by this test"})
    recipe = load_recipe(path).recipe
    run = tmp_path / "run"
    overrides = list(shrink(path, recipe, tmp_path))
    report = compress(path, run, overrides=overrides)
    assert report.passed, report.verdict
    assert [stage["type"] for stage in report.stages] == [stage.type for stage in recipe.stages]
    assert max(pair["difference"] for pair in report.parity["float"]["pairs"].values()) <= 1e-4
    published = {"baseline_fp32.xml", "baseline_fp32.bin", "result_fp32.onnx", "result_fp32.xml", "result_fp32.bin"}
    best = "result_fp32.xml"
    if any(stage.type == "quantize" for stage in recipe.stages):
        int8 = {name: pair["difference"] for name, pair in report.parity["int8"]["pairs"].items()}
        assert max(int8.values()) <= 0.15, int8
        assert len(int8) == 6, "torch, ONNX, IR at f32, IR as deployed: each with each"
        published |= {"result_int8.onnx", "result_int8.xml", "result_int8.bin"}
        best = "result_int8.xml"
    for name, fraction in targets(load_recipe(path, overrides).recipe).items():
        tolerance = LATENCY_TOLERANCE if name == "latency_ms" else 1.0
        assert getattr(report.result, name) <= tolerance * fraction * getattr(report.baseline, name)
    assert {Path(artifact.path).name for artifact in report.artifacts} == published
    labels: list[Any] = json.loads((run / "report.json").read_text())["data"]["labels"]
    assert list(read_labels(run / "artifacts" / best)) == labels
    assert verify_manifest(run) == []
