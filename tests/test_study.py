"""Studies: what they ask for, what they find out, and what they keep when something fails or is interrupted."""

import csv
import html
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from compressor import study_processes
from compressor.cli import main
from compressor.errors import RecipeError
from compressor.pages.files import rebuild
from compressor.report import Footprint, Report, images_trained, read_report
from compressor.study import run_study
from compressor.study_figures import compare, figures_of, row_figures
from compressor.study_spec import FIGURES, FigureName, Objectives, load_study, schema_text

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BENCHMARKS = RECIPES.parent / "benchmarks"

RECIPE: dict[str, Any] = {
    "version": 1,
    "model": {"source": "timm", "name": "mobilenetv3_small_050", "weights": "none"},
    "data": {"source": "synthetic_pcb", "train_per_class": 8, "val_per_class": 4, "test_per_class": 8},
    "input": {"size": 48},
    "stages": [{"type": "finetune", "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}],
    "benchmark": {"throughput_s": None},
}
ROWS: list[dict[str, Any]] = [
    {"name": "dense", "recipe": "recipe.yaml"},
    {"name": "longer", "recipe": "recipe.yaml", "set": {"stages[0].epochs": 2}},
]


def write(folder: Path, **study: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "title": "Tiny networks", "rows": ROWS, **study}, sort_keys=False))
    return path


def test_grids_scales_and_rows_are_laid_over_each_other(tmp_path: Path) -> None:
    rows = [
        {"name": "plain", "recipe": "recipe.yaml", "scales": {"large": {"seeds": [1]}}},
        {
            "name": "tried",
            "recipe": "recipe.yaml",
            "set": {"stages[0].batch_size": 8},
            "grid": {"stages[0].learning_rate": [0.1, 0.01], "input.size": [64, 96]},
            "scales": {"large": {"seeds": [7], "set": {"stages[0].batch_size": 4}}},
        },
    ]
    scales = {"small": {}, "large": {"seeds": [1, 2], "set": {"stages[0].epochs": 9, "stages[0].batch_size": 64}}}
    path = write(tmp_path, rows=rows, scales=scales, seeds=[3, 4], set={"stages[0].epochs": 5})
    small = load_study(path)
    assert small.scale == "small"
    assert [run.seed for run in small.runs] == [3] * 5 + [4] * 5  # seed by seed
    assert [run.row for run in small.runs[:3]] == [
        "plain",
        "tried[learning_rate=0.1,size=64]",
        "tried[learning_rate=0.1,size=96]",
    ]
    large = load_study(path, scale="large", overrides=["stages[0].learning_rate=0.5"])
    assert [(run.row, run.seed) for run in large.runs if run.row == "plain"] == [("plain", 1)]  # the row's own seeds
    tried = [run for run in large.runs if run.row != "plain"]
    assert {run.seed for run in tried} == {7}
    stages = [run.recipe.stages[0].model_dump() for run in tried]
    assert {(s["epochs"], s["batch_size"], s["learning_rate"]) for s in stages} == {(9, 4, 0.5)}
    assert {run.recipe.input.size for run in tried} == {(64, 64), (96, 96)}
    assert len({run.hash_with({}) for run in tried}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, r"study.yaml:\d+: rows: "),
        ({"sedes": [1]}, r"study.yaml:\d+: sedes: found an unknown key.*did you mean 'seeds'"),
        ({"rows": [{**ROWS[0], "recipe": "recipee.yaml"}]}, r"row dense: .*recipee.yaml: does not exist; did you mean"),
        ({"rows": [{**ROWS[0], "set": {"stages[0].epoch": 3}}]}, r"row dense: .*stages\[0\].epoch: found an unknown"),
        ({"rows": [ROWS[0], {**ROWS[0]}]}, r"rows: found 'dense' twice"),
        ({"rows": [{**ROWS[0], "scales": {"smal": {}}}], "scales": {"small": {}}}, r"found 'smal', allowed small"),
        ({"rows": [{**ROWS[0], "name": "No Spaces"}]}, r"rows\[0\].name: found 'No Spaces', allowed lower-case"),
        ({"objectives": {"maximize": [], "minimize": []}}, "needs one at least"),
        ({"objectives": {"minimize": ["latency"]}}, r"objectives.minimize\[0\]: found 'latency'.*latency_ms"),
        ({"rows": [{**ROWS[0], "grid": {"seed": []}}]}, "found an empty list"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(write(tmp_path, **change))


def test_unknown_scales_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, scales={"small": {}})
    with pytest.raises(RecipeError, match="--scale big: found no such scale, allowed small"):
        load_study(path, scale="big")
    with pytest.raises(RecipeError, match=r"cannot be read: No such file.*did you mean 'study.yaml'"):
        load_study(tmp_path / "stody.yaml")


def test_every_figure_has_a_name_in_the_schema() -> None:
    assert FigureName.__args__ == tuple(FIGURES)  # type: ignore[attr-defined]


def test_the_committed_schema_is_in_sync() -> None:
    assert (RECIPES / "study.schema.json").read_text() == schema_text(), (
        "python compress.py schema --study > recipes/study.schema.json"
    )


STUDIES = sorted((RECIPES / "studies").glob("*.yaml"))


def test_there_are_studies_to_test() -> None:
    assert {path.stem for path in STUDIES} >= {"paper_caltech101", "paper_pcb"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_are_valid_and_fair(path: Path) -> None:
    """At each scale every recipe is valid, and rows that start from the same kind of weights get as many epochs."""
    first = path.read_text().splitlines()[0]
    assert (path.parent / first.split("$schema=", 1)[1]).resolve() == RECIPES / "study.schema.json"
    scales = load_study(path).study.scales
    assert {"full", "small"} <= set(scales)
    for scale in scales:
        loaded = load_study(path, scale=scale)
        if scale == "small" or "paper" not in path.stem:
            continue
        for kind in ("scratch", "pretrained"):
            rows = {run.row: run.recipe for run in loaded.runs if run.row.endswith(kind)}
            assert len(rows) >= 4
            epochs = {row: sum(getattr(s, "epochs", None) or 0 for s in recipe.stages) for row, recipe in rows.items()}
            assert max(epochs.values()) <= 1.05 * min(epochs.values()), epochs
            assert {recipe.input.size for recipe in rows.values()} == {loaded.runs[0].recipe.input.size}
            for name in ("batch_size", "augment"):
                settings = {
                    str(getattr(r.stages[-1] if len(r.stages) < 5 else r.stages[3], name)) for r in rows.values()
                }
                assert len(settings) == 1, (name, settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A study with a row that fails, run once."""
    folder = tmp_path_factory.mktemp("study")
    broken = {"name": "broken", "recipe": "recipe.yaml", "set": {"model.weights": "missing.safetensors"}}
    others = [{"name": "theirs", "source": "a paper", "figures": {"accuracy": 0.5, "latency_ms": 9.0}}]
    path = write(folder, rows=[*ROWS, broken], published=others)
    return path, folder / "out", run_study(path, folder / "out")


def test_a_study_holds_what_its_runs_measured(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, study = done
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(study))
    assert [row["name"] for row in study["rows"]] == ["dense", "longer", "broken"]
    for row in study["rows"][:2]:
        report = read_report(out / "runs" / row["name"] / "seed0" / "report.json")
        figures = row["runs"][0]["figures"]
        assert figures["accuracy"] == report.result.accuracy == row["figures"]["accuracy"]["mean"]
        assert figures["training_avg_memory_bytes"] == report.result.retrain_avg_memory_bytes
        assert row["figures"]["accuracy"]["low"] < figures["accuracy"] < row["figures"]["accuracy"]["high"]
        assert set(figures) == set(FIGURES) - {"throughput_fps", "joules_per_image"}  # which the recipe leaves out
        assert 0 < figures["epoch_s"] <= figures["train_time_s"]
    dense, longer = (row["runs"][0] for row in study["rows"][:2])
    assert (dense["epochs"], longer["epochs"]) == (1, 2)
    assert any("not trained equally long: dense 1.0 epochs, longer 2.0" in note for note in study["notes"])
    # One network under two names, timed in turns: the clock cannot tell them apart.
    assert dense["figures"]["latency_ms"] == pytest.approx(longer["figures"]["latency_ms"], rel=0.5)


def test_a_failure_is_listed_and_leaves_the_others_alone(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, study = done
    (failure,) = study["failures"]
    assert (failure["row"], failure["seed"]) == ("broken", 0)
    assert "missing.safetensors" in failure["message"]
    assert "missing.safetensors" in (out / "logs" / "broken-seed0.log").read_text()
    assert study["missing"] == [{"row": "broken", "seed": 0}]
    assert study["incomplete"] == ["broken"]
    assert "broken" not in study["dominated_by"]


def test_the_table_has_a_line_for_each_run(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, study = done
    lines = list(csv.DictReader(io.StringIO((out / "study.csv").read_text())))
    assert [(line["row"], line["seed"]) for line in lines] == [("dense", "0"), ("longer", "0")]
    assert float(lines[1]["accuracy"]) == study["rows"][1]["runs"][0]["figures"]["accuracy"]
    assert lines[0]["throughput_fps"] == ""


def test_the_chart_tells_measured_from_published(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = done
    text = (out / "pareto.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    for words in ("Tiny networks", "dense", "longer", "theirs", "published, not measured here", "test accuracy, %"):
        assert words in text


def test_the_page_of_a_study_is_made_anew_from_its_figures(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, study = done
    page = (out / "report.html").read_text()
    for words in (
        "Tiny networks",
        "longer",
        "theirs",
        "Published elsewhere, not measured here",
        study["rows"][0]["name"],
    ):
        assert words in page
    assert any(failure["message"].splitlines()[0][:20] in html.unescape(page) for failure in study["failures"])
    (out / "report.html").write_text("lost")
    assert rebuild([out]) == [out / "report.html"]
    assert (out / "report.html").read_text() == page


def test_what_is_finished_is_not_run_again(
    done: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, study = done
    started = []

    class Refused(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command)
            super().__init__([sys.executable, "-c", "raise SystemExit('compressor: no more')"], **options)

    monkeypatch.setattr(study_processes.subprocess, "Popen", Refused)
    assert main(["study", str(path), "--out", str(out), "-q"]) == 3  # one run has no figures
    assert len(started) == 1
    assert str(out / "runs" / "broken" / "seed0") in started[0]
    shown = capsys.readouterr().out
    assert "failed: broken, seed 0: no more" in shown
    again = json.loads((out / "study.json").read_text())
    assert [row["figures"].get("accuracy") for row in again["rows"]] == [
        row["figures"].get("accuracy") for row in study["rows"]
    ]


@pytest.fixture
def stored(
    done: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[ModuleType, Path]:
    """`benchmarks/studies.py`, storing in the test's folder, where the study is stored already; and that folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    studies = importlib.import_module("studies")
    for module in (studies, importlib.import_module("results")):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(studies, "README", tmp_path / "README.md")
    studies.record(done[1], "tiny")
    return studies, tmp_path


def test_a_stored_study_goes_on_elsewhere(
    done: tuple[Path, Path, dict[str, Any]], stored: tuple[ModuleType, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored reports are enough to compare runs, but not to time their networks in turns, which is said."""
    path, out, study = done
    studies, here = stored
    studies.restore("tiny", here / "elsewhere")
    monkeypatch.setattr("compressor.study.run_all", lambda left, *_, **__: (never for never in left[:0]))
    again = run_study(path, here / "elsewhere")
    assert any(note.startswith("latency_ms: as each run measured it") for note in again["notes"])
    assert not any(note.startswith("latency_ms") for note in study["notes"])
    for row, told in zip(again["rows"][:2], study["rows"], strict=False):
        report = read_report(out / "runs" / row["name"] / "seed0" / "report.json")
        timed = {"latency_ms": report.result.latency_ms}
        assert row["runs"][0]["figures"] == {**told["runs"][0]["figures"], **timed}


def test_a_stored_study_names_no_folder_and_each_look_is_in_the_ledger_once(
    done: tuple[Path, Path, dict[str, Any]], stored: tuple[ModuleType, Path]
) -> None:
    studies, here = stored
    studies.record(done[1], "tiny")
    ledger = json.loads((here / "test_ledger.json").read_text())
    assert [line["name"] for line in ledger] == ["tiny/dense/seed0", "tiny/longer/seed0"]
    texts = [file.read_text() for file in (here / "studies").rglob("*.json")]
    assert len(texts) == 3
    assert not [text for text in texts if str(done[1].parent) in text or str(here) in text]


def test_the_readme_gets_a_line_for_each_row(
    done: tuple[Path, Path, dict[str, Any]], stored: tuple[ModuleType, Path]
) -> None:
    studies, here = stored
    (here / "README.md").write_text("before\n<!-- studies: begin -->\nstale\n<!-- studies: end -->\nafter\n")
    for _ in range(2):
        studies.table()
    text = (here / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    figures = done[2]["rows"][0]["figures"]["accuracy"]
    line = next(line for line in text.splitlines() if line.startswith(("| dense |", "| **dense** |")))
    assert f"{100 * figures['mean']:.1f} ({100 * figures['low']:.1f} to {100 * figures['high']:.1f})" in line
    assert len([line for line in text.splitlines() if line.startswith("| ") and "broken" in line]) == 0
    assert "| *theirs, as published (a paper)* | | | 50 | 9 |" in text


def test_runs_of_other_recipes_are_not_taken_for_this_study(done: tuple[Path, Path, dict[str, Any]]) -> None:
    path, out, _ = done
    with pytest.raises(RecipeError, match=r"seed0 and 1 more: finished for another recipe.*--force"):
        run_study(path, out, overrides=["stages[0].learning_rate=0.5"])


def test_list_names_every_run(done: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(done[0]), "--list", "--json"]) == 0
    assert [run["row"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["dense", "longer", "broken"]
    assert main(["study", str(done[0]), "--list"]) == 0
    assert "valid, 3 runs" in capsys.readouterr().out


@pytest.mark.parametrize("ignored", [False, True], ids=["ctrl-c", "background"])
def test_an_interrupt_ends_the_runs_and_the_same_command_goes_on(tmp_path: Path, ignored: bool) -> None:
    """Ctrl-C; and SIGTERM, as a service manager sends it, where SIGINT is ignored as in a shell's background job."""
    path = write(tmp_path, rows=[{**ROWS[0], "set": {"stages[0].epochs": 2000}}])
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "study", str(path), "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler),
    )
    said = tmp_path / "out" / "logs" / "dense-seed0.log"
    deadline = time.monotonic() + 120
    while not (said.is_file() and "epoch 1/" in said.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM if ignored else signal.SIGINT)  # the study alone
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what is finished is kept, the same command goes on" in error
    assert "go on with:" in said.read_text()  # the run was interrupted too, and not killed
    assert (tmp_path / "out" / "runs" / "dense" / "seed0.partial" / "recipe.yaml").is_file()


def report_with(result: Footprint, stages: tuple[dict[str, Any], ...]) -> Report:
    return Report(
        verdict={"status": "passed", "reasons": []},
        baseline=Footprint(),
        result=result,
        stages=stages,
        artifacts=(),
        parity={},
        audit={},
        benchmark={"torch_eager_ms": {"baseline": 9.0, "result_float": 4.0}},
        data={"totals": {"train": 100}},
        weights={},
        recipe={},
        environment={},
    )


def trained(index: int, best: int | None, images: int) -> dict[str, Any]:
    history = [{"epoch": i, "seconds": 10.0 * (i + 1)} for i in range(3)]
    time_spent = {"data": 2.0, "step": 22.0, "validation": 6.0}
    details = {"history": history, "best_epoch": best, "images": images, "time": time_spent}
    return {"index": index, "type": "finetune", "details": details}


def test_figures_by_hand() -> None:
    stages = (
        trained(0, 2, 300),
        trained(1, 0, 300),
        {"index": 2, "type": "quantize", "details": {}},
        trained(3, 1, 60),
    )
    compressed = Footprint(train_time_s=90.0, train_avg_memory_bytes=500, retrain_avg_memory_bytes=200)
    figures = figures_of(report_with(compressed, stages))
    assert figures["epoch_s"] == 8.0  # 24 s for three epochs of the last float finetune
    assert figures["best_epoch_s"] == 80.0  # the last finetune's best epoch came ten seconds before its end
    assert figures["training_avg_memory_bytes"] == 200
    assert figures["torch_latency_ms"] == 4.0
    assert "accuracy" not in figures
    from_its_start = figures_of(report_with(Footprint(train_avg_memory_bytes=500), ()))
    assert from_its_start == {"training_avg_memory_bytes": 500.0, "torch_latency_ms": 4.0}


def test_all_trainings_of_a_stage_count() -> None:
    assert images_trained({"details": {}}) == 0
    assert images_trained({"details": {"images": 300, "history": []}}) == 300
    inside = {"recovery": [{"images": 10}, {"images": 20}], "sparsify": {"images": 5}}
    assert images_trained({"details": inside}) == 35


def test_rows_are_averaged_over_seeds() -> None:
    figures = row_figures([{"accuracy": 0.8, "latency_ms": 2.0}, {"accuracy": 0.9, "latency_ms": 4.0}], 100)
    assert figures["accuracy"]["mean"] == pytest.approx(0.85)
    assert figures["accuracy"]["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert (figures["accuracy"]["low"], figures["accuracy"]["high"]) == pytest.approx((0.7672, 0.9069), abs=1e-4)
    assert (figures["latency_ms"]["low"], figures["latency_ms"]["mean"], figures["latency_ms"]["high"]) == (2, 3, 4)
    assert row_figures([{"latency_ms": 2.0}], 100)["latency_ms"]["deviation"] is None


def test_a_row_within_the_interval_is_not_dominated_on_accuracy_alone() -> None:
    def row(accuracy: float, latency: float) -> dict[str, Any]:
        return row_figures([{"accuracy": accuracy, "latency_ms": latency}], 860)

    objectives = Objectives(minimize=("latency_ms",))
    rows = {"best": row(0.93, 2.0), "chance": row(0.92, 2.0), "worse": row(0.80, 2.0), "slower": row(0.92, 3.0)}
    found = compare({**rows, "untimed": row_figures([{"accuracy": 1.0}], 860)}, objectives)
    assert found["pareto_set"] == ["best", "chance"]
    assert found["dominated_by"]["worse"] == ["best", "chance"]
    assert found["dominated_by"]["slower"] == ["best", "chance"]
    assert found["incomplete"] == ["untimed"]
