"""A stage of many steps that was cut off goes on from its last one, and ends with the weights of one left alone."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from target_stages import fresh_network
from tiny_networks import DROP, PRUNE, contents, write_recipe

from compressor import pipeline
from compressor.context import Work
from compressor.errors import RecipeError
from compressor.memory import MemoryUse
from compressor.pipeline import compress
from compressor.pruning.blocks import drop_blocks
from compressor.resume_points import WORK_JSON, keep_point, last_point

FLOAT32 = {"precision": "float32"}
RECOVERY = {"steps": 3, "batch_size": 16, **FLOAT32}
TRAINED = {"type": "finetune", "steps": 4, "batch_size": 16, "learning_rate": 5e-3, **FLOAT32}
SPARSIFY = {"steps": 2, "batch_size": 16, "strength": 1e-3, **FLOAT32}
PRUNED = {**PRUNE, "importance": "taylor", "importance_batches": 2, "iterations": 2, "recovery": RECOVERY}
# A stage, after how many points it is cut off, and how many it keeps when it goes on.
STAGES: dict[str, tuple[dict[str, Any], int, int]] = {
    "drop_blocks": ({**DROP, "count": 2, "metric": "distill_loss", "recovery": RECOVERY}, 1, 1),
    "prune": (PRUNED, 1, 0),
    "sparsify": (
        {key: value for key, value in PRUNED.items() if key != "target"} | {"pruning_ratio": 0.4, "sparsify": SPARSIFY},
        1,
        1,
    ),
}


class CutOffError(Exception):
    """In the place of a power cut."""


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch, tiny_network: None) -> None:
    """Runs end when their stages are done."""

    def cut(*_: object, **__: object) -> None:
        raise CutOffError

    monkeypatch.setattr(pipeline, "prove", cut)


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[dict[str, Any]]]:
    """Cut the next run off as soon as so many points have been kept; returns what is kept later."""

    def arm(points: int) -> list[dict[str, Any]]:
        kept: list[dict[str, Any]] = []

        def keep(folder: Path, *arguments: Any) -> None:
            keep_point(folder, *arguments)
            kept.append(json.loads((folder / WORK_JSON).read_text()))
            if len(kept) == points:
                raise CutOffError

        monkeypatch.setattr(pipeline, "keep_point", keep)
        return kept

    return arm


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_from_its_last_step(
    name: str,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unproven: None,
    cut_after: Callable[[int], list[dict[str, Any]]],
) -> None:
    stage, points, left = STAGES[name]
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, TRAINED, stage)
    for alone in (True, False):  # a cache of each run's own: nothing is reused from the other
        monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / f"cache{alone}"))
        if not alone:
            cut_after(points)
        with pytest.raises(CutOffError):
            compress(recipe, tmp_path / f"alone{alone}")
    partial = tmp_path / "aloneFalse.partial"
    (point,) = partial.glob("stages/unfinished-01-*")
    with pytest.raises(RecipeError, match="--resume continues it"):
        compress(recipe, tmp_path / "aloneFalse")
    later = cut_after(-1)
    with pytest.raises(CutOffError):
        compress(recipe, tmp_path / "aloneFalse", resume=True)
    assert not point.exists(), "what is finished needs no point"
    assert len(later) == left
    assert "goes on where it was cut off" in (partial / "run.log").read_text()
    folders = [tmp_path / f"alone{alone}.partial" / "stages" for alone in (True, False)]
    same = [contents(folder, ("model.safetensors", "model.json", "plan.json")) for folder in folders]
    assert same[0] == same[1]
    records = [json.loads((next(folder.glob("01-*")) / "footprint.json").read_text()) for folder in folders]
    for key in ("drops", "iterations", "notes"):
        assert records[0]["details"].get(key) == records[1]["details"].get(key)
    histories = [[part["images"] for part in record["details"]["recovery"]] for record in records]
    assert histories[0] == histories[1], "no training was done twice"
    assert records[1]["footprint"]["train_time_s"] > 0


def test_a_damaged_point_does_not_count(tmp_path: Path, tiny_network: None) -> None:
    start = fresh_network()
    work = Work({"seen": [1]}, ["a note"], [{"type": "drop_blocks", "modules": ["block2"]}], train_time_s=2.0)
    work.memory, work.reached = MemoryUse(1, 3, 2, [(0.0, 1)]), {"steps": 1}
    network = dataclasses.replace(start, module=copy.deepcopy(start.module), edits=tuple(work.edits))
    drop_blocks(network.module, ["block2"])
    point = tmp_path / "unfinished-01-drop_blocks"
    keep_point(point, "key", network, work)
    found = last_point(point, "key", start, None)
    assert found is not None
    assert found[0].edits == start.edits
    assert found[1] == dataclasses.replace(work, memory=MemoryUse(1, 3, 2, []))
    for name, value in network.module.state_dict().items():
        assert torch.equal(found[0].module.state_dict()[name], value)

    def damaged(name: str, change: Callable[[bytes], bytes]) -> bool:
        """Whether the point still counts."""
        whole = (point / name).read_bytes()
        (point / name).write_bytes(change(whole))
        counts = last_point(point, "key", start, None) is not None
        (point / name).write_bytes(whole)
        return counts

    assert damaged(WORK_JSON, lambda whole: whole), "nothing was damaged"
    assert not damaged(WORK_JSON, lambda whole: whole[:-9])
    assert not damaged("model.safetensors", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not damaged("model.json", lambda whole: whole + b" ")
    assert last_point(point, "another stage's", start, None) is None
    assert last_point(tmp_path / "nothing", "key", start, None) is None
