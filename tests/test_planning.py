"""`plan` predicts what stages do to the structure, refuses what cannot be reached, and writes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_networks import FINETUNE, KERNELS, PRUNE, QUANTIZE, tiny, write_recipe

from compressor import cli
from compressor.errors import DataError, RecipeError
from compressor.models.counting import count
from compressor.planning import plan_recipe

pytestmark = pytest.mark.usefixtures("tiny_network")
EXAMPLE = torch.zeros(1, 3, 48, 48)
REDUCE = {"type": "reduce_channels", "width": 0.5, "round_to": 4, "min_channels": 4}
CLASSES = 4


@pytest.fixture
def images(tiny_images: Path, tmp_path: Path) -> Path:
    """Class folders, each with one file, are all that a plan reads of the data; nothing in them is decoded."""
    for folder in tiny_images.glob("*/*"):
        (tmp_path / "images" / folder.relative_to(tiny_images)).mkdir(parents=True)
        (tmp_path / "images" / folder.relative_to(tiny_images) / "000.png").write_bytes(b"no image")
    return tmp_path / "images"


def planned(images: Path, *stages: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    recipe = write_recipe(images.parent / "recipe.yaml", images, *stages, **sections)
    return plan_recipe(recipe)


def test_the_baseline_is_the_dense_network(images: Path) -> None:
    plan = planned(images, FINETUNE, QUANTIZE)
    dense = count(tiny(CLASSES), EXAMPLE)
    assert plan["baseline"] == {"params": dense.params, "macs": dense.macs}
    assert [(row["where"], row["macs"], row["params"]) for row in plan["stages"]] == [
        ("stages[0]", dense.macs, dense.params),
        ("stages[1]", dense.macs, dense.params),
    ]
    assert plan["stages"][0]["what"] == "finetune, 3 epochs"
    assert plan["stages"][1]["what"] == "quantize to int8, 28 calibration images"
    assert "4 classes" in plan["notes"]
    assert json.loads(json.dumps(plan)) == plan


def test_a_target_is_met(images: Path) -> None:
    plan = planned(images, FINETUNE, PRUNE)
    baseline, row = plan["baseline"], plan["stages"][1]
    assert row["what"].startswith("prune by magnitude")
    assert 0.5 * baseline["macs"] < row["macs"] <= 0.7 * baseline["macs"]
    assert row["params"] < baseline["params"]


def test_targets_are_fractions_of_the_baseline_not_of_the_stage_before(images: Path) -> None:
    half = {**PRUNE, "target": {"macs": "0.6x"}}
    plan = planned(images, FINETUNE, PRUNE, half)
    assert plan["stages"][2]["macs"] <= 0.6 * plan["baseline"]["macs"]
    assert plan["stages"][2]["macs"] > 0.6 * plan["stages"][1]["macs"]


def test_widths_shrink_every_layer(images: Path) -> None:
    plan = planned(images, FINETUNE, REDUCE)
    ratio = plan["stages"][1]["macs"] / plan["baseline"]["macs"]
    assert 0.2 < ratio < 0.4  # pointwise convolutions by a quarter, depthwise ones by a half
    assert plan["stages"][1]["what"] == "reduce_channels to width 0.5"


def test_kernels_become_one_by_one_and_save_eight_ninths(images: Path) -> None:
    plan = planned(images, FINETUNE, KERNELS)
    dense = count(tiny(CLASSES), EXAMPLE)
    spatial = [name for name in dense.per_layer if name.startswith("block3.rep.") and name.endswith("conv1")]
    saved = sum(dense.per_layer[name] for name in spatial) * 8 // 9
    assert plan["stages"][1]["macs"] == dense.macs - saved
    assert plan["stages"][1]["what"] == f"replace_kernels: {len(spatial)} convolutions become 1x1"


def test_blocks_are_dropped_to_a_count_or_a_target(images: Path) -> None:
    dense = count(tiny(CLASSES), EXAMPLE)
    block = sum(macs for name, macs in dense.per_layer.items() if name.startswith("block2."))
    counted = planned(images, FINETUNE, {"type": "drop_blocks", "count": 2})
    assert counted["stages"][1]["macs"] == dense.macs - 2 * block
    assert counted["stages"][1]["what"] == "drop_blocks: 2 of 3"
    goal = (dense.macs - block) / dense.macs
    targeted = planned(images, FINETUNE, {"type": "drop_blocks", "target": {"macs": f"{goal + 0.001:.3f}x"}})
    assert targeted["stages"][1]["what"] == "drop_blocks: 1 of 3"


def test_stages_work_on_what_the_one_before_left(images: Path) -> None:
    stages = [FINETUNE, {"type": "drop_blocks", "count": 1}, KERNELS, PRUNE, QUANTIZE]
    macs = [row["macs"] for row in planned(images, *stages)["stages"]]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == 4  # all but the first and the last stage change the structure


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (
            {**PRUNE, "target": {"macs": "0.001x"}},
            r"stages\[1\]: prune: a target of \S+ macs .*reach from \S+ \(0\.\d+x of the",
        ),
        (
            {**PRUNE, "target": {"params": 10}},
            r"stages\[1\]: prune: a target of 10 params cannot be reached.* reach from",
        ),
        (
            {**PRUNE, "ignored_scope": ["fcc"]},
            r"stages\[1\]\.ignored_scope.*'fcc' matches no module; did you mean 'fc'\?",
        ),
        (
            {**FINETUNE, "freeze": ["blok1"]},
            r"stages\[1\]\.freeze\[0\]: 'blok1' matches no module; did you mean 'block1'",
        ),
        ({**FINETUNE, "freeze": ["*"]}, r"stages\[1\]\.freeze: \['\*'\] leave no layer to train; leave out 'fc'"),
        (
            {"type": "drop_blocks", "count": 1, "recovery": {"steps": 1, "freeze": ["fcc"]}},
            r"stages\[1\]\.recovery\.freeze\[0\]: 'fcc' matches no module; did you mean 'fc'",
        ),
        ({**REDUCE, "widths": {"blok2.*": 0.5}}, r"stages\[1\]: reduce_channels: .*'blok2\.\*'.* matches no"),
        ({**KERNELS, "scope": ["fc"]}, r"stages\[1\]: scope: no depthwise convolution in it can become 1x1"),
        ({**KERNELS, "ignored_scope": ["block3.*"]}, r"stages\[1\]\.ignored_scope: leaves no convolution of"),
        ({"type": "drop_blocks", "count": 4}, r"stages\[1\]\.count: found 4, but 3 blocks can be dropped"),
        (
            {"type": "drop_blocks", "target": {"macs": "0.01x"}},
            r"stages\[1\]\.target: \d blocks can be dropped, which leaves \S+ MACs \(0\.\d+x of the baseline\)",
        ),
        ({"type": "drop_blocks", "count": 1, "scope": ["fc"]}, r"stages\[1\]\.scope: no residual block in \['fc'\]"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(images: Path, stage: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        planned(images, FINETUNE, stage)


def test_missing_data_and_weights(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        planned(tmp_path / "absent", FINETUNE)
    model = {"name": "xception", "weights": str(tmp_path / "absent.safetensors")}
    notes = " ".join(planned(images, FINETUNE, model=model)["notes"])
    assert "planned on random weights (" in notes
    assert "absent.safetensors: no such weights file" in notes


def tree(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_command_writes_nothing(
    images: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.chdir(images.parent)
    stages = [FINETUNE, {"type": "drop_blocks", "count": 1}, PRUNE, QUANTIZE]
    recipe = write_recipe(images.parent / "recipe.yaml", images, *stages)
    before = tree(images.parent, own_cache)
    assert cli.main(["plan", str(recipe), *form]) == 0
    assert tree(images.parent, own_cache) == before
    out = capsys.readouterr().out
    if form:
        assert json.loads(out) == plan_recipe(recipe)
    else:
        assert "drop_blocks: 1 of 3" in " ".join(out.split())
        assert all(f"stages[{i}]" in out for i in range(4))


def test_the_command_refuses_an_unreachable_target(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(images.parent / "recipe.yaml", images, FINETUNE, PRUNE)
    assert cli.main(["plan", str(recipe), "--set", "stages[1].target.macs=0.001x", "--json"]) == 2
    assert "these settings reach from" in json.loads(capsys.readouterr().out)["error"]
