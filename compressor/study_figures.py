"""The figures of a study: taken from the reports of its runs, averaged over seeds, compared.

Invariant: a figure nobody measured is missing, never 0; published figures are not among the compared ones.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from compressor.metrics import wilson_interval
from compressor.pareto import Figure, Objective, Point, dominated_by, normalised_hypervolume
from compressor.report import Report, images_trained
from compressor.study_spec import FIGURES, FigureKind, Objectives


def figures_of(report: Report) -> dict[str, float]:
    """The figures of one run, see `study_spec.FIGURES`."""
    result = report.result.to_json()
    found: dict[str, Any] = {name: result[name] for name in FIGURES if name in result}
    found["torch_latency_ms"] = report.benchmark.get("torch_eager_ms", {}).get("result_float")
    found["joules_per_image"] = report.benchmark.get("joules_per_image", {}).get("result")
    for kind in ("avg", "peak"):
        again, first = result[f"retrain_{kind}_memory_bytes"], result[f"train_{kind}_memory_bytes"]
        found[f"training_{kind}_memory_bytes"] = first if again is None else again
    trained = [stage for stage in report.stages if stage["details"].get("history")]
    quantized = [stage["index"] for stage in report.stages if stage["type"] == "quantize"]
    floating = [stage for stage in trained if not quantized or stage["index"] < quantized[0]]
    if floating:
        details = floating[-1]["details"]
        seconds = details["time"]["data"] + details["time"]["step"]
        found["epoch_s"] = seconds * report.data["totals"]["train"] / details["images"]
    if trained:
        last = trained[-1]["details"]
        after = last["history"][-1]["seconds"] - _seconds_to_best(last)
        found["best_epoch_s"] = None if result["train_time_s"] is None else result["train_time_s"] - after
    return {name: float(value) for name, value in found.items() if value is not None}


def run_line(report: Report, seed: int) -> dict[str, Any]:
    """One run's line in a study, as plain JSON values."""
    return {
        "seed": seed,
        "status": report.verdict["status"],
        "reasons": report.verdict["reasons"],
        "recipe_hash": report.recipe["hash"],
        "figures": figures_of(report),
        "epochs": sum(images_trained(stage) for stage in report.stages) / report.data["totals"]["train"],
        "test_images": report.benchmark["accuracy"]["test_images"],
        "pretrained": bool(report.weights.get("loaded")),
        "memory_floor_bytes": report.benchmark.get("memory_floor_bytes"),
        "cpu": report.environment.get("cpu"),
    }


def read_mean(figure: Mapping[str, Any] | None, kind: FigureKind) -> str:
    """A mean with its deviation over seeds, as people read it, or nothing where nobody measured."""
    if figure is None:
        return ""
    values = [figure["mean"], *([] if figure["deviation"] is None else [figure["deviation"]])]
    return " ±".join(kind.form.format(value * kind.scale) for value in values)


def in_words(figures: Mapping[str, float]) -> str:
    """Figures with what they are and their units."""
    kinds = ((FIGURES[name], value) for name, value in figures.items())
    return ", ".join(f"{kind.label} {value * kind.scale:.4g} {kind.unit}" for kind, value in kinds)


def _seconds_to_best(details: Mapping[str, Any]) -> float:
    """Seconds into a finetune at which the weights it kept were there; 0 where it kept those it started from."""
    best = details.get("best_epoch")
    seconds = [epoch["seconds"] for epoch in details["history"] if epoch["epoch"] == best]
    return float(seconds[0]) if seconds else 0.0


def row_figures(runs: Sequence[Mapping[str, float]], test_images: int) -> dict[str, dict[str, Any]]:
    """Figures of a row: means over its runs, and how far they can be trusted.

    Args:
        runs: Figures of each seed.
        test_images: That accuracies were measured on.

    Returns:
        Name of a figure to `mean`, `values`, `deviation` (of a sample; None with one run), and `low` and `high`: of an
        accuracy the Wilson interval, all seeds having seen the same test images; of others the range of the values.
    """
    table = {}
    for name in FIGURES:
        values = [run[name] for run in runs if name in run]
        if not values:
            continue
        mean = fmean(values)
        low, high = min(values), max(values)
        if name == "accuracy":
            low, high = wilson_interval(round(mean * test_images), test_images)
        table[name] = {
            "mean": mean,
            "values": values,
            "deviation": stdev(values) if len(values) > 1 else None,
            "low": low,
            "high": high,
        }
    return table


def objectives_of(objectives: Objectives) -> tuple[Objective, ...]:
    """The objectives of a study as the Pareto code takes them."""
    return (
        *(Objective(name, maximize=True) for name in objectives.maximize),
        *(Objective(name) for name in objectives.minimize),
    )


def compare(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], objectives: Objectives) -> dict[str, Any]:
    """Compare rows by their figures.

    Args:
        rows: Name of a row to its figures, see `row_figures`.
        objectives: What makes one better.

    Returns:
        `pareto_set` (names), `dominated_by` (name to names), `hypervolume` (0..1 of the box between the best and the
        worst of each objective), `incomplete` (names of rows that lack a figure that counts).
    """
    told = objectives_of(objectives)
    points: dict[str, Point] = {}
    for name, figures in rows.items():
        if all(objective.name in figures for objective in told):
            chosen = {objective.name: figures[objective.name] for objective in told}
            points[name] = {key: Figure(f["mean"], f["low"], f["high"]) for key, f in chosen.items()}
    rivals = dominated_by(points, told)
    return {
        "pareto_set": [name for name, better in rivals.items() if not better],
        "dominated_by": rivals,
        "hypervolume": normalised_hypervolume(points, told) if points else None,
        "incomplete": [name for name in rows if name not in points],
    }
