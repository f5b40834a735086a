"""The figures of runs for TensorBoard, which is not needed for anything else.

Invariant: the numbers are those of the report.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from compressor.errors import MissingDependencyError
from compressor.report import Report


def scalars(report: Report) -> Iterator[tuple[str, float, int]]:
    """Tag, value and step: learning curves by epoch over all finetune stages, then baseline and result at step 0."""
    done = 0
    for stage in report.stages:
        history = stage["details"].get("history") or []
        for epoch in history:
            step = done + epoch["epoch"] + 1
            for name in ("loss", "val_loss", "val_accuracy", "learning_rate"):
                yield f"training/{name}", epoch[name], step
        done += len(history)
    for which, figures in (("baseline", report.baseline), ("result", report.result)):
        for name, value in figures.to_json().items():
            if isinstance(value, int | float) and math.isfinite(value):
                yield f"{which}/{name}", float(value), 0


def write_tensorboard(reports: Mapping[str, Report], folder: Path) -> None:
    """Write event files, a folder for each run.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"--tensorboard needs the package '{error.name}': pip install tensorboard"
        ) from error
    for name, report in reports.items():
        with SummaryWriter(str(folder / name)) as writer:
            for tag, value, step in scalars(report):
                writer.add_scalar(tag, value, step)
