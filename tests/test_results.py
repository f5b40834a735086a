"""Stored figures of finished runs: what `benchmarks/results.py` keeps of a report."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compressor.report import Footprint, Report, write_report

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STORED = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module that stores in the test's folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("results")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def report(here: Path) -> Report:
    """A report of a run whose files lie in `here`."""
    return Report(
        verdict={"status": "failed", "reasons": [f"parity: torch/onnx differ, see '{here}/a.log'"]},
        baseline=Footprint(accuracy=0.9),
        result=Footprint(accuracy=0.8),
        stages=({"type": "finetune", "seconds": 1.0, "details": {"images": 5}, "footprint": {}},),
        artifacts=(),
        parity={"pairs": {"torch/onnx": {"difference": 0.0}}},
        audit={},
        benchmark={"accuracy": {"test_images": 3}},
        data={"path": str(here / "photos of mine" / "train set.tar"), "kept": ["data/photos", "a/b"]},
        weights={"source": str(here / "xception.safetensors"), "url": "https://example.org/a/b"},
        recipe={"hash": "0", "data": {"path": str(here / "set.tar")}, "model": {"weights": str(here / "w.pth")}},
        environment={},
        notes=(f"could not read {here}/deep/x.png, {here}/y.png",),
    )


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def absolute_paths(stored: Path) -> list[str]:
    """Texts of a stored JSON with a word that begins with a slash."""
    words = ((text, word.strip("'\"(")) for text in texts(json.loads(stored.read_text())) for word in text.split())
    return [text for text, word in words if word.startswith("/")]


def test_a_recorded_run_names_no_folder_of_its_machine(results: ModuleType, tmp_path: Path) -> None:
    write_report(tmp_path / "run" / "report.json", report(tmp_path))
    assert len(absolute_paths(tmp_path / "run" / "report.json")) == 7, "the law below can fail"
    results.record(tmp_path / "run", "mine")
    stored = tmp_path / "results" / "mine.json"
    assert absolute_paths(stored) == []
    assert str(tmp_path) not in stored.read_text()
    kept = json.loads(stored.read_text())
    assert kept["verdict"]["reasons"] == ["parity: torch/onnx differ, see 'a.log'"]
    assert kept["data"] == {"path": "train set.tar", "kept": ["data/photos", "a/b"]}
    assert kept["weights"] == {"source": "xception.safetensors", "url": "https://example.org/a/b"}
    assert (kept["recipe"]["data"]["path"], kept["recipe"]["model"]["weights"]) == ("set.tar", "w.pth")
    assert kept["notes"] == ["could not read x.png, y.png"]
    assert list(kept["parity"]["pairs"]) == ["torch/onnx"]


def test_a_recorded_run_has_a_line_for_each_layer(results: ModuleType, tmp_path: Path) -> None:
    rows = tuple({"layer": name, "kind": "conv", "baseline": {"in": 3, "ms": 0.5}, "result": None} for name in "abc")
    # A key of the same name elsewhere must not get them.
    found = dataclasses.replace(report(tmp_path), layers=rows, parity={"layers": []})
    for name, value in (("with", found), ("without", report(tmp_path))):
        write_report(tmp_path / name / "report.json", value)
        results.record(tmp_path / name, name)
    text = (tmp_path / "results" / "with.json").read_text()
    assert tuple(json.loads(text)["layers"]) == rows
    assert json.loads(text)["parity"] == {"layers": []}
    assert sum('"layer":' in line for line in text.splitlines()) == len(rows)
    assert json.loads((tmp_path / "results" / "without.json").read_text())["layers"] == []


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_no_stored_run_names_a_folder(stored: Path) -> None:
    assert absolute_paths(stored) == []
