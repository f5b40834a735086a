"""What a person sees while a run works and when it ends.

Invariant: stderr only, but for the final tables on stdout; library code logs, this module alone draws.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from compressor.report import Report
    from compressor.study_spec import LoadedStudy


SPEED_PERIOD_S = 1800.0
FILE_WIDTH = 120  # of a table that is written to a file, which has no width of its own


class LiveHandler(logging.Handler):
    """Draws training progress in one live line and prints every other record above it."""

    def __init__(self, progress: Progress, level: int):
        super().__init__(logging.DEBUG)
        self.progress, self.shown_level, self.stage = progress, level, ""
        self.task = progress.add_task("starting", total=None)

    def emit(self, record: logging.LogRecord) -> None:
        self.stage = getattr(record, "stage", self.stage)
        state = getattr(record, "progress", None)
        if state is not None:
            val = "" if state.val_accuracy is None else f"  val {state.val_accuracy:.4f}"
            where = f"{self.stage}  " if self.stage else ""
            text = f"{where}epoch {state.epoch}/{state.epochs}  loss {state.loss:.4f}{val}"
            if state.step <= 1:
                self.progress.reset(self.task, total=state.steps)
            self.progress.update(self.task, description=text, total=state.steps, completed=state.step)
        elif record.levelno >= self.shown_level:
            self.progress.update(self.task, description=record.getMessage())
        if record.levelno >= self.shown_level:
            style = "yellow" if record.levelno >= logging.WARNING else None
            self.progress.console.print(
                f"{time.strftime('%H:%M:%S')} {record.getMessage()}", style=style, markup=False, highlight=False
            )


@contextmanager
def logging_to_stderr(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show the toolkit's log: a live display in a terminal, plain lines elsewhere."""
    level = logging.WARNING if quiet else logging.INFO
    logger = logging.getLogger("compressor")
    console = Console(stderr=True)
    live = console.is_terminal and not quiet
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if live or verbose else level)
    logger.propagate = False
    try:
        with _live(console, level) if live else _plain(logging.DEBUG if verbose else level) as handler:
            logger.addHandler(handler)
            try:
                yield
            finally:
                logger.removeHandler(handler)
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextmanager
def _live(console: Console, level: int) -> Iterator[logging.Handler]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    # Validation and the data of a new epoch make pauses: speed is that of the last minutes, not of the last seconds.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_PERIOD_S) as progress:
        yield LiveHandler(progress, level)


@contextmanager
def _plain(level: int) -> Iterator[logging.Handler]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    yield handler


ROWS = (
    ("accuracy", "test accuracy", 1, "{:.4f}"),
    ("latency_ms", "latency, ms", 1, "{:.2f}"),
    ("throughput_fps", "throughput, images/s", 1, "{:.0f}"),
    ("size_bytes", "IR size, MB", 1e-6, "{:.2f}"),
    ("params", "parameters, M", 1e-6, "{:.3f}"),
    ("macs", "MACs, M", 1e-6, "{:.1f}"),
    ("train_peak_memory_bytes", "training memory, peak MB", 1e-6, "{:.0f}"),
    ("retrain_peak_memory_bytes", "retraining memory, peak MB", 1e-6, "{:.0f}"),
)
WIDEST, SLOWEST = 100, 10  # columns of what is printed; layers shown


def show_report(report: "Report", run: Path) -> None:
    """Baseline against result and the layers that took most time, then the verdict and where the artifacts are."""
    console = Console()
    console.width = min(console.width, WIDEST)
    table = Table("", "baseline FP32", "result", "ratio")
    for name, title, scale, form in ROWS:
        before, after = getattr(report.baseline, name), getattr(report.result, name)
        ratio = f"{after / before:.3f}x" if before and after is not None else ""
        table.add_row(title, *("not measured" if v is None else form.format(v * scale) for v in (before, after)), ratio)
    console.print(table)
    _show_layers(console, report)
    for reason in report.verdict["reasons"]:
        console.print(f"missed: {reason}", style="red", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(
        f"{report.verdict['status']}: {run / 'report.json'}",
        style="green" if report.passed else "red",
        markup=False,
        soft_wrap=True,
    )
    for artifact in report.artifacts:
        console.print(f"  {run / artifact.path}", markup=False, highlight=False, soft_wrap=True)
    if (page := run / "report.html").is_file():
        console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)
    if report.recommended:
        console.print(f"recommended: {run / report.recommended}", markup=False, highlight=False, soft_wrap=True)


def _show_layers(console: Console, report: "Report") -> None:
    """The layers that took most of the baseline's time, what all changes of layout take, and what INT8 gained."""
    timed = [row for row in report.layers if row["baseline"] and row["baseline"]["ms"] is not None]
    slowest = sorted(timed, key=lambda row: row["baseline"]["ms"], reverse=True)[:SLOWEST]
    if slowest:
        table = Table(title=f"slowest {len(slowest)} of the baseline's layers; all are in report.json")
        table.add_column("layer", overflow="fold")
        for title in ("in x out", "ms", "precision"):
            table.add_column(title, no_wrap=True)
        for row in slowest:
            pair = row["baseline"], row["result"]
            channels, ms, precision = (_change([form(layer) if layer else "gone" for layer in pair]) for form in CELLS)
            table.add_row(Text(row["layer"]), channels, ms, precision)
        console.print(table)
    if report.layer_totals:
        totals = [report.layer_totals[name]["reorders"].values() for name in ("baseline", "result")]
        counts = _change([str(sum(entry["count"] for entry in entries)) for entries in totals])
        times = [[entry["ms"] for entry in entries] for entries in totals]
        ms = _change([_ms(None if None in values else sum(values)) for values in times])
        console.print(f"reorders (changes of layout or precision): {counts}, {ms} ms", markup=False, highlight=False)
    if (gain := report.benchmark.get("int8_gain")) is not None:
        text = f"INT8 against float on this CPU, default precision: {gain:.2f}x as fast"
        console.print(text, markup=False, highlight=False)


def _change(pair: list[str]) -> str:
    return " -> ".join(pair)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


CELLS: tuple[Callable[[dict[str, Any]], str], ...] = (
    lambda layer: f"{layer['in']}x{layer['out']}",
    lambda layer: _ms(layer["ms"]),
    lambda layer: layer["precision"] or "unknown",
)


def show_plan(plan: dict[str, Any]) -> None:
    """Predicted size of the network after each stage."""
    console = Console()
    table = Table("stage", "what", "MACs, M", "of baseline", "parameters, M")
    for row in plan["stages"]:
        table.add_row(
            row["where"],
            row["what"],
            f"{row['macs'] / 1e6:.1f}",
            f"{row['macs'] / plan['baseline']['macs']:.3f}x",
            f"{row['params'] / 1e6:.3f}",
        )
    console.print(table)
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def show_inspection(inspection: dict[str, Any], *, members: bool) -> None:
    """The groups as a table, what cannot be pruned and why, and the suggested recipe; `members` lists layers too."""
    console = Console()
    whole, unpruned = inspection["network"], inspection["unpruned"]
    ratios = dict.fromkeys(figure["ratio"] for row in inspection["groups"] for figure in row["sensitivity"] or ())
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group", overflow="fold")
    columns = ["channels", "params\nM", "MACs\nM", *(f"{name.upper()}\nms" for name in whole["ms"])]
    columns += ["score\n10 %", "\n50 %", "\n90 %"]
    columns += [f"{'acc.' if i == 0 else ''}\n-{ratio:.0%}" for i, ratio in enumerate(ratios)]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    importance, points = inspection["importance"], ("p10", "median", "p90")
    # Fixed point in the power of ten of the largest, so that groups can be compared at a glance.
    largest = max((row["importance"]["p90"] for row in inspection["groups"] if row["importance"]), default=0) or 1
    unit = 10 ** math.floor(math.log10(largest))
    for row in inspection["groups"]:
        worth = [f"{row['importance'][point] / unit:.2f}" for point in points] if row["importance"] else [""] * 3
        width = f"{row['channels']}{'' if row['prunable'] else '*'}"
        table.add_row(row["name"], width, *_costs(row), *worth, *map(_accuracy, row["sensitivity"] or ()))
    table.add_row("rest", "", *_costs(inspection["rest"]))
    table.add_row("all", "", *_costs(whole))
    console.print(table)
    scale = "" if unit == 1 else f"{unit:g} x "
    lines = [f"score: importance of a group's channels by {importance['kind']}, in {scale}{importance['unit']}"]
    if unpruned:
        lines.append(f"acc.: accuracy on validation with the group alone pruned, {unpruned['accuracy']:.3f} unpruned")
    lines += [f"* {row['name']} stays as it is: {row['reason']}" for row in inspection["groups"] if not row["prunable"]]
    if members:
        for row in inspection["groups"]:
            lines.append(f"{row['name']}: " + ", ".join(f"{m['layer']} ({m['kind']})" for m in row["members"]))
    lines += [f"note: {note}" for note in inspection["notes"]]
    suggestion = inspection["suggestion"]
    lines += ["suggestion:", suggestion["yaml"] or suggestion["made_from"]]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=suggestion["yaml"] == line)


def _costs(row: dict[str, Any]) -> list[str]:
    return [f"{row['params'] / 1e6:.3f}", f"{row['macs'] / 1e6:.1f}", *(f"{ms:.2f}" for ms in row["ms"].values())]


def _accuracy(figure: dict[str, Any]) -> str:
    return "whole" if figure["accuracy"] is None else f"{figure['accuracy']:.3f}"


def show_planned(loaded: "LoadedStudy") -> None:
    """The rows of a study and the seeds that each is run with."""
    console = Console()
    table = Table("row", "recipe", "seeds")
    for name in dict.fromkeys(run.row for run in loaded.runs):
        runs = [run for run in loaded.runs if run.row == name]
        table.add_row(Text(name), Text(str(runs[0].path)), ", ".join(str(run.seed) for run in runs))
    console.print(table)
    console.print(f"{loaded.path}: valid, {len(loaded.runs)} runs, scale {loaded.scale or 'none'}", markup=False)


def show_study(study: dict[str, Any], out: Path) -> None:
    """Rows with their means and deviations, who dominates whom, what failed."""
    from compressor.study_figures import in_words, read_mean
    from compressor.study_spec import COLUMNS, FIGURES

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    table = Table(title=study["title"], title_justify="left", box=None, pad_edge=False)
    table.add_column("row", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    for name in COLUMNS:
        words = f"{FIGURES[name].label}, {FIGURES[name].unit}".split()
        table.add_column("\n".join(words), justify="right", overflow="fold", vertical="bottom")
    for row in study["rows"]:
        cells = [read_mean(row["figures"].get(name), FIGURES[name]) for name in COLUMNS]
        mark = "* " if row["name"] in study["pareto_set"] else "  "
        table.add_row(Text(mark + row["name"]), str(len(row["runs"])), *cells)
    console.print(table)
    lines = [f"* Pareto set; hypervolume {study['hypervolume']:.3f}"] if study["hypervolume"] is not None else []
    lines += [f"{name}: dominated by {', '.join(by)}" for name, by in study["dominated_by"].items() if by]
    for published in study["published"]:
        text = f"{published['name']}: {in_words(published['figures'])} ({published['source']})"
        lines.append(f"published, not measured here: {text}")
    lines += [f"note: {note}" for note in study["notes"]]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    for failure in study["failures"]:
        text = f"failed: {failure['row']}, seed {failure['seed']}: {failure['message']}"
        console.print(text, style="red", markup=False, highlight=False)
    if study["missing"]:
        console.print(f"{len(study['missing'])} runs have no figures; the same command runs them", markup=False)
    for name in ("report.html", "study.json", "study.csv", "pareto.svg"):
        console.print(f"  {out / name}", markup=False, highlight=False, soft_wrap=True)
