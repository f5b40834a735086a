"""A smaller input is one more lever: what comes after works and is measured at its size, the baseline at its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_networks import DISTILLED, FINETUNE, QUANTIZE, SHORT, TinyNetwork, write_recipe
from torch import Tensor, nn

from compressor import compress
from compressor.benchmark import bench_target
from compressor.checkpoint import load_network
from compressor.data import Split
from compressor.data.batches import Augment
from compressor.errors import RecipeError
from compressor.feed import NOTHING_FROZEN, freezing, open_feed
from compressor.models.counting import count
from compressor.planning import plan_recipe
from compressor.preprocess import InputSpec
from compressor.recipe import Recipe, Stage
from compressor.recipe_loader import load_recipe
from compressor.resolution import load_data, sizes_of
from compressor.retrain import retrain
from compressor.runtime import network_size
from compressor.training import TrainingResult
from compressor.training import finetune as training_loop

SMALLER = {"type": "reduce_resolution", "size": 32, "bn_batches": 4}
FULL, REDUCED = InputSpec(64, 64), InputSpec(32, 32)


@pytest.mark.parametrize(
    ("stages", "size", "message"),
    [
        ([SMALLER], 32, "stages[0].size: found [32, 32], allowed less than the [32, 32] before"),
        ([SMALLER], [64, 24], "stages[0].size: found [32, 32], allowed less than the [64, 24] before"),
        (
            [SMALLER, {**SMALLER, "size": [32, 40]}],
            48,
            "stages[1].size: found [32, 40], allowed less than the [32, 32]",
        ),
        ([SHORT, QUANTIZE, SMALLER], 48, "stages[2].type: found 'reduce_resolution' after the quantize of stages[1]"),
        ([{**SMALLER, "size": 4}], 48, "stages[0].size: found 4, allowed an integer >= 8 and <= 4096 or a list of 2"),
        ([{"type": "reduce_resolution"}], 48, "stages[0].size: found nothing, needs"),
        ([SMALLER, {**SHORT, "augment": {"shift": 40}}], 48, "stages[1].augment.shift: found 40, allowed less than"),
        (
            [SHORT, {**SMALLER, "size": 40}, {**DISTILLED, "augment": {"rotate90": True}}],
            [48, 64],
            "stages[2].augment.rotate90: found true, needs a square input.size, not [48, 64]",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    stages: list[dict[str, object]], size: object, message: str, tiny_images: Path, tmp_path: Path
) -> None:
    model = {"source": "timm", "name": "resnet18", "weights": "none"}  # of any size, unlike the built-in network
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages, input={"size": size}, model=model)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert message in str(caught.value)


def test_the_built_in_network_has_a_smallest_size(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, SMALLER)
    with pytest.raises(RecipeError, match=r"stages\[1\]\.size: found 32, allowed an integer >= 33 for the built-in"):
        load_recipe(recipe)


def test_a_size_that_only_the_network_tells_is_checked_too() -> None:
    stage = load_stage(40)
    assert sizes_of([stage], (48, 48)) == [(40, 40)]
    with pytest.raises(
        RecipeError, match=r"stages\[0\]\.size: found \[40, 40\], allowed less than the \[32, 32\] before"
    ):
        sizes_of([stage], (32, 32))


def load_stage(size: int) -> Stage:
    return Recipe.model_validate(
        {
            "version": 1,
            "model": {"source": "timm", "name": "resnet18"},
            "data": {"source": "synthetic_pcb"},
            "stages": [{**SMALLER, "size": size}],
        }
    ).stages[0]


def splits() -> tuple[Split, Split]:
    """Smooth images at 64 pixels, and the same at 32: means of four."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (10, 3, 5, 5), generator=generator).float()
    fine = F.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False).clamp(0, 255)
    sides = []
    for x in (fine, F.avg_pool2d(fine, 2)):
        pixels = x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        sides.append(Split(pixels, np.arange(10) % 3, tuple(map(str, range(10)))))
    return sides[0], sides[1]


@pytest.mark.parametrize(
    "augment",
    [
        None,
        Augment(),
        Augment(shift=6),
        Augment(rotate90=True, vertical_flip=True),
        Augment(crop=0.6),
        Augment(mixup=0.5),
    ],
    ids=["none", "flip", "shift", "turns", "crop", "mixup"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["live", "frozen"])
def test_a_teacher_sees_what_its_student_sees_at_its_own_size(
    augment: Augment | None, freeze: bool, tmp_path: Path
) -> None:
    full, reduced = splits()
    network = TinyNetwork(3).eval()
    layers = {"conv1", "bn1", "act1"} if freeze else set()
    with freezing(network, layers, folder=tmp_path, max_bytes=10**8) as frozen:
        feed = open_feed(
            network,
            frozen if freeze else NOTHING_FROZEN,
            train=reduced,
            val=reduced,
            spec=REDUCED,
            augment=augment,
            dtype=torch.float32,
            device="cpu",
            shown=(full, FULL),
        )
        cached = freeze and not (augment and augment.orientations() is None)
        for batch in feed.batches(5, torch.Generator().manual_seed(1)):
            seen = batch.images(None)
            assert seen.shape == (5, 3, 64, 64)
            some = np.array([1, 3])
            if batch.blend is None:  # nobody asks for some of images that are blended with each other
                assert torch.equal(batch.images(some), seen[torch.from_numpy(some)])
            if not cached:
                assert batch.inputs.shape == (5, 3, 32, 32)
                edge = 7 if augment and augment.shift else 0  # reflection is about pixels' centres, of either size
                difference = (F.avg_pool2d(seen, 2) - batch.inputs)[..., edge : 32 - edge, edge : 32 - edge]
                assert float(difference.abs().max()) < 0.12
            else:
                small = network.act1(network.bn1(network.conv1(F.avg_pool2d(seen, 2))))
                assert float((small - batch.inputs).abs().max()) < 0.12


@pytest.mark.usefixtures("tiny_network")
def test_a_run_is_measured_at_the_size_that_is_deployed(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = {**DISTILLED, "distill": {**DISTILLED["distill"], "features": 1.0}}
    stages = ({**FINETUNE, "epochs": 2}, {**SMALLER, "size": 34}, DISTILLED, QUANTIZE, taught)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages, budget={"macs": "0.6x"})
    report = compress(recipe, tmp_path / "run")
    assert report.passed, report.verdict
    artifacts = tmp_path / "run" / "artifacts"
    assert network_size(artifacts / "baseline_fp32.xml") == (48, 48)
    assert network_size(artifacts / "result_int8.xml") == network_size(artifacts / "result_fp32.xml") == (34, 34)
    module = TinyNetwork(4).eval()
    assert report.baseline.macs == count(module, torch.zeros(1, 3, 48, 48)).macs
    assert report.result.macs == count(module, torch.zeros(1, 3, 34, 34)).macs
    params = [stage["footprint"]["params"] for stage in report.stages]
    assert params[0] == params[1] == params[2]
    assert report.baseline.accuracy is not None
    assert report.baseline.accuracy > 0.9
    assert report.result.accuracy is not None
    assert report.result.accuracy > 0.9
    told = {Path(a.path).name: a.io.get("image") for a in report.artifacts if a.path.endswith(".onnx")}
    assert told["result_int8.onnx"] == "float32 [N,3,34,34] RGB 0-255"
    assert report.stages[1]["details"] == {"baseline_size": [48, 48], "size": [34, 34]}
    assert load_network(tmp_path / "run" / "stages" / "00-finetune").input == (3, 48, 48)
    assert load_network(tmp_path / "run" / "stages" / "04-finetune").input == (3, 34, 34)
    timed = bench_target(tmp_path / "run", calls=5, threads=1, seconds=0.05)["size"]
    assert timed == {"baseline": [48, 48], "baseline_default": [48, 48], "result": [34, 34]}
    sides: list[InputSpec] = []

    def trained(module: nn.Module, *, spec: InputSpec, **options: Any) -> TrainingResult:
        sides.append(spec)
        return training_loop(module, spec=spec, **options)

    monkeypatch.setattr("compressor.training.finetune", trained)
    assert retrain(tmp_path / "run", tmp_path / "run" / "stages" / "02-finetune", 2, 2, "auto")["peak_bytes"] > 0
    assert [(spec.height, spec.width) for spec in sides] == [(34, 34)]
    again = compress(recipe, tmp_path / "again")
    assert [stage["reused"] for stage in again.stages] == [True] * 5
    assert again.result.accuracy == report.result.accuracy
    planned = plan_recipe(recipe)
    assert [row["macs"] for row in planned["stages"]][0::2] == [report.baseline.macs, *[report.result.macs] * 2]
    assert "reduce_resolution to 34 x 34" in planned["stages"][1]["what"]


@pytest.mark.usefixtures("tiny_network")
def test_later_stages_work_at_the_new_size(tiny_images: Path, tmp_path: Path) -> None:
    """Targets count, time, drop and score at the size that is deployed; fractions stay fractions of the baseline."""
    dropped = {"type": "drop_blocks", "count": 1, "metric": "distill_loss", "metric_images": 16, "bn_batches": 2}
    asked = {"latency_ms": "1x", "macs": "0.4x"}
    pruned = {"type": "prune", "target": asked, "importance": "taylor", "importance_batches": 1, "round_to": 2}
    stages = (SHORT, {**SMALLER, "size": 36}, dropped, {**pruned, "min_channels": 2, "bn_batches": 2}, DISTILLED)
    report = compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages), tmp_path / "run")
    assert report.result.macs is not None
    assert report.baseline.macs is not None
    assert 0.3 < report.result.macs / report.baseline.macs <= 0.4
    network = load_network(tmp_path / "run" / "stages" / "03-prune")
    assert network.input == (3, 36, 36)
    assert count(network.module, torch.zeros(1, 3, 36, 36)).macs == report.result.macs
    probe = report.stages[3]["details"]["targets"]["latency_ms"]["probes"][0]
    assert probe["measured"] < probe["baseline"]


class FixedInput(TinyNetwork):
    """Flattens its last map, so that it takes images of 48 pixels alone."""

    def __init__(self) -> None:
        super().__init__(4)
        self.global_pool = nn.Identity()
        self.fc = nn.Linear(48 * 6 * 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_network_of_one_size_is_refused_before_it_is_trained(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, {**SHORT, "epochs": 5}, {**SMALLER, "size": 40})
    with pytest.raises(RecipeError, match=r"stages\[1\]: size: the network cannot take images of 40 x 40 pixels"):
        compress(recipe, tmp_path / "run", model=FixedInput())
    assert not list((tmp_path / "run.partial").glob("stages/*"))


def test_generated_images_are_the_same_at_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones repeat each other more often; which are kept is decided at the recipe's own size."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    per_class = {"train_per_class": 30, "val_per_class": 6, "test_per_class": 6}
    data = {"source": "synthetic_pcb", **per_class}
    tree = {"version": 1, "model": {"name": "xception"}, "data": data, "stages": [{"type": "finetune", "epochs": 1}]}
    recipe = Recipe.model_validate({**tree, "input": {"size": 64}})
    full = load_data(recipe, InputSpec(64, 64))
    tiny = load_data(recipe, InputSpec(1, 1), like=full)
    assert tiny.train.names == full.train.names
    assert np.array_equal(tiny.train.labels, full.train.labels)
    alone = load_data(recipe, InputSpec(1, 1))
    assert len(alone.train) < len(tiny.train), "at one pixel some repeat each other: the test would notice"
    small = load_data(recipe, InputSpec(16, 16), like=full)
    wanted = full.test.images[:5].astype(float).reshape(5, 16, 4, 16, 4, 3).mean((2, 4))
    assert float(np.abs(small.test.images[:5] - wanted).mean()) < 12
