"""Whole runs with the stand-in network: what the report and the folder hold, and what happens when a run fails."""

import copy
import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import own_networks
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import (
    DISTILLED,
    DIVERGING,
    DROP,
    EVERY_STAGE,
    FINETUNE,
    PRUNE,
    QUANTIZE,
    SHORT,
    contents,
    make_images,
    stand_in,
    tiny,
    write_recipe,
)
from torch import nn

from compressor import parity
from compressor.artifacts import sha256_of, verify_manifest, write_manifest
from compressor.checkpoint import load_network
from compressor.cli import main
from compressor.environment import INT8_FEATURES, cpu_flags
from compressor.errors import DataError, RecipeError, TrainingError
from compressor.pipeline import compress
from compressor.recipe_loader import load_recipe, recipe_hash
from compressor.report import Report, read_report

pytestmark = pytest.mark.usefixtures("tiny_network")
ARTIFACTS = {
    f"artifacts/{name}"
    for name in (
        "baseline_fp32.xml",
        "baseline_fp32.bin",
        "result_fp32.onnx",
        "result_fp32.xml",
        "result_fp32.bin",
        "result_int8.onnx",
        "result_int8.xml",
        "result_int8.bin",
    )
}
FOOTPRINT = {
    *("params", "macs", "size_bytes", "latency_ms", "latency_p95_ms", "latency_default_ms", "latency_native_ms"),
    *("throughput_fps", "accuracy", "accuracy_ci", "val_accuracy", "train_time_s", "train_avg_memory_bytes"),
    *("train_peak_memory_bytes", "retrain_avg_memory_bytes", "retrain_peak_memory_bytes"),
}


@dataclasses.dataclass(frozen=True)
class Finished:
    run: Path
    report: Report
    recipe: Path

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.run / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run through every type of stage that meets its gates and a budget."""
    folder = tmp_path_factory.mktemp("finished")
    budget = {"macs": "0.8x", "accuracy": 0.9, "accuracy_drop": 0.1}
    recipe = write_recipe(folder / "recipe.yaml", tiny_images, *EVERY_STAGE, budget=budget)
    with stand_in():
        return Finished(folder / "run", compress(recipe, folder / "run"), recipe)


def test_the_report_holds_every_key_of_the_contract(finished: Finished) -> None:
    report = finished.json
    assert report.keys() >= {
        *("version", "verdict", "baseline", "result", "stages", "artifacts", "parity", "audit", "data", "weights"),
        *("recipe", "environment"),
    }
    assert report["verdict"] == {"status": "passed", "reasons": []}
    assert report["baseline"].keys() == report["result"].keys() == FOOTPRINT
    assert report["recipe"]["hash"] == recipe_hash(load_recipe(finished.recipe).recipe)
    assert report["data"]["labels"] == ["blue", "green", "grey", "red"]
    assert report["data"]["totals"] == {"train": 144, "val": 16, "test": 64}
    assert report["weights"]["source"] == "none"
    assert report["environment"]["versions"]["torch"]
    assert report["environment"]["torch_threads"] == torch.get_num_threads()
    assert report["audit"]["result"]["convolutions"]
    assert as_json(read_report(finished.run / "report.json")) == report == as_json(finished.report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"report\.json: no report; give the folder of a finished run"),
        ('{"version": 1', r"report\.json: not a readable report"),
        ('{"version": 1}', r"report\.json: not a readable report"),
        ('{"version": 99}', r"report\.json: report version 99, this toolkit reads version 1"),
    ],
)
def test_what_is_no_report_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_report(tmp_path / "report.json")


def as_json(report: Report) -> dict[str, Any]:
    return json.loads(json.dumps(report.to_json()))


def test_what_was_measured_is_there_and_what_was_not_is_null(finished: Finished) -> None:
    report = finished.json
    unmeasured = {"throughput_fps", "retrain_avg_memory_bytes", "retrain_peak_memory_bytes"}
    for footprint in (report["baseline"], report["result"]):
        assert {name for name, value in footprint.items() if value is None} == unmeasured
        assert all(value is None or value for value in footprint.values())
        assert footprint["accuracy_ci"][0] <= footprint["accuracy"] <= footprint["accuracy_ci"][1]
        assert footprint["latency_ms"] <= footprint["latency_p95_ms"]
    assert any("retraining memory was not measured" in note for note in report["notes"])
    assert report["benchmark"]["memory_floor_bytes"] is None
    assert report["result"]["macs"] <= 0.8 * report["baseline"]["macs"]
    assert report["result"]["train_time_s"] > report["baseline"]["train_time_s"]


def test_stages_carry_validation_accuracy_and_no_test_accuracy(finished: Finished) -> None:
    stages = finished.json["stages"]
    assert [stage["type"] for stage in stages] == [stage["type"] for stage in EVERY_STAGE]
    assert [stage["index"] for stage in stages] == list(range(len(EVERY_STAGE)))
    for stage in stages:
        assert stage["footprint"]["val_accuracy"] is not None
        assert stage["footprint"]["accuracy"] is None
        trained = stage["type"] == "finetune"
        assert (stage["footprint"]["train_peak_memory_bytes"] is not None) == trained
    macs = [stage["footprint"]["macs"] for stage in stages]
    assert macs == sorted(macs, reverse=True)


def test_the_time_of_a_run_is_accounted_for(finished: Finished) -> None:
    timing = dict(finished.report.timing)
    total = timing.pop("total")
    names = [f"stages[{stage['index']}] {stage['type']}" for stage in finished.report.stages]
    proof = ["export", "parity", "accuracy", "benchmark", "layers", "retraining memory"]
    assert sorted(timing) == sorted(["prepare", "training precision", "reachability", *names, "keep stages", *proof])
    assert 0.9 * total - 0.5 <= sum(timing.values()) <= total
    for stage in finished.report.stages:
        if stage["type"] == "finetune":
            assert sum(stage["details"]["time"].values()) <= stage["details"]["seconds"] <= stage["seconds"]


@pytest.mark.parametrize("name", ["baseline", "result"])
def test_what_the_layers_cost_adds_up_to_what_the_network_costs(finished: Finished, name: str) -> None:
    report = finished.json
    rows = [row[name] for row in report["layers"] if row[name] is not None]
    totals = report["layer_totals"][name]
    assert sum(row["macs"] for row in rows) == report[name]["macs"]
    assert sum(row["share"] for row in rows) + totals["rest"]["share"] == pytest.approx(1, abs=1e-4)
    assert sum(row["ms"] for row in rows) + totals["rest"]["ms"] == pytest.approx(report[name]["latency_ms"], abs=1e-4)
    counts = {precision: entry["count"] for precision, entry in totals["reorders"].items()}
    assert counts == report["audit"][name]["reorders"]
    assert all(row["precision"] for row in rows)
    if name == "baseline":
        assert {row["precision"] for row in rows} == {"f32"}
    elif cpu_flags() & {"avx2", *INT8_FEATURES}:
        assert {row["precision"] for row in rows} <= {"u8", "i8"}


def test_the_layers_are_those_of_the_networks(finished: Finished) -> None:
    rows = {row["layer"]: row for row in finished.json["layers"]}
    before, after = (load_network(finished.run / "stages" / name).module for name in ("00-finetune", "06-finetune"))
    dropped = next(e["modules"][0] for e in load_network(last(finished)).edits if e["type"] == "drop_blocks")
    gone = {name for name, row in rows.items() if row["result"] is None}
    assert gone == {name for name in rows if name.startswith(dropped)}
    assert gone
    layers = {name for name, layer in before.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert rows.keys() == layers
    for name in layers - gone:
        layer = after.get_submodule(name)
        assert (rows[name]["result"]["out"], rows[name]["kind"] == "linear") == (
            layer.weight.shape[0],
            isinstance(layer, nn.Linear),
        )
    assert any(rows[name]["result"]["out"] < rows[name]["baseline"]["out"] for name in layers - gone)


def last(finished: Finished) -> Path:
    return finished.run / "stages" / "06-finetune"


def test_the_report_recommends_what_is_worth_it(finished: Finished) -> None:
    report = finished.json
    latency = report["benchmark"]["latency"]
    gain = latency["result_fp32_default"]["median_ms"] / latency["result"]["median_ms"]
    assert report["benchmark"]["int8_gain"] == pytest.approx(gain)
    assert report["recommended"] == f"artifacts/result_{'int8' if gain > 1.03 else 'fp32'}.xml"
    assert report["recommended"] in {artifact["path"] for artifact in report["artifacts"]}
    assert any(note.startswith("INT8 gains nothing") for note in report["notes"]) == (gain <= 1.03)


def test_reports_of_before_there_were_layers_are_read(finished: Finished, tmp_path: Path) -> None:
    old = finished.json
    for name in ("layers", "layer_totals", "recommended"):
        del old[name]
    (tmp_path / "report.json").write_text(json.dumps(old))
    report = read_report(tmp_path / "report.json")
    assert (report.layers, report.layer_totals, report.recommended) == ((), {}, None)
    assert report.baseline == finished.report.baseline


def test_the_folder_holds_what_the_contract_lists_and_nothing_else(finished: Finished) -> None:
    names = set(contents(finished.run))
    stages = {f"stages/{i:02d}-{stage['type']}" for i, stage in enumerate(EVERY_STAGE)}
    expected = {f"{stage}/{name}" for stage in stages for name in ("model.safetensors", "model.json", "footprint.json")}
    expected |= {"report.json", "manifest.json", "recipe.yaml", "run.log", "stages/03-prune/plan.json"}
    expected |= {"report.html", "report.md", "results.csv", "model_card.md"}
    assert names == expected | ARTIFACTS
    assert sorted(path.name for path in finished.run.parent.iterdir()) == ["recipe.yaml", "run"]


def test_artifacts_are_described_as_they_are(finished: Finished) -> None:
    artifacts = {artifact["path"]: artifact for artifact in finished.json["artifacts"]}
    assert artifacts.keys() == ARTIFACTS
    for path, artifact in artifacts.items():
        assert artifact["sha256"] == sha256_of(finished.run / path)
        assert artifact["size_bytes"] == (finished.run / path).stat().st_size
        assert artifact["precision"] == ("int8" if "int8" in path else "fp32")
        assert artifact["format"] == ("onnx" if path.endswith(".onnx") else "openvino_ir")
    assert artifacts["artifacts/result_int8.onnx"]["io"] == {
        "image": "float32 [N,3,48,48] RGB 0-255",
        "logits": "float32 [N,4]",
    }


def test_the_stored_recipe_is_the_resolved_one(finished: Finished) -> None:
    stored = load_recipe(finished.run / "recipe.yaml").recipe
    assert recipe_hash(stored) == recipe_hash(load_recipe(finished.recipe).recipe)


def test_the_log_of_the_run_is_whole_though_nobody_configured_logging(finished: Finished) -> None:
    log = (finished.run / "run.log").read_text()
    assert "stage 1/7 finetune" in log
    assert "stage 7 done" in log


def test_one_flipped_bit_in_any_file_is_caught(finished: Finished) -> None:
    assert verify_manifest(finished.run) == []
    for name in contents(finished.run):
        path = finished.run / name
        original = path.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            damaged = bytearray(original)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            if name == "manifest.json":
                assert faults_or_error(finished.run), position
            else:
                assert [fault.split(":")[0] for fault in verify_manifest(finished.run)] == [name]
        path.write_bytes(original)
    assert verify_manifest(finished.run) == []


def test_one_flipped_bit_anywhere_in_the_manifest_is_caught(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"content")
    write_manifest(tmp_path)
    assert verify_manifest(tmp_path) == []
    original = (tmp_path / "manifest.json").read_bytes()
    for bit in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "manifest.json").write_bytes(damaged)
        assert faults_or_error(tmp_path), f"bit {bit}: {bytes(damaged)!r}"


def faults_or_error(folder: Path) -> list[str]:
    try:
        return verify_manifest(folder)
    except DataError as error:
        return [str(error)]


def test_nothing_in_the_folder_is_a_pickle(finished: Finished) -> None:
    for name in contents(finished.run):
        path = finished.run / name
        start = path.read_bytes()[:2]
        assert path.suffix in {
            *(".json", ".yaml", ".log", ".safetensors", ".onnx", ".xml", ".bin"),
            *(".html", ".md", ".csv"),
        }
        assert not zipfile.is_zipfile(path), f"{name}: torch.save writes zip files with a pickle inside"
        assert not (start[0] == 0x80 and start[1] <= 5), f"{name}: starts like a pickle"
        assert b"data.pkl" not in path.read_bytes()


@pytest.mark.parametrize("missed", ["budget", "parity", "NaN"])
def test_a_missed_budget_or_gate_leaves_a_failed_report_and_no_artifacts(
    missed: str,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    budget = {"macs": "0.5x", "size_bytes": "1.0x"} if missed == "budget" else {}
    if missed == "parity":
        monkeypatch.setattr(parity, "FLOAT_DIFFERENCE", -1.0)
    if missed == "NaN":
        monkeypatch.setattr(parity, "onnx_logits", lambda _, images: np.full((len(images), 4), np.nan, np.float32))
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, budget=budget)
    assert main([str(recipe), "--out", str(tmp_path / "run"), "--json", "-q"]) == 3
    printed = json.loads(capsys.readouterr().out)
    report = read_report(tmp_path / "run" / "report.json")
    assert printed == as_json(report)
    assert report.verdict["status"] == "failed"
    assert not report.passed
    assert all(missed in reason for reason in report.verdict["reasons"])
    assert any("macs" in reason for reason in report.verdict["reasons"]) == (missed == "budget")
    assert report.result.accuracy is not None, "what was measured stays"
    assert (report.parity["float"]["pairs"]["torch/onnx"]["difference"] is None) == (missed == "NaN")
    assert report.parity["baseline"]["pairs"].keys() == {"torch/ir_f32"}
    assert any(reason.startswith("parity: baseline: ") for reason in report.verdict["reasons"]) == (missed == "parity")
    assert report.artifacts == ()
    assert report.recommended is None, "there is nothing to deploy"
    assert report.layers
    assert report.benchmark["int8_gain"] is None
    assert not (tmp_path / "run" / "artifacts").exists()
    assert verify_manifest(tmp_path / "run") == []
    assert not (tmp_path / "run.partial").exists()


def test_a_scope_that_names_nothing_is_found_before_anything_is_trained(tiny_images: Path, tmp_path: Path) -> None:
    late = {**QUANTIZE, "ignored_scope": ["block2", "blok3"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, late)
    with pytest.raises(RecipeError, match=r"stages\[1\]\.ignored_scope\[1\]: 'blok3' .*did you mean 'block3'"):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run.partial/stages/*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_that_trains_on_cuda_goes_through_every_stage(tiny_images: Path, tmp_path: Path) -> None:
    stages = (SHORT, DROP, PRUNE, {**SHORT, "distill": {}}, QUANTIZE, SHORT)
    report = compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages), tmp_path / "run", device="cuda")
    assert report.environment["training_device"] == "cuda"
    assert all(stage["footprint"]["val_accuracy"] is not None for stage in report.stages)


def test_an_untrained_baseline_has_no_accuracy(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, PRUNE, SHORT)
    report = compress(recipe, tmp_path / "run")
    assert report.baseline.accuracy is None
    assert report.baseline.accuracy_ci is None
    assert report.baseline.train_time_s is None
    assert report.baseline.latency_ms is not None
    assert report.result.accuracy is not None


def test_an_untrained_baseline_cannot_teach(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, PRUNE, DISTILLED)
    with pytest.raises(RecipeError, match=r"stages\[1\]\.distill: .*untrained"):
        compress(recipe, tmp_path / "run")
    assert not (tmp_path / "run.partial").exists()


def test_weights_without_a_head_that_fits_make_no_teacher_either(tiny_images: Path, tmp_path: Path) -> None:
    """Only loading the weights tells, so this is found at the start of the run instead of in the recipe."""
    save_file(tiny(num_classes=9).state_dict(), tmp_path / "nine.safetensors")
    model = {"name": "xception", "weights": str(tmp_path / "nine.safetensors")}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, PRUNE, DISTILLED, model=model)
    with pytest.raises(RecipeError, match=r"stages\[1\]: needs a trained baseline.*begin `stages` with a finetune"):
        compress(recipe, tmp_path / "run")
    assert not (tmp_path / "run.partial" / "stages").exists()


def test_weights_with_a_head_that_fits_are_a_baseline_without_training(finished: Finished, tmp_path: Path) -> None:
    trained = finished.run / "stages" / "00-finetune" / "model.safetensors"
    images = Path(finished.json["recipe"]["data"]["path"])
    model = {"name": "xception", "weights": str(trained)}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", images, QUANTIZE, model=model, budget={"accuracy_drop": 0.1, "accuracy": "0.9x"}
    )
    report = compress(recipe, tmp_path / "run")
    assert report.passed
    assert report.baseline.accuracy == finished.report.baseline.accuracy
    assert report.result.train_time_s is None
    assert report.weights["head_loaded"]
    assert report.weights["sha256"] == sha256_of(trained)


def test_per_channel_activations_give_no_int8_onnx_and_the_report_says_so(tiny_images: Path, tmp_path: Path) -> None:
    quantize = {**QUANTIZE, "per_channel_activations": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, {**SHORT, "epochs": 3}, quantize)
    report = compress(recipe, tmp_path / "run")
    assert report.passed, report.verdict
    assert {artifact.path for artifact in report.artifacts} == ARTIFACTS - {"artifacts/result_int8.onnx"}
    assert any("no INT8 ONNX" in note for note in report.notes)
    assert report.parity["int8"]["pairs"].keys() == {"torch/ir_f32", "torch/ir_default", "ir_f32/ir_default"}


def test_a_recipe_object_does_as_well_as_a_file(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT)).recipe
    report = compress(recipe)
    assert report.recommended == "artifacts/result_fp32.xml", "nothing was quantized"
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1
    assert runs[0].name.startswith("recipe-")
    assert report.recipe["hash"] == recipe_hash(recipe)
    compress(recipe)
    assert len(list((tmp_path / "runs").iterdir())) == 2, "a fresh folder for every run, though in the same second"
    with pytest.raises(RecipeError, match="overrides need a recipe file"):
        compress(recipe, tmp_path / "other", overrides=["seed=1"])


def test_overrides_change_the_recipe_that_is_run_and_stored(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT)
    report = compress(recipe, tmp_path / "run", overrides=["stages[0].steps=2", "stages[0].epochs=null", "seed=5"])
    assert report.recipe["seed"] == 5
    assert report.stages[0]["details"]["steps"] == 2
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe.seed == 5


def test_a_bare_sequential_goes_through_every_kind_of_stage(tiny_images: Path, tmp_path: Path) -> None:
    given = own_networks.sequential(9)  # four classes: its head is replaced
    before = copy.deepcopy(given.state_dict())
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, FINETUNE, PRUNE, DISTILLED, QUANTIZE, SHORT)
    report = compress(recipe, tmp_path / "run", model=given)
    assert report.recipe["model"]["source"] == "custom"
    assert report.recipe["model"]["name"] == "torch.nn.modules.container.Sequential"
    assert report.weights["source"] == "custom"
    assert any("head" in note for note in report.notes)
    assert report.baseline.macs is not None
    assert report.result.macs is not None
    assert report.result.macs <= 0.7 * report.baseline.macs
    assert [row["layer"] for row in report.layers] == ["0", "3", "8"], "though NNCF needs a module around it"
    assert all(row["result"]["ms"] is not None for row in report.layers)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    with pytest.raises(RecipeError, match=r"load_network\(folder, module"):
        load_network(tmp_path / "run" / "stages" / "01-prune")


def test_another_network_of_the_same_name_reuses_no_stage(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, PRUNE, seed=77)

    def reused(name: str, network: nn.Module) -> list[bool]:
        return [stage["reused"] for stage in compress(recipe, tmp_path / name, model=network).stages]

    first, other = own_networks.make(4), own_networks.make(4)
    with torch.no_grad():
        other.get_submodule("out").bias[0] += 1  # type: ignore[operator,index]
    assert reused("first", first) == [False, False]
    assert reused("again", copy.deepcopy(first)) == [True, True]
    assert reused("other", other) == [False, False]


def test_a_recipe_that_leaves_the_network_to_the_caller_needs_one(tiny_images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, model={"source": "custom"})
    with pytest.raises(RecipeError, match=r"model\.source: found 'custom', and no network; give one with --factory"):
        compress(recipe, tmp_path / "run")
    loaded = load_recipe(recipe).recipe
    report = compress(loaded, tmp_path / "run", model=own_networks.make)
    assert report.recipe["model"]["name"] == "own_networks:make"
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe.model.name == "own_networks:make"


def test_input_of_a_zoo_is_resolved_in_the_report_and_the_stored_recipe(tiny_images: Path, tmp_path: Path) -> None:
    model = {"source": "timm", "name": "lcnet_035", "weights": "none"}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, model=model)
    report = compress(recipe, tmp_path / "run")
    assert tuple(report.recipe["input"]["mean"]) == (0.485, 0.456, 0.406)
    stored = load_recipe(tmp_path / "run" / "recipe.yaml").recipe
    assert stored.input.fit == "center_crop"
    assert recipe_hash(stored) == report.recipe["hash"]


@pytest.mark.parametrize(("device", "exit_code"), [("cuda", 5), ("tpu", 2)])
def test_a_device_that_is_not_there_is_an_error(device: str, exit_code: int, tiny_images: Path, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT)
    with pytest.raises(Exception, match="--device") as caught:
        compress(recipe, tmp_path / "run", device=device)
    assert caught.value.exit_code == exit_code


def test_a_fault_in_the_data_shows_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images(tmp_path / "images", per_class=6, test_per_class=2)
    broken = images / "test" / "red" / "001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    recipe = write_recipe(tmp_path / "recipe.yaml", images, {**SHORT, "batch_size": 4})
    arguments = [str(recipe), "--out", str(tmp_path / "run"), "-q"]
    assert main(arguments) == 4
    assert "test/red/001.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("run.partial/stages/*"))
    broken.write_bytes(whole)
    assert main(arguments) == 0, "nothing was finished, so neither --resume nor --force is asked for"


def test_divergence_keeps_the_last_good_weights(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, DIVERGING)
    arguments = [str(recipe), "--out", str(tmp_path / "run"), "-q"]
    assert main(arguments) == 2
    partial = tmp_path / "run.partial"
    message = capsys.readouterr().err
    assert "stages[1]: " in message
    assert str(partial / "last_good") in message
    assert not (tmp_path / "run").exists()
    good = load_network(partial / "last_good").module.state_dict()
    assert all(value.isfinite().all() for value in good.values())
    assert (partial / "stages" / "00-finetune").is_dir()
    assert not (partial / "stages" / "01-finetune").exists()


def test_last_good_weights_fit_the_structure_they_were_lost_in(tiny_images: Path, tmp_path: Path) -> None:
    drop = {**DROP, "recovery": {key: value for key, value in DIVERGING.items() if key != "type"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, drop)
    with pytest.raises(TrainingError, match=r"stages\[1\]: .*last_good"):
        compress(recipe, tmp_path / "run")
    network = load_network(tmp_path / "run.partial" / "last_good")
    dropped = network.edits[0]["modules"]
    assert len(dropped) == 1
    assert isinstance(network.module.get_submodule(dropped[0]), nn.Identity)
    before = load_file(tmp_path / "run.partial" / "stages" / "00-finetune" / "model.safetensors")
    assert network.module.state_dict().keys() == {name for name in before if not name.startswith(dropped[0])}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"latency_ms": "0.001x"},
            r"stages\[2\]\.target\.latency_ms: found \S+ ms, .* reachable here: \S+ ms to \S+ ms",
        ),
        ({"macs": "0.001x"}, r"stages\[2\]: prune: a target of \S+ macs cannot be reached"),
    ],
)
def test_a_target_out_of_reach_stops_the_run_before_its_first_stage(
    target: dict[str, Any], message: str, tiny_images: Path, tmp_path: Path
) -> None:
    prune = {**PRUNE, "target": target}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, FINETUNE, DROP, prune, QUANTIZE)
    with pytest.raises(RecipeError, match=message):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run*/stages/*"))
