"""Memory of retraining: measured in a process of its own, from any folder, or reported as not measured."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import own_networks
import pytest
import torch
from tiny_networks import PRUNE, QUANTIZE, SHORT, contents, tiny_recipe, write_recipe
from watched_process import run_watched

from compressor import proof, retraining
from compressor.context import Context
from compressor.pipeline import compress
from compressor.recipe import Recipe
from compressor.retrain import retrain

REPOSITORY = Path(__file__).resolve().parent.parent


def test_retraining_is_measured_and_writes_nothing(
    tiny_network: None, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    figures = {"floor_bytes": 123_457, "average_bytes": 234_567, "peak_bytes": 345_679}
    monkeypatch.setattr(proof, "_retrain_memory", lambda *_: figures)
    report = compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, PRUNE, SHORT), run)
    assert report.benchmark["memory_floor_bytes"] == 123_457
    assert report.result.retrain_avg_memory_bytes == 234_567
    assert report.result.retrain_peak_memory_bytes == 345_679
    text = (run / "report.json").read_text()
    assert [text.count(str(value)) for value in figures.values()] == [1, 1, 1], "each figure has one place"
    before = contents(tmp_path)
    measured = retrain(run, run / "stages" / "02-finetune", 2, 3, "auto")
    assert measured.keys() == {"floor_bytes", "average_bytes", "peak_bytes"}
    assert 0 < measured["average_bytes"] <= measured["peak_bytes"]
    assert 0 < measured["floor_bytes"] <= measured["peak_bytes"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("stages", "slim", "options"),
    [
        ((SHORT, PRUNE), "01-prune", 0),
        ((SHORT, PRUNE, QUANTIZE), "01-prune", 0),
        ((SHORT, PRUNE, QUANTIZE, SHORT), "03-finetune", 3),
        ((SHORT,), "00-finetune", 0),
    ],
)
def test_what_is_retrained_is_the_slim_network(
    stages: tuple[dict[str, object], ...],
    slim: str,
    options: int,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.model_validate(tiny_recipe(tiny_images, *stages))
    context = Context(torch.zeros(1, 3, 48, 48), None, "cpu", tmp_path)  # type: ignore[arg-type]
    seen: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, "{}", "")
    monkeypatch.setattr(retraining.subprocess, "run", lambda command, **_: seen.append(command) or done)
    proof._retrain_memory(context, recipe, [{"type": stage.type, "details": {}} for stage in recipe.stages])
    assert seen[0][-5:-3] == [str(tmp_path / "stages" / slim), str(options)]


@pytest.fixture
def asked(tiny_images: Path, tmp_path: Path) -> tuple[Context, Recipe, list[dict[str, Any]]]:
    """What a run with two finetunes asks to have measured."""
    recipe = Recipe.model_validate(tiny_recipe(tiny_images, SHORT, PRUNE, SHORT, QUANTIZE))
    context = Context(torch.zeros(1, 3, 48, 48), None, "cpu", tmp_path / "run.partial", "bfloat16")  # type: ignore[arg-type]
    return context, recipe, [{"type": stage.type, "details": {}} for stage in recipe.stages]


def test_the_last_finetune_is_measured_by_a_child_that_finds_the_toolkit_from_any_folder(
    asked: tuple[Context, Recipe, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run from a checkout in another folder, nothing is installed and `compressor` is not in the working folder."""
    (tmp_path / "compressor.py").write_text("raise SystemExit('not the toolkit')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    seen: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        assert env["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "elsewhere"]
        probe = [*command[: command.index("-m")], "-c", "import compressor; print(compressor.__file__)"]
        found = subprocess.check_output(probe, env=env, text=True).strip()  # no deeper: torch takes seconds
        assert found == str(REPOSITORY / "compressor" / "__init__.py")
        return subprocess.CompletedProcess(command, 0, 'a line of some library\n{"peak_bytes": 7}\n', "")

    monkeypatch.setattr(retraining.subprocess, "run", lambda *a, **k: real(*a, **k) if "-c" in a[0] else run(*a, **k))
    assert proof._retrain_memory(*asked) == {"peak_bytes": 7}
    folder = tmp_path / "run.partial"
    assert seen[0][-6:] == [str(folder), str(folder / "stages/02-finetune"), "2", "12", "bfloat16", "{}"]


real = subprocess.run


def test_a_callers_network_is_retrained_where_a_factory_can_make_it_again(
    tiny_network: None, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, PRUNE, model={"source": "custom"})
    run = tmp_path / "run"
    compress(recipe, run, model=own_networks.make)
    measured = retrain(run, run / "stages" / "01-prune", 0, 2, "auto", None, "own_networks:make")
    assert 0 < measured["average_bytes"] <= measured["peak_bytes"]


def test_the_child_is_told_the_factory_and_a_bare_module_is_not_measured(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(torch.zeros(1, 3, 48, 48), None, "cpu", tmp_path)  # type: ignore[arg-type]
    seen: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, "{}", "")
    monkeypatch.setattr(retraining.subprocess, "run", lambda command, **_: seen.append(command) or done)
    for name in ("own_networks:make", "own_networks.OwnNetwork"):
        recipe = Recipe.model_validate(tiny_recipe(tiny_images, SHORT, model={"source": "custom", "name": name}))
        measured = proof._retrain_memory(context, recipe, [{"type": "finetune", "details": {}}])
        assert ("error" in measured) == (":" not in name)
    assert [command[-3:] for command in seen] == [["auto", "{}", "own_networks:make"]]
    assert "--factory names one it can" in measured["error"]


def test_what_cannot_be_measured_says_why(
    asked: tuple[Context, Recipe, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tiny_images: Path
) -> None:
    context, _, _ = asked
    untrained = Recipe.model_validate(tiny_recipe(tiny_images, QUANTIZE))
    assert proof._retrain_memory(context, untrained, [{"type": "quantize"}]) == {
        "error": "the recipe has no finetune stage"
    }
    died = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(retraining.subprocess, "run", lambda *_, **__: died)
    assert proof._retrain_memory(*asked) == {"error": "it ended without a message"}


def test_a_whole_run_stays_on_this_machine_and_in_its_folders(tmp_path: Path) -> None:
    """Data generated, trained, pruned, quantized, exported, proven, and a child process that fails: all watched."""
    home, temporary, cache, out = (tmp_path / name for name in ("home", "tmp", "cache", "out"))
    for folder in (home, temporary, cache, out):
        folder.mkdir()
    data = {"source": "synthetic_pcb", "train_per_class": 16, "val_per_class": 4, "test_per_class": 4}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path, SHORT, PRUNE, SHORT, QUANTIZE, data=data)
    places = {"HOME": str(home), "TMPDIR": str(temporary), "COMPRESSOR_CACHE": str(cache)}
    places["MPLCONFIGDIR"] = str(cache / "matplotlib")  # tests before this one have set another
    seen = run_watched(
        [str(REPOSITORY / "tests" / "tiny_main.py"), str(recipe), "--out", str(out / "run"), "--json"],
        [out, cache, temporary],
        {**places, "STAND_IN_RETRAIN": "1"},
        cwd=tmp_path,
    )
    assert seen.returncode in (0, 3), seen.stderr  # 3: INT8 of a network that knows nothing may miss its gate
    assert seen.sockets == ()
    assert set(seen.writes) <= {"/proc/self/clear_refs"}  # no file: it resets the high-water mark of memory
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []
    assert [path.name for path in out.iterdir()] == ["run"]
    report = json.loads(seen.stdout)
    assert report["data"]["source"] == "synthetic_pcb"
    note = next(note for note in report["notes"] if note.startswith("retraining memory was not measured"))
    assert note.startswith("retraining memory was not measured: plan: group 'conv1' has 32 channels here")
    assert report["result"]["retrain_peak_memory_bytes"] is None

    # The real child builds the real Xception, which these weights do not fit; so here is one that can.
    before = contents(out)
    child = [str(REPOSITORY / "tests" / "tiny_retrain.py"), str(out / "run"), str(out / "run/stages/02-finetune")]
    seen = run_watched([*child, "2", "2", "auto", "{}"], [cache, temporary], places, cwd=tmp_path)
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["peak_bytes"] > 0
    assert seen.sockets == ()
    assert set(seen.writes) <= {"/proc/self/clear_refs"}
    assert (contents(out), list(home.rglob("*")), list(temporary.rglob("*"))) == (before, [], [])
