"""What a person sees while a run works and when it ends.

Invariant: stderr only, but for the final tables on stdout; library code logs, this module alone draws.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from compressor.report import Report


class LiveHandler(logging.Handler):
    """Draws training progress in one live line and prints every other record above it."""

    def __init__(self, progress: Progress, level: int):
        super().__init__(logging.DEBUG)
        self.progress, self.shown_level = progress, level
        self.task = progress.add_task("starting", total=None)

    def emit(self, record: logging.LogRecord) -> None:
        state = getattr(record, "progress", None)
        if state is not None:
            val = "" if state.val_accuracy is None else f"  val {state.val_accuracy:.4f}"
            text = f"epoch {state.epoch}/{state.epochs}  loss {state.loss:.4f}{val}"
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
    with Progress(*columns, console=console, transient=True) as progress:
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


def show_report(report: "Report", run: Path) -> None:
    """Baseline against result, then the verdict and where the artifacts are."""
    console = Console()
    table = Table("", "baseline FP32", "result", "ratio")
    for name, title, scale, form in ROWS:
        before, after = getattr(report.baseline, name), getattr(report.result, name)
        ratio = f"{after / before:.3f}x" if before and after is not None else ""
        table.add_row(title, *("not measured" if v is None else form.format(v * scale) for v in (before, after)), ratio)
    console.print(table)
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
