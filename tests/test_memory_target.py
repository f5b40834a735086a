"""Pruning to a memory of retraining: measured in a process of its own, met or refused, and nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import own_networks
import pytest
import torch
from pydantic import ValidationError
from target_stages import prune, run
from tiny_networks import QUANTIZE, SHORT, contents, tiny, tiny_recipe, write_recipe

from compressor import retraining, training_memory
from compressor.checkpoint import Network, load_network
from compressor.context import Context
from compressor.errors import RecipeError, ResourceError
from compressor.models.counting import count
from compressor.pipeline import compress
from compressor.recipe import Finetune, Recipe

MEMORY = {"train_peak_memory_bytes": "0.8x"}
NEXT = (3, Finetune(steps=5, batch_size=16))
FLOOR, BATCH = 300_000, 16  # of an interpreter, were networks as large as ours


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Rebuild what another process would rebuild, and count its memory in place of training it; what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def measure(run: Path, folder: Path, index: int, precision: str, architecture: dict[str, Any]) -> dict[str, int]:
        asked.append((run, index, precision, architecture["name"]))
        again = load_network(folder, tiny(4))
        counts = count(again.module, torch.zeros(1, *again.input))
        return {"peak_bytes": FLOOR + 22 * counts.params + counts.macs // 20}

    monkeypatch.setattr(training_memory, "retraining_memory", measure)
    return asked


@pytest.mark.parametrize("options", [{}, {"ranking": "global", "iterations": 2}])
def test_retraining_takes_no_more_than_was_asked_for(
    options: dict[str, object], network: Network, context: Context, counted: list[Any]
) -> None:
    outcome = prune(network, context, MEMORY, finetune=NEXT, **options)
    found = outcome.details["targets"]["train_peak_memory_bytes"]
    counts = count(outcome.network.module, context.example)
    assert found["measured"] == FLOOR + 22 * counts.params + counts.macs // 20, "of the very network that came out"
    assert 0.85 * found["goal"] < found["measured"] <= found["goal"]
    assert found["goal"] == pytest.approx(0.8 * found["probes"][0]["baseline"])
    assert outcome.details["binding_target"] == "train_peak_memory_bytes"
    assert set(counted) == {(context.run_dir, 3, "auto", "xception")}
    assert len(counted) <= 5 * options.get("iterations", 1), "each measurement is a process"  # type: ignore[operator]
    assert list(context.run_dir.iterdir()) == []


def test_all_kinds_of_targets_are_met_at_once(network: Network, context: Context, counted: list[Any]) -> None:
    target = {**MEMORY, "size_bytes": "0.75x", "macs": "0.9x", "params": "0.9x"}
    outcome = prune(network, context, target, finetune=NEXT)
    targets = outcome.details["targets"]
    assert targets.keys() == target.keys()
    used = {name: found["measured"] / found["goal"] for name, found in targets.items()}
    assert all(share <= 1 for share in used.values())
    assert max(used.values()) > 0.9
    assert used[outcome.details["binding_target"]] == max(used.values())
    tried = zip(targets["size_bytes"]["probes"], targets["train_peak_memory_bytes"]["probes"], strict=True)
    assert all(size["goal"] and memory["goal"] for size, memory in tried), "the same networks are measured for both"


def test_blocks_are_dropped_until_retraining_fits(network: Network, context: Context, counted: list[Any]) -> None:
    stage = {"type": "drop_blocks", "target": MEMORY, "metric_images": 8}
    outcome = run(network, context, stage, finetune=NEXT)
    found = outcome.details["targets"]["train_peak_memory_bytes"]
    assert len(outcome.details["drops"]) == len(found["probes"]) - 1 > 0
    assert found["measured"] <= found["goal"] < found["probes"][-2]["measured"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"type": "prune", "target": {"train_peak_memory_bytes": "0.05x"}, "round_to": 2, "min_channels": 2},
            r"stages\[2\]\.target\.train_peak_memory_bytes: found [\d,]+ bytes of training memory, but the smallest .*"
            r"reachable here: [\d,]+ bytes of training memory to [\d,]+ bytes of training memory \(0\.\d+x to 0\.\d+x",
        ),
        (
            {"type": "drop_blocks", "target": {"train_peak_memory_bytes": 1}},
            r"stages\[2\]\.target: 2 blocks can be dropped, which leaves [\d,]+ bytes of training memory",
        ),
    ],
)
def test_a_memory_out_of_reach_is_refused_before_training(
    stage: dict[str, object],
    message: str,
    tiny_network: None,
    tiny_images: Path,
    tmp_path: Path,
    counted: list[Any],
) -> None:
    """Networks that come of a stage after another are rebuilt by the edits of both."""
    dropped = {"type": "drop_blocks", "count": 1, "metric_images": 8}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, {**SHORT, "epochs": 50}, dropped, stage, SHORT)
    with pytest.raises(RecipeError, match=message):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run.partial/stages/*"))
    assert not list(tmp_path.glob("run.partial/.*"))
    assert {(index, folder) for folder, index, _, _ in counted} == {(3, tmp_path / "run.partial")}


@pytest.mark.parametrize(("after", "refused"), [((), True), ((QUANTIZE,), True), ((QUANTIZE, SHORT), False)])
def test_a_stage_that_nothing_retrains_has_no_such_target(
    after: tuple[dict[str, Any], ...], refused: bool, tiny_images: Path
) -> None:
    recipe = tiny_recipe(tiny_images, SHORT, {"type": "prune", "target": MEMORY}, *after)
    if refused:
        with pytest.raises(ValidationError, match="no finetune follows this stage") as caught:
            Recipe.model_validate(recipe)
        assert caught.value.errors()[0]["loc"] == ("stages", 1, "target", "train_peak_memory_bytes")
    else:
        Recipe.model_validate(recipe)


def test_a_process_that_fails_ends_the_stage(
    network: Network, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_memory, "retraining_memory", lambda *_: {"error": "killed"})
    with pytest.raises(
        ResourceError, match=r"stages\[1\]\.target\.train_peak_memory_bytes: .* not be measured: killed"
    ):
        prune(network, context, MEMORY, finetune=NEXT)
    assert list(context.run_dir.iterdir()) == []


def test_a_module_that_no_other_process_can_build_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    stages = (SHORT, {"type": "prune", "target": MEMORY}, SHORT)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages, model={"source": "custom"})
    with pytest.raises(
        RecipeError, match=r"target\.train_peak_memory_bytes: another process cannot rebuild .*--factory"
    ):
        compress(recipe, tmp_path / "run", model=own_networks.make(4))
    assert not list(tmp_path.glob("run.partial/stages/*"))


def test_a_real_process_is_measured(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bytes are out of any interpreter's reach: two networks are trained to say what is within it."""
    monkeypatch.setattr(retraining, "RETRAIN_STEPS", 2)
    stages = (SHORT, {"type": "prune", "target": {"train_peak_memory_bytes": 10}}, {**SHORT, "batch_size": 64})
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages, model={"source": "custom"})
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match=r"found 10 bytes of training memory, but the smallest .*\(") as caught:
        compress(recipe, tmp_path / "run", model=own_networks.make)
    least, most = (
        int(part.split(" bytes")[0].replace(",", "")) for part in str(caught.value).split("here: ")[1].split(" to ")[:2]
    )
    assert 100e6 < least < 1.1 * most < 2e9, "an interpreter with torch, and little more"
    left = {name for name in contents(tmp_path) if name not in before}
    assert left == {"run.partial/recipe.yaml", "run.partial/run.log"}


def test_a_recipe_may_name_every_target(tiny_images: Path) -> None:
    target = {"macs": "0.5x", "params": 10, "latency_ms": 3.5, "size_bytes": "0.2x", **MEMORY}
    stages = (SHORT, {"type": "prune", "target": target}, SHORT)
    recipe = Recipe.model_validate(tiny_recipe(tiny_images, *stages))
    assert json.loads(recipe.model_dump_json())["stages"][1]["target"] == target
    with pytest.raises(
        ValidationError, match="needs one or several of macs, params, latency_ms, size_bytes, train_peak"
    ):
        Recipe.model_validate(tiny_recipe(tiny_images, SHORT, {"type": "prune", "target": {}}))
