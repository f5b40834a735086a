"""Which files a run and a study leave for people, and making them anew from the figures alone.

Invariant: a rebuilt file is what the run wrote, as long as the toolkit is the same; the manifest of a run stays true.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.artifacts import atomic_write, rewrite_listed
from compressor.errors import DataError
from compressor.pages.csv_table import runs_csv
from compressor.pages.markdown import model_card, run_markdown
from compressor.pages.run_page import run_page
from compressor.pages.study_page import side_by_side, study_page
from compressor.pages.tracker import write_tensorboard
from compressor.report import Report, read_report

PAGE = "report.html"


def run_files(report: Report, name: str) -> dict[str, str]:
    """Name of a file to its text."""
    return {
        PAGE: run_page(report, name),
        "report.md": run_markdown(report, name),
        "results.csv": runs_csv({name: report}),
        "model_card.md": model_card(report, name),
    }


def write_run_files(folder: Path, report: Report, name: str) -> None:
    """Write them into a run folder that has no manifest yet."""
    for file, text in run_files(report, name).items():
        atomic_write(folder / file, text)


def rebuild(folders: Sequence[Path], out: Path | None = None, tensorboard: Path | None = None) -> list[Path]:
    """Make the pages of runs and studies anew, and with `out` one that puts the runs side by side, with a table.

    Args:
        folders: Finished runs, or studies.
        out: An .html file; the table is beside it.
        tensorboard: Folder for the runs' figures as TensorBoard reads them.

    Returns:
        The pages.

    Raises:
        DataError: A folder is neither, or there are no two runs to compare.
        MissingDependencyError: TensorBoard is asked for and not installed.
    """
    reports: dict[str, tuple[Path, Report]] = {}
    studies: dict[Path, Mapping[str, Any]] = {}
    for folder in folders:  # all are read before the first is written
        if (folder / "study.json").is_file():
            studies[folder] = _read_study(folder / "study.json")
        else:
            name = _distinct(folder, list(reports))
            reports[name] = folder, read_report(folder / "report.json")
    if out is not None and len(reports) < 2:
        raise DataError(f"--out {out}: found {len(reports)} runs, a comparison needs two or more")
    if tensorboard is not None:
        write_tensorboard({name: report for name, (_, report) in reports.items()}, tensorboard)
    pages = []
    for folder, study in studies.items():
        atomic_write(folder / PAGE, study_page(study))
        pages.append(folder / PAGE)
    for folder, report in reports.values():
        rewrite_listed(folder, run_files(report, folder.resolve().name))
        pages.append(folder / PAGE)
    if out is not None:
        compared = {name: report for name, (_, report) in reports.items()}
        atomic_write(out, study_page(side_by_side(compared)))
        atomic_write(out.with_suffix(".csv"), runs_csv(compared))
        pages.append(out)
    return pages


def _distinct(folder: Path, taken: Sequence[str]) -> str:
    """A name for a run among others: its folder's, with those above it where needed."""
    parts = folder.resolve().parts
    for count in range(1, len(parts)):
        name = "/".join(parts[-count:])
        if name not in taken:
            return name
    raise DataError(f"{folder}: given twice")


def _read_study(path: Path) -> Mapping[str, Any]:
    try:
        study: Mapping[str, Any] = json.loads(path.read_text())
        if study["version"] != 1:
            raise ValueError(f"version {study['version']!r}, this toolkit reads version 1")
        return study
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable study ({error})") from None
