"""The folder of a run: nothing finished is lost unasked, one process at a time, stages reused where nothing changed."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_networks import DISTILLED, DIVERGING, DROP, FINETUNE, PRUNE, QUANTIZE, SHORT, contents, write_recipe

from compressor import run_folder
from compressor.artifacts import verify_manifest
from compressor.environment import cache_dir
from compressor.errors import DataError, RecipeError, ResourceError, TrainingError
from compressor.pipeline import compress
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe
from compressor.report import Report
from compressor.run_folder import open_partial, partial_of

pytestmark = pytest.mark.usefixtures("tiny_network")
STAGES = (FINETUNE, DROP, PRUNE, DISTILLED)


@pytest.fixture
def recipe(tiny_images: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT)


@pytest.fixture
def tree(recipe: Path) -> Recipe:
    return load_recipe(recipe).recipe


@pytest.fixture
def unfinished(tree: Recipe, tmp_path: Path) -> Path:
    """What a killed run leaves: its recipe and a finished stage."""
    with open_partial(tmp_path / "run", tree, resume=False, force=False) as partial:
        (partial / "stages" / "00-finetune").mkdir(parents=True)
        (partial / "stages" / "00-finetune" / "footprint.json").write_text("{}")
    return partial


@pytest.fixture
def own_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, so that no stage of another test is reused."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return cache_dir() / "stages"


def test_a_finished_run_is_replaced_only_when_asked_and_only_by_a_complete_one(
    recipe: Path, tiny_images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    compress(recipe, run)
    before = contents(run)
    with pytest.raises(RecipeError, match=r"run: already exists; .*--out.*--force"):
        compress(recipe, run)
    with pytest.raises(RecipeError, match="already exists"):
        compress(recipe, run, resume=True)
    nowhere = write_recipe(tmp_path / "nowhere.yaml", tmp_path / "nowhere", SHORT)
    with pytest.raises(DataError, match="nowhere"):
        compress(nowhere, run, force=True)
    assert contents(run) == before, "an attempt that fails leaves the old run as it was"
    other = write_recipe(tmp_path / "other.yaml", tiny_images, SHORT, seed=7)
    assert compress(other, run, force=True).recipe["seed"] == 7
    assert json.loads((run / "report.json").read_text())["recipe"]["seed"] == 7
    assert verify_manifest(run) == []
    assert sorted(path.name for path in tmp_path.glob("*run*")) == ["run"]


@pytest.mark.parametrize("kind", ["folder", "file", "partial"])
def test_force_does_not_replace_what_is_not_a_run(kind: str, tree: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = partial_of(run) if kind == "partial" else run
    if kind == "file":
        run.write_text("mine")
    else:
        holder.mkdir()
        (holder / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    with (
        pytest.raises(RecipeError, match="not the folder of"),
        open_partial(run, tree, resume=False, force=True),
    ):
        pytest.fail("opened")
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_replaced(tree: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with open_partial(tmp_path / "run", tree, resume=False, force=True) as partial:
        assert contents(partial).keys() == {"recipe.yaml"}


def test_an_unfinished_run_is_continued_or_cleared_only_when_asked(
    recipe: Path, tree: Recipe, unfinished: Path, tmp_path: Path
) -> None:
    before = contents(unfinished)
    with pytest.raises(RecipeError, match=r"run\.partial: an unfinished run is there; --resume .*--force"):
        compress(recipe, tmp_path / "run")
    assert contents(unfinished) == before
    (unfinished / ".report.tmp123.json").write_text("half of")
    (unfinished / ".hidden").mkdir()
    with open_partial(tmp_path / "run", tree, resume=True, force=False):
        assert contents(unfinished) == before, "the stage is kept, what was being written is not"
    with open_partial(tmp_path / "run", tree, resume=False, force=True):
        assert contents(unfinished).keys() == {"recipe.yaml"}


def test_a_folder_in_which_only_the_recipe_was_being_written_can_be_used(tree: Recipe, tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "run")
    partial.mkdir()
    (partial / ".recipe.tmp123.yaml").write_text("half of")
    with open_partial(tmp_path / "run", tree, resume=False, force=False):
        assert contents(partial).keys() == {"recipe.yaml"}


def test_a_full_disk_is_not_taken_for_a_stage_that_is_missing(
    own_stages: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT)
    compress(recipe, tmp_path / "run")
    monkeypatch.setattr(run_folder.shutil, "copyfile", full)
    with pytest.raises(ResourceError, match=r"00-finetune: cannot be written \(No space left on device\)"):
        compress(recipe, tmp_path / "again")


def test_another_recipe_does_not_continue_a_run(tiny_images: Path, unfinished: Path, tmp_path: Path) -> None:
    before = contents(unfinished)
    other = write_recipe(tmp_path / "other.yaml", tiny_images, {**SHORT, "learning_rate": 0.003})
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        compress(other, tmp_path / "run", resume=True)
    assert contents(unfinished) == before


def test_there_must_be_something_to_resume(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no unfinished run to resume; leave out --resume"):
        compress(recipe, tmp_path / "run", resume=True)
    assert not partial_of(tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [{}, {"resume": True}, {"force": True}])
def test_only_one_process_works_in_a_folder(
    asked: dict[str, bool], recipe: Path, tree: Recipe, unfinished: Path, tmp_path: Path
) -> None:
    with open_partial(tmp_path / "run", tree, resume=True, force=False):
        before = contents(unfinished)
        with pytest.raises(RecipeError, match=r"run\.partial: another process is working there"):
            compress(recipe, tmp_path / "run", **asked)
        assert contents(unfinished) == before
    with open_partial(tmp_path / "run", tree, resume=True, force=False):
        pass  # the lock went with its holder


def test_the_lock_is_released_after_an_error(tree: Recipe, tmp_path: Path) -> None:
    with (
        pytest.raises(BlockingIOError, match="of the caller"),
        open_partial(tmp_path / "run", tree, resume=False, force=False),
    ):
        raise BlockingIOError("of the caller")
    with open_partial(tmp_path / "run", tree, resume=False, force=False):
        pass


def test_a_place_that_cannot_be_written_is_named(tree: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResourceError, match=r"file/run\.partial: cannot be made .*--out"),
        open_partial(tmp_path / "file" / "run", tree, resume=False, force=False),
    ):
        pytest.fail("opened")


def reused(report: Report) -> list[bool]:
    return [stage["reused"] for stage in report.stages]


def figures(report: Report) -> list[Any]:
    """Everything about the networks; nothing about time and memory."""
    names = ("params", "macs", "accuracy", "accuracy_ci", "val_accuracy")
    networks = [report.baseline.to_json(), report.result.to_json(), *(stage["footprint"] for stage in report.stages)]
    return [[network[name] for name in names] for network in networks]


def weights(run: Path) -> dict[str, str]:
    """Hashes of all published tensors; the .xml holds node numbers that count up within a process."""
    found = contents(run)
    return {name: sha for name, sha in found.items() if name.endswith((".bin", ".onnx", ".safetensors"))}


def test_a_second_run_reuses_every_stage_and_finds_the_same(
    own_stages: Path, tiny_images: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *STAGES, QUANTIZE, DISTILLED)
    first = compress(recipe, tmp_path / "first")
    second = compress(recipe, tmp_path / "second")
    assert reused(first) == [False] * 6
    assert reused(second) == [True] * 6
    assert figures(first) == figures(second)
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert second.result.train_time_s == first.result.train_time_s, "what the stages cost when they ran"
    assert second.passed
    assert verify_manifest(tmp_path / "second") == []


def test_what_comes_after_a_change_is_done_again_and_what_comes_before_is_not(
    own_stages: Path, tiny_images: Path, tmp_path: Path
) -> None:
    compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, *STAGES), tmp_path / "first")

    def run(name: str, *stages: dict[str, Any], **sections: Any) -> list[bool]:
        return reused(
            compress(write_recipe(tmp_path / f"{name}.yaml", tiny_images, *stages, **sections), tmp_path / name)
        )

    assert run("last", *STAGES[:3], {**DISTILLED, "learning_rate": 1e-3}) == [True, True, True, False]
    assert run("middle", FINETUNE, {**DROP, "count": 2}, PRUNE, DISTILLED) == [True, False, False, False]
    assert run("judged", *STAGES[:2], budget={"macs": "0.9x"}, export={"parity_images": 8}) == [True, True]
    assert run("seed", *STAGES[:2], seed=1) == [False, False]
    assert run("size", *STAGES[:2], input={"size": 40}) == [False, False]


@pytest.mark.parametrize("damage", ["weights", "index", "gone"])
def test_a_damaged_stage_is_done_again(damage: str, own_stages: Path, tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, PRUNE)
    first = compress(recipe, tmp_path / "first")
    tensors = tmp_path / "first" / "stages" / "01-prune" / "model.safetensors"
    if damage == "weights":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "index":
        for entry in own_stages.iterdir():
            entry.write_text(entry.read_text()[:-20])
    else:
        tensors.unlink()
    second = compress(recipe, tmp_path / "second")
    assert reused(second) == [damage != "index", False]
    assert figures(first) == figures(second)


def test_a_resumed_run_trusts_no_stage_that_changed(own_stages: Path, tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, PRUNE)
    first = compress(recipe, tmp_path / "first")
    partial = partial_of(tmp_path / "second")
    (tmp_path / "first").rename(partial)  # complete but for its name; and no other run has these stages any more
    tensors = partial / "stages" / "00-finetune" / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    second = compress(recipe, tmp_path / "second", resume=True)
    assert reused(second) == [False, False]
    assert figures(first) == figures(second)
    assert verify_manifest(tmp_path / "second") == []


def test_stages_of_a_run_that_failed_are_found_by_the_next(own_stages: Path, tiny_images: Path, tmp_path: Path) -> None:
    """Two hours of training are not lost to a learning rate in stage 5."""
    with pytest.raises(TrainingError, match="diverged"):
        compress(write_recipe(tmp_path / "bad.yaml", tiny_images, SHORT, DIVERGING), tmp_path / "bad")
    report = compress(write_recipe(tmp_path / "good.yaml", tiny_images, SHORT, PRUNE), tmp_path / "good")
    assert reused(report) == [True, False]
