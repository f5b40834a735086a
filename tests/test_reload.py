"""A compressed network reloads in a fresh process and computes what it computed in the process that made it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import DISTILLED, DROP, EVERY_STAGE, FINETUNE, KERNELS, PRUNE, QUANTIZE, make_images, write_recipe

from compressor import pipeline
from compressor.parity import ir_logits, onnx_logits, torch_logits
from compressor.pipeline import compress
from compressor.report import Report
from compressor.runtime import F32

REPOSITORY = Path(__file__).resolve().parent.parent
# Only what the run left on disk: no recipe, no data set, no network but the one `model.json` describes.
RELOAD = """
import sys
from pathlib import Path
import numpy as np
from compressor.checkpoint import load_network
from compressor.parity import torch_logits
from compressor.preprocess import InputSpec
if sys.argv[4] == "tiny":
    from compressor import models
    from tiny_networks import tiny
    models.BUILTIN["xception"] = tiny
network = load_network(Path(sys.argv[1]))
images = np.load(sys.argv[2])
np.save(sys.argv[3], torch_logits(network.module, images, InputSpec(*images.shape[1:3])))
"""


def run_and_remember(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Run a recipe and keep test images and the logits of the networks in this process, outside the run's folder."""
    prove = pipeline.prove

    def remembering(context, recipe, networks, **rest):  # type: ignore[no-untyped-def]
        images = np.array(context.data.test.images)
        np.save(folder / "images.npy", images)
        for name, network in (("floating", networks.floating), ("quantized", networks.quantized)):
            np.save(folder / f"{name}.npy", torch_logits(network.module, images, context.data.spec))
        return prove(context, recipe, networks, **rest)

    monkeypatch.setattr(pipeline, "prove", remembering)
    return compress(recipe, folder / "run")


def reload(stage: Path, folder: Path, network: str) -> np.ndarray:
    """Logits of a stage's network on the remembered images, from a process that knows nothing else."""
    search = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(stage), str(folder / "images.npy"), str(folder / "again.npy"), network],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=folder,
        check=True,
    )
    return np.load(folder / "again.npy")


def test_every_kind_of_edit_reloads_to_equal_outputs(
    tiny_network: None, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *EVERY_STAGE)
    assert run_and_remember(recipe, tmp_path, monkeypatch).passed
    stages = tmp_path / "run" / "stages"
    edits = json.loads((stages / "06-finetune" / "model.json").read_text())["edits"]
    assert [edit["type"] for edit in edits] == ["replace_kernels", "drop_blocks", "prune", "fold_bn"]
    floating, quantized = np.load(tmp_path / "floating.npy"), np.load(tmp_path / "quantized.npy")
    assert np.array_equal(reload(stages / "04-finetune", tmp_path, "tiny"), floating)
    assert np.array_equal(reload(stages / "06-finetune", tmp_path, "tiny"), quantized)
    assert not np.allclose(floating, quantized, atol=1e-3), "otherwise the second comparison says nothing"
    published(tmp_path, floating, quantized)


def published(folder: Path, floating: np.ndarray, quantized: np.ndarray) -> None:
    """What was published computes what the process computed: ONNX in onnxruntime and IR, float and INT8."""
    images, artifacts = np.load(folder / "images.npy"), folder / "run" / "artifacts"
    for logits in (
        onnx_logits(artifacts / "result_fp32.onnx", images),
        ir_logits(artifacts / "result_fp32.xml", images, F32),
    ):
        assert np.abs(logits - floating).max() <= 1e-4 * np.ptp(floating)
    for logits in (
        onnx_logits(artifacts / "result_int8.onnx", images),
        ir_logits(artifacts / "result_int8.xml", images, F32),
        ir_logits(artifacts / "result_int8.xml", images),
    ):
        noise = np.square(logits - quantized).mean()
        assert 10 * np.log10(np.square(quantized - quantized.mean()).mean() / noise) > 25, "dB of signal"
        assert (logits.argmax(1) == quantized.argmax(1)).mean() >= 0.95


def test_xception_reloads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(tmp_path / "images", per_class=12, test_per_class=6)
    step = {"epochs": None, "steps": 6, "batch_size": 8}  # after two, logits hardly differ from image to image
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        images,
        {**FINETUNE, **step, "learning_rate": 1e-3},
        {**KERNELS, "scope": ["block12.rep.*"], "bn_batches": 1},
        {**DROP, "count": 2, "scope": ["block[4-6]"], "metric_images": 8, "bn_batches": 1},
        {**PRUNE, "target": {"macs": "0.4x"}, "round_to": 8, "bn_batches": 2},
        {**QUANTIZE, "subset_size": 8},
        {**DISTILLED, **step, "learning_rate": 1e-5},
    )
    report = run_and_remember(recipe, tmp_path, monkeypatch)
    assert not [reason for reason in report.verdict["reasons"] if "float parity" in reason]
    assert report.result.retrain_peak_memory_bytes, "measured in a process of its own"
    stages = tmp_path / "run" / "stages"
    floating, quantized = np.load(tmp_path / "floating.npy"), np.load(tmp_path / "quantized.npy")
    assert np.array_equal(reload(stages / "03-prune", tmp_path, "xception"), floating)
    assert np.array_equal(reload(stages / "05-finetune", tmp_path, "xception"), quantized)
    if report.passed:  # six steps of training: whether INT8 keeps 99 % of such answers is chance
        published(tmp_path, floating, quantized)
