"""The page of a study, and of runs put side by side.

Invariant: made of `study.json` alone, or of the runs' reports.
"""

from collections.abc import Mapping
from typing import Any

from compressor.chart import Chart
from compressor.pages.rendering import render
from compressor.pages.run_page import environment_pairs
from compressor.pages.words import percent
from compressor.report import Report
from compressor.study_chart import study_chart
from compressor.study_figures import compare, in_words, read_mean, row_figures, run_line
from compressor.study_spec import COLUMNS, FIGURES, Objectives


def study_page(study: Mapping[str, Any]) -> str:
    """HTML of one file, of what `study.run_study` returned."""
    named = [name for name in COLUMNS if any(name in row["figures"] for row in study["rows"])]
    rows = []
    for row in study["rows"]:
        mark = "*\u00a0" if row["name"] in study["pareto_set"] else ""
        cells = [read_mean(row["figures"].get(name), FIGURES[name]) for name in named]
        rows.append((mark + row["name"], str(len(row["runs"])), *cells))
    published = [f"{one['name']} ({one['source']}): {in_words(one['figures'])}" for one in study["published"]]
    runs = [
        (
            row["name"],
            str(run["seed"]),
            run["status"] + "".join(f"; {reason}" for reason in run["reasons"]),
            percent(run["figures"].get("accuracy")),
            f"{run['epochs']:.1f}",
            "pretrained" if run["pretrained"] else "random",
        )
        for row in study["rows"]
        for run in row["runs"]
    ]
    return render(
        "study.html",
        title=study["title"],
        complete=not study["missing"] and not study["failures"],
        outcome=outcome(study),
        head=["row", "seeds", *(f"{FIGURES[name].label}, {FIGURES[name].unit}" for name in named)],
        rows=rows,
        drawn=drawn(study),
        dominated=[(name, ", ".join(by)) for name, by in study["dominated_by"].items() if by],
        published=published,
        runs=runs,
        failures=[f"{one['row']}, seed {one['seed']}: {one['message']}" for one in study["failures"]],
        notes=study["notes"],
        environment=environment_pairs(study["environment"]),
    )


def drawn(study: Mapping[str, Any]) -> Chart | None:
    """The Pareto chart; None where no row has figures."""
    if not any(row["figures"] for row in study["rows"]):
        return None
    return study_chart(study)


def outcome(study: Mapping[str, Any]) -> str:
    """The study in one sentence."""
    finished = sum(len(row["runs"]) for row in study["rows"])
    parts = [f"{finished} runs of {len(study['rows'])} rows"]
    if study["missing"]:
        parts.append(f"{len(study['missing'])} runs without figures")
    if study["pareto_set"]:
        parts.append(f"Pareto set: {', '.join(study['pareto_set'])}")
    if study["hypervolume"] is not None:
        parts.append(f"hypervolume {study['hypervolume']:.3f}")
    return "; ".join(parts) + "."


def side_by_side(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Several runs as a study of them, which nothing but their reports is known of.

    Args:
        reports: Name of a run to its report; each becomes a row of one run.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        line = run_line(report, report.recipe["seed"])
        rows[name] = {"name": name, "runs": [line], "figures": row_figures([line["figures"]], line["test_images"])}
    objectives = Objectives.model_validate({"maximize": ["accuracy"], "minimize": ["latency_ms"]})
    notes = ["latency_ms: as each run measured it, at another time than the others"]
    if len({report.data["fingerprint"] for report in reports.values()}) > 1:
        notes.append("the runs were not measured on the same images: accuracies do not compare")
    if len({report.environment["cpu"] for report in reports.values()}) > 1:
        notes.append("the runs were not measured on the same processor: latencies do not compare")
    return {
        "title": "Runs side by side",
        "scale": None,
        "objectives": objectives.model_dump(mode="json"),
        "rows": list(rows.values()),
        **compare({name: row["figures"] for name, row in rows.items()}, objectives),
        "failures": [],
        "missing": [],
        "published": [],
        "environment": next(iter(reports.values())).environment,
        "notes": notes,
    }
