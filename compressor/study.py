"""Run a study: every run in a process of its own, one after the other or several at once; then compare them.

Invariant: what is finished stays finished. A run that fails is listed with its reason and leaves the others alone.
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressor import environment
from compressor.artifacts import atomic_write, write_json
from compressor.benchmark import Candidate, candidates_of, measure_latency, random_images
from compressor.errors import DataError, RecipeError
from compressor.pages.study_page import study_page
from compressor.report import Report, read_report
from compressor.study_chart import study_chart
from compressor.study_figures import compare, row_figures, run_line
from compressor.study_processes import BUDGET_MISSED, run_all
from compressor.study_spec import FIGURES, LoadedStudy, PlannedRun, load_study

log = logging.getLogger(__name__)

STUDY_VERSION = 1
TURNS = 100  # timed calls of each published IR, in turns


@dataclass(frozen=True)
class Finished:
    """A run that has a report."""

    planned: PlannedRun
    folder: Path
    report: Report


@dataclass(frozen=True)
class Failure:
    """A run that has none."""

    planned: PlannedRun
    exit_code: int
    message: str


def run_study(
    path: Path,
    study_dir: Path,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Run what is not there yet of a study, and compare all that is.

    A run is there if `STUDY_DIR/runs/ROW/seedN/report.json` is, for the very recipe that the study asks for; the other
    files of the run are only needed to time all results in turns. What was interrupted goes on from its last finished
    stage.

    Args:
        path: The study's file.
        study_dir: Folder for the runs, their logs, `study.json`, `study.csv` and `pareto.svg`; made if need be.
        scale: One of the study's scales.
        overrides: `PATH=VALUE` texts for every recipe.
        jobs: Runs at once. Times and latencies measured beside other runs are not comparable; a note says so.
        device: Where to train.
        force: Run again what is there for another recipe, instead of refusing.

    Returns:
        What `study.json` holds.

    Raises:
        RecipeError: The study is wrong, or `study_dir` has runs of other recipes.
    """
    loaded = load_study(path, scale=scale, overrides=overrides)
    folders = {planned: study_dir / "runs" / planned.folder / f"seed{planned.seed}" for planned in loaded.runs}
    if not force:
        _refuse_strangers(folders)
    (study_dir / "logs").mkdir(parents=True, exist_ok=True)
    left = [planned for planned in loaded.runs if _report_of(planned, folders[planned]) is None]
    log.info("%s: %d runs, %d of them left", loaded.study.title, len(folders), len(left))
    failures = []
    with closing(run_all(left, folders, study_dir / "logs", jobs=jobs, device=device)) as ended:
        for done, (planned, code, message) in enumerate(ended, 1):
            log.info("%d of %d: %s, seed %d: %s", done, len(left), planned.row, planned.seed, message)
            if code not in (0, BUDGET_MISSED):
                failures.append(Failure(planned, code, message))
            _publish(loaded, folders, failures, study_dir, jobs, final=False)
    return _publish(loaded, folders, failures, study_dir, jobs, final=True)


def _report_of(planned: PlannedRun, folder: Path) -> Report | None:
    """The report of a run, if there is one for this very recipe."""
    if not (folder / "report.json").is_file():
        return None
    report = read_report(folder / "report.json")
    return report if report.recipe["hash"] == planned.hash_with(report.recipe["input"]) else None


def _refuse_strangers(folders: Mapping[PlannedRun, Path]) -> None:
    strangers = [
        folder
        for planned, folder in folders.items()
        if (folder / "report.json").is_file() and _report_of(planned, folder) is None
    ]
    if strangers:
        raise RecipeError(
            f"{strangers[0]}{f' and {len(strangers) - 1} more' if strangers[1:] else ''}: finished for another recipe "
            "than the study has now; --force runs it again, --out takes another folder"
        )


def _publish(
    loaded: LoadedStudy,
    folders: Mapping[PlannedRun, Path],
    failures: Sequence[Failure],
    study_dir: Path,
    jobs: int,
    *,
    final: bool,
) -> dict[str, Any]:
    """Write what is known so far."""
    finished = [
        Finished(planned, folder, report)
        for planned, folder in folders.items()
        if (report := _report_of(planned, folder)) is not None
    ]
    study = study_json(loaded, finished, failures, jobs, _timed_in_turns(finished) if final else None)
    write_json(study_dir / "study.json", study)
    atomic_write(study_dir / "study.csv", as_csv(study))
    if any(row["figures"] for row in study["rows"]):
        atomic_write(study_dir / "pareto.svg", study_chart(study).svg)
    atomic_write(study_dir / "report.html", study_page(study))
    return study


def _timed_in_turns(finished: Sequence[Finished]) -> dict[str, float] | None:
    """Median latency of each row's IR, all timed in turns in one process; None where an IR is not at hand.

    The first seed's: the clock does not mind which weights a network has.
    """
    candidates: dict[str, Candidate] = {}
    try:
        for run in finished:
            if run.planned.row not in candidates:
                result = candidates_of(run.folder)["result"]
                candidates[run.planned.row] = replace(result, images=random_images(result.xml))
    except DataError as error:
        log.warning("results are not timed in turns: %s", error)
        return None
    if not candidates:
        return None
    images = next(iter(candidates.values())).images
    assert images is not None
    return {row: timed.median_ms for row, timed in measure_latency(candidates, images, calls=TURNS).items()}


def study_json(
    loaded: LoadedStudy,
    finished: Sequence[Finished],
    failures: Sequence[Failure],
    jobs: int,
    in_turns: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What a study found out, as plain JSON values.

    Args:
        loaded: The study.
        finished: Runs with reports.
        failures: Runs without.
        jobs: Runs at once.
        in_turns: Latencies of the rows measured together; they replace those that each run measured for itself.
    """
    notes = []
    if jobs > 1:
        notes.append(f"{jobs} runs at once: times of training were measured beside each other")
    if in_turns is None:
        notes.append("latency_ms: as each run measured it, at another time than the others")
    for run in finished:
        if not run.report.passed:
            reasons = "; ".join(run.report.verdict["reasons"])
            notes.append(f"{run.planned.row}, seed {run.planned.seed}: missed {reasons}")
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(planned.row for planned in loaded.runs):
        runs = [run for run in finished if run.planned.row == name]
        told = [run_line(run.report, run.planned.seed) for run in runs]
        for line in told:
            line["figures"] |= {} if in_turns is None else {"latency_ms": in_turns[name]}
        images = {run["test_images"] for run in told}
        figures = row_figures([run["figures"] for run in told], min(images)) if told else {}
        rows[name] = {"name": name, "runs": told, "figures": figures}
    epochs = {name: run["epochs"] for name, row in rows.items() for run in row["runs"][:1]}
    if epochs and max(epochs.values()) > 1.05 * min(epochs.values()):
        least, most = min(epochs, key=epochs.__getitem__), max(epochs, key=epochs.__getitem__)
        notes.append(
            f"rows were not trained equally long: {least} {epochs[least]:.1f} epochs, {most} {epochs[most]:.1f}"
        )
    comparison = compare({name: row["figures"] for name, row in rows.items()}, loaded.study.objectives)
    return {
        "version": STUDY_VERSION,
        "title": loaded.study.title,
        "scale": loaded.scale,
        "objectives": loaded.study.objectives.model_dump(mode="json"),
        "rows": list(rows.values()),
        **comparison,
        "failures": [
            {"row": f.planned.row, "seed": f.planned.seed, "exit_code": f.exit_code, "message": f.message}
            for f in failures
        ],
        "missing": [
            {"row": planned.row, "seed": planned.seed}
            for planned in loaded.runs
            if planned not in [run.planned for run in finished]
        ],
        "published": [p.model_dump(mode="json") for p in loaded.study.published],
        "environment": environment.describe(),
        "notes": notes,
    }


def as_csv(study: Mapping[str, Any]) -> str:
    """One line for each run, with the units in the names of the columns."""
    table = io.StringIO()
    names = ["row", "seed", "status", "epochs", *FIGURES]
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    for row in study["rows"]:
        for run in row["runs"]:
            start = {"row": row["name"], "seed": run["seed"], "status": run["status"], "epochs": run["epochs"]}
            writer.writerow({**start, **run["figures"]})
    return table.getvalue()
