"""What people see: every figure or that it was not measured, the verdict, progress; the log is left as it was."""

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from compressor import console
from compressor.artifacts import Artifact
from compressor.report import Footprint, Report
from compressor.training import Progress as State

LOG = logging.getLogger("compressor.somewhere")
REPORT = Report(
    verdict={"status": "passed", "reasons": []},
    baseline=Footprint(params=20_821_295, macs=800_000_000, latency_ms=20.0, accuracy=0.97, size_bytes=83_000_000),
    result=Footprint(params=2_000_000, macs=120_000_000, latency_ms=3.0, size_bytes=2_500_000, throughput_fps=0.0),
    stages=(),
    artifacts=(Artifact("artifacts/result_int8.xml", "openvino_ir", "int8", "0" * 64, 1, {}),),
    parity={},
    audit={},
    benchmark={},
    data={},
    weights={},
    recipe={},
    environment={},
    notes=("classes [red] and [green] are few",),
)


def lines(text: str) -> dict[str, str]:
    """Rows of a table by their first words, without its frame."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in text.splitlines()]
    return {row[0]: " | ".join(filter(None, row[1:])) for row in rows if len(row) > 1}


def test_the_report_shows_figures_ratios_and_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_report(REPORT, Path("runs/a"))
    out = capsys.readouterr().out
    rows = lines(out)
    assert rows["latency, ms"] == "20.00 | 3.00 | 0.150x"
    assert rows["parameters, M"] == "20.821 | 2.000 | 0.096x"
    assert rows["MACs, M"] == "800.0 | 120.0 | 0.150x"
    assert rows["IR size, MB"] == "83.00 | 2.50 | 0.030x"
    assert rows["test accuracy"] == "0.9700 | not measured"
    assert rows["throughput, images/s"] == "not measured | 0"
    assert rows["retraining memory, peak MB"] == "not measured | not measured"
    assert "note: classes [red] and [green] are few" in out  # brackets are not rich's markup
    assert "passed: runs/a/report.json" in out
    assert "runs/a/artifacts/result_int8.xml" in out


def costs(channels: int, ms: float | None, precision: str | None = "f32") -> dict[str, Any]:
    return {"in": channels, "out": channels, "macs": 1, "precision": precision, "ms": ms, "share": 0.1}


LAYERED = dataclasses.replace(
    REPORT,
    layers=(
        {"layer": "stem[0]", "kind": "conv", "baseline": costs(3, 0.5), "result": costs(2, 0.25, "u8")},
        *(
            {
                "layer": f"blocks.{i}.rather_long.pw",
                "kind": "conv",
                "baseline": costs(64, 9 - i),
                "result": None,
            }
            for i in range(1, 9)
        ),
        {"layer": "unknown", "kind": "conv", "baseline": costs(1, None), "result": costs(1, 1.0)},
        {"layer": "last", "kind": "linear", "baseline": costs(5, 10.0), "result": costs(4, None, None)},
        {"layer": "least", "kind": "conv", "baseline": costs(5, 0.1), "result": costs(4, 0.1)},
    ),
    layer_totals={
        "baseline": {"rest": {}, "reorders": {"f32": {"count": 2, "ms": 0.0}}},
        "result": {"rest": {}, "reorders": {"f32": {"count": 2, "ms": 0.5}, "u8": {"count": 3, "ms": 1.0}}},
    },
    benchmark={"int8_gain": 0.5},
    recommended="artifacts/result_fp32.xml",
)


@pytest.mark.parametrize("columns", ["80", "300"])
def test_the_slowest_layers_are_shown_before_and_after(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console.show_report(LAYERED, Path("runs/a"))
    out = capsys.readouterr().out
    rows = lines(out)
    assert rows["last"] == "5x5 -> 4x4 | 10.000 -> unknown | f32 -> unknown"
    assert rows["stem[0]"] == "3x3 -> 2x2 | 0.500 -> 0.250 | f32 -> u8"
    assert rows["blocks.1.rather_long.pw"] == "64x64 -> gone | 8.000 -> gone | f32 -> gone"
    assert [name for name in rows if name in ("unknown", "least")] == [], "not timed, or not among the slowest ten"
    assert "reorders (changes of layout or precision): 2 -> 5, 0.000 -> 1.500 ms" in out
    assert "INT8 against float on this CPU, default precision: 0.50x as fast" in out
    assert "recommended: runs/a/artifacts/result_fp32.xml" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_report_without_layers_is_shown_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_report(REPORT, Path("runs/a"))
    out = capsys.readouterr().out
    assert not any(word in out for word in ("layer", "reorders", "INT8", "recommended"))


def test_a_failed_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = {"status": "failed", "reasons": ["budget.accuracy: 0.9400 is below 0.9500"]}
    console.show_report(dataclasses.replace(REPORT, verdict=verdict, artifacts=()), Path("runs/a"))
    out = capsys.readouterr().out
    assert "missed: budget.accuracy: 0.9400 is below 0.9500" in out
    assert "failed: runs/a/report.json" in out


def test_the_plan_shows_fractions_of_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"where": "stages[0]", "what": "prune", "macs": 250_000_000, "params": 1_000_000}]
    console.show_plan({"baseline": {"macs": 1_000_000_000, "params": 4}, "stages": rows, "notes": ["7 classes"]})
    out = capsys.readouterr().out
    assert lines(out)["stages[0]"] == "prune | 250.0 | 0.250x | 1.000"
    assert "note: 7 classes" in out


@pytest.mark.parametrize(
    ("volume", "shown"),
    [({}, ["note", "warning"]), ({"quiet": True}, ["warning"]), ({"verbose": True}, ["detail", "note", "warning"])],
)
def test_plain_lines_go_to_stderr_by_volume(
    volume: dict[str, bool], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.logging_to_stderr(**{"quiet": False, "verbose": False, **volume}):
        LOG.debug("detail")
        LOG.info("note")
        LOG.warning("warning")
    LOG.warning("after")
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[-1] for line in err.splitlines()] == shown


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("compressor")
    before = (logger.level, logger.propagate, list(logger.handlers))

    def fails() -> None:
        with console.logging_to_stderr(quiet=False, verbose=True):
            assert (logger.level, logger.propagate) == (logging.DEBUG, False)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    assert (logger.level, logger.propagate, logger.handlers) == before


def live() -> tuple[console.LiveHandler, Progress, io.StringIO]:
    text = io.StringIO()
    drawn = Console(file=text, force_terminal=True, width=100, color_system=None)
    progress = Progress(TextColumn("{task.description}"), BarColumn(), console=drawn, auto_refresh=False)
    return console.LiveHandler(progress, logging.INFO), progress, text


def record(level: int, message: str, state: State | None = None) -> logging.LogRecord:
    entry = logging.LogRecord("compressor.x", level, __file__, 1, message, (), None)
    if state is not None:
        entry.progress = state
    return entry


def state(step: int, steps: int, val_accuracy: float | None = None) -> State:
    return State(epoch=2, epochs=5, step=step, steps=steps, loss=0.51234, val_accuracy=val_accuracy, seconds=1.0)


def test_progress_moves_the_bar_and_prints_nothing() -> None:
    handler, progress, text = live()
    handler.emit(record(logging.DEBUG, "x", state(30, 100)))
    task = progress.tasks[0]
    assert (task.description, task.completed, task.total) == ("epoch 2/5  loss 0.5123", 30, 100)
    handler.emit(record(logging.DEBUG, "x", state(100, 100, val_accuracy=0.75)))
    assert progress.tasks[0].description == "epoch 2/5  loss 0.5123  val 0.7500"
    handler.emit(record(logging.DEBUG, "x", state(1, 20)))
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (1, 20)  # the next stage begins anew
    assert text.getvalue() == ""


def test_the_bar_names_the_stage() -> None:
    handler, progress, _ = live()
    begun = record(logging.INFO, "stage 2/6 finetune")
    begun.stage = "stage 2/6 finetune"
    handler.emit(begun)
    handler.emit(record(logging.DEBUG, "x", state(30, 100)))
    assert progress.tasks[0].description == "stage 2/6 finetune  epoch 2/5  loss 0.5123"


def test_after_a_fifth_of_a_stage_its_end_is_foretold() -> None:
    """Ten epochs of 80 steps of half a second each, and ten seconds of validation after each."""
    now = 0.0
    progress = Progress(
        auto_refresh=False,
        get_time=lambda: now,
        speed_estimate_period=console.SPEED_PERIOD_S,
        console=Console(file=io.StringIO()),
    )
    handler = console.LiveHandler(progress, logging.INFO)
    steps, errors = 800, []
    for step in range(1, steps + 1):
        now += 0.5 + (10.0 if step > 1 and step % 80 == 1 else 0.0)
        handler.emit(record(logging.DEBUG, "x", state(step, steps)))
        if step >= steps // 5:
            left = (steps - step) * 0.5 + 10.0 * ((steps - 1) // 80 - (step - 1) // 80)
            told = progress.tasks[0].time_remaining
            assert told is not None
            if left > 60:
                errors.append(told / left - 1)
    assert max(map(abs, errors)) < 0.25


def test_messages_are_printed_above_the_bar_and_name_what_goes_on() -> None:
    handler, progress, text = live()
    handler.emit(record(logging.DEBUG, "too much detail"))
    handler.emit(record(logging.INFO, "stage 1/3 [prune]"))
    handler.emit(record(logging.WARNING, "careful"))
    assert progress.tasks[0].description == "careful"
    printed = text.getvalue()
    assert "stage 1/3 [prune]" in printed
    assert "careful" in printed
    assert "too much detail" not in printed


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with console.logging_to_stderr(quiet=False, verbose=False):
        handlers = logging.getLogger("compressor").handlers
        assert any(isinstance(handler, console.LiveHandler) for handler in handlers)
        LOG.info("hello")
    assert not logging.getLogger("compressor").handlers
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello" in err
