"""The figures of runs as a table for spreadsheets.

Invariant: units of the toolkit (bytes, ms, fractions), one line for each run and network; empty = not measured.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping

from compressor.report import Footprint, Report


def runs_csv(reports: Mapping[str, Report]) -> str:
    """Name of a run to its report -> CSV text, with a line for the baseline and one for the result of each."""
    names = [field.name for field in dataclasses.fields(Footprint)]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(
        ["run", "status", "network", *(n for n in names if n != "accuracy_ci"), "accuracy_low", "accuracy_high"]
    )
    for run, report in reports.items():
        for network, figures in (("baseline", report.baseline), ("result", report.result)):
            values = [getattr(figures, name) for name in names if name != "accuracy_ci"]
            low, high = figures.accuracy_ci or (None, None)
            cells = [safe(run), report.verdict["status"], network, *values, low, high]
            table.writerow(["" if cell is None else cell for cell in cells])
    return written.getvalue()


def safe(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
