"""The zoo table: a dozen backbones of different families go through its columns, and its bookkeeping is honest."""

import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import RecipeError, UnsupportedModelError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIZE = 64
PRUNED = (
    "timm/regnetx_002",
    "torchvision/mnasnet0_5",
    "timm/dla46_c",
    "timm/convnext_atto",
    "timm/repvgg_a0",
    "timm/ese_vovnet19b_dw",
    "timm/mobilenetv4_conv_small",
    "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mobilenet_v3_small",
)
QUANTIZED = ("timm/resnetv2_18", "torchvision/squeezenet1_1")


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    """The script as a module, with the folder it imports its neighbour from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import zoo as module  # type: ignore[import-not-found]

        yield module


def row_of(zoo: Any, label: str) -> Any:
    (row,) = (row for row in zoo.ROWS if row.label == label)
    return row


@pytest.mark.parametrize("label", PRUNED)
def test_a_backbone_is_pruned_equals_its_oracle_and_reloads(zoo: Any, label: str) -> None:
    row = row_of(zoo, label)
    columns = ("prune", "oracle", "reload")
    found = zoo.judged(row, lambda folder, f: zoo.measure(row, folder, size=SIZE, found=f, columns=columns))
    assert found["status"] == "passed", found["reason"]
    assert all(found["columns"][column] == "passed" for column in columns)
    assert found["macs"] <= 0.5 * found["macs_before"]


@pytest.mark.parametrize("label", QUANTIZED)
def test_a_backbone_survives_int8(zoo: Any, label: str) -> None:
    row = row_of(zoo, label)
    columns = ("prune", "oracle", "fold", "int8", "reload")
    found = zoo.judged(row, lambda folder, f: zoo.measure(row, folder, size=96, found=f, columns=columns))
    assert found["status"] == "passed", found["reason"]
    assert min(found["sqnr_onnx_db"], found["sqnr_ir_db"]) >= zoo.SQNR_LIMIT


def test_the_table_covers_the_families(zoo: Any) -> None:
    labels = [row.label for row in zoo.ROWS]
    assert len(set(labels)) == len(labels)
    assert len({row.family for row in zoo.ROWS}) >= 25
    assert len(fnmatch.filter(labels, "timm/*")) >= 60
    assert len(fnmatch.filter(labels, "torchvision/*")) >= 20
    assert {*PRUNED, *QUANTIZED} <= set(labels)
    assert len({row_of(zoo, label).family for label in (*PRUNED, *QUANTIZED)}) == 12


def test_every_row_names_a_network_that_exists(zoo: Any) -> None:
    from compressor.models.zoo import known_timm, known_torchvision

    for row in zoo.ROWS:
        (known_timm if row.source == "timm" else known_torchvision)(row.name)


def entry(zoo: Any, row: Any, status: str = "passed") -> dict[str, Any]:
    return dict(zoo._row(row, status, "", 1.0))


def test_rows_that_are_there_are_not_run_again(zoo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, rows = tmp_path / "zoo.json", zoo.ROWS[:3]
    ran: list[str] = []

    def run(row: Any) -> dict[str, Any]:
        ran.append(row.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return entry(zoo, row)

    with pytest.raises(KeyboardInterrupt):
        zoo.fill_table(output, rows, run, size=SIZE)
    kept = [row["name"] for row in json.loads(output.read_text())["rows"]]
    assert rows[0].name in kept
    assert rows[1].name not in kept
    table = zoo.fill_table(output, rows, run, size=SIZE, jobs=2)
    assert sorted(ran) == sorted([row.name for row in rows] + [rows[1].name]), "only what was missing is run again"
    stored = json.loads(output.read_text())
    assert [row["name"] for row in stored["rows"]] == [row.name for row in rows], "in the table's order"
    assert stored["summary"] == table["summary"]
    assert (stored["summary"]["rows"], stored["summary"]["passed_share"]) == (3, 1.0)
    assert stored["environment"]["versions"]["torch"]
    with pytest.raises(RecipeError, match="made at 64 px, not 128"):
        zoo.fill_table(output, rows, run, size=128)


def test_an_error_of_ours_is_a_refusal_only_before_anything_is_written(zoo: Any) -> None:
    def refuse(folder: Path, found: Any) -> None:
        raise UnsupportedModelError("conv7: shuffles channels")

    def too_late(folder: Path, found: Any) -> None:
        (folder / "model.xml").touch()
        refuse(folder, found)

    def after_a_miss(folder: Path, found: Any) -> None:
        found.gate("oracle", False, "differs")
        refuse(folder, found)

    row = zoo.ROWS[0]
    refused = zoo.judged(row, refuse)
    assert (refused["status"], refused["reason"]) == ("refused", "UnsupportedModelError: conv7: shuffles channels")
    late = zoo.judged(row, too_late)
    assert late["status"] == "wrong"
    assert "model.xml had been written" in late["reason"]
    missed = zoo.judged(row, after_a_miss)
    assert missed["status"] == "wrong"
    assert missed["columns"]["oracle"] == "wrong"
    assert missed["reason"].startswith("oracle: differs; ")


def test_a_crash_keeps_what_came_before_it(zoo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def crash(folder: Path, found: Any) -> None:
        found.within("oracle", "difference", 1e-7, 1e-4)
        raise ZeroDivisionError("of nothing")

    row = zoo.judged(zoo.ROWS[0], crash)
    assert row["status"] == "wrong"
    assert "crash: ZeroDivisionError: of nothing (test_zoo.py:" in row["reason"]
    assert row["columns"]["oracle"] == "passed"
    assert row["columns"]["train"] == "not run"


def test_a_missed_or_unmeasurable_gate_is_wrong(zoo: Any) -> None:
    def missed(value: float) -> dict[str, Any]:
        return dict(zoo.judged(zoo.ROWS[0], lambda _, found: found.within("ir", "ir_difference", value, 1e-4)))

    assert missed(1e-5)["status"] == "passed"
    for value in (1e-3, float("nan"), float("inf")):
        row = missed(value)
        assert row["status"] == "wrong"
        assert row["columns"]["ir"] == "wrong"
    json.dumps(missed(float("nan")), allow_nan=False)


@pytest.mark.parametrize(
    ("script", "limit", "reason"),
    [
        ("import os; os.abort()", 60, "crash: exit status -6"),
        ("import sys; sys.exit('no memory')", 60, "crash: exit status 1: no memory"),
        ("import time; time.sleep(60)", 0.5, "timeout: not finished after 0.5 s"),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
            0.5,
            "timeout",
        ),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_wrong_row(zoo: Any, script: str, limit: float, reason: str) -> None:
    started = time.perf_counter()
    row = zoo.run_row(zoo.ROWS[0], [sys.executable, "-c", script], limit, threads=1)
    assert row["status"] == "wrong"
    assert row["reason"].startswith(reason)
    assert set(row["columns"].values()) == {"not run"}
    assert time.perf_counter() - started < 30, "what the process started is ended too"
    assert zoo.format_row(row)
