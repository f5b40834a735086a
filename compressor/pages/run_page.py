"""The page of a run: whether to ship, what it costs and gives, and how that was found.

Invariant: made of the report alone, of reports written by older versions too.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from compressor.pages.charts import run_charts
from compressor.pages.rendering import render
from compressor.pages.words import changes, duration, megabytes, millions, percent
from compressor.report import Report

SECTIONS = (
    ("figures", "Figures"),
    ("stages", "Stages"),
    ("charts", "Charts"),
    ("mistakes", "Mistakes"),
    ("layers", "Layers"),
    ("proof", "Parity and audit"),
    ("data", "Data"),
    ("environment", "Environment"),
    ("reproduce", "Reproduce"),
)
SHOWN_CONFUSIONS = 12
COMMAND = "python compress.py RUN/recipe.yaml    # RUN = the run's folder\npython compress.py verify RUN"


def run_page(report: Report, name: str) -> str:
    """HTML of one file, which needs no network.

    Args:
        report: Of the run.
        name: Of the run, for people.
    """
    mistakes = report.mistakes
    labels = report.data["labels"]
    confusions = [(labels[a], labels[b], str(n)) for a, b, n in mistakes.get("confusions", ())[:SHOWN_CONFUSIONS]]
    worst = [
        {**one, "label": labels[one["label"]], "named": labels[one["named"]], "confidence": percent(one["confidence"])}
        for one in mistakes.get("worst", ())
    ]
    return render(
        "run.html",
        name=name,
        verdict=report.verdict["status"],
        summary=summary(report),
        reasons=report.verdict["reasons"],
        deploy=deploy(report),
        sections=[s for s in SECTIONS if s[0] != "mistakes" or confusions or worst],
        figures=[(row.title, row.before, row.after, row.ratio) for row in changes(report.baseline, report.result)],
        comparability=measured_on(report),
        notes=report.notes,
        stages=stage_rows(report),
        charts=run_charts(report),
        confusions=confusions,
        worst=worst,
        calibration=calibration(report),
        reorders=reorders(report),
        layers=layer_rows(report),
        parity=parity_rows(report.parity),
        audit=audit_rows(report.audit),
        data=data_pairs(report),
        environment=environment_pairs(report.environment),
        command=COMMAND,
        recipe=recipe_text(report),
    )


def summary(report: Report) -> str:
    """The verdict in one sentence."""
    before, after = report.baseline, report.result
    parts = []
    if before.latency_ms and after.latency_ms:
        parts.append(f"{before.latency_ms / after.latency_ms:.1f} times as fast")
    if before.size_bytes and after.size_bytes:
        parts.append(f"{megabytes(after.size_bytes)} against {megabytes(before.size_bytes)} large")
    if before.accuracy is not None and after.accuracy is not None:
        parts.append(f"test accuracy {percent(before.accuracy)} before, {percent(after.accuracy)} after")
    return f"The result is {', '.join(parts)}." if parts else ""


def deploy(report: Report) -> str:
    """Which file to ship, and why; empty where nothing was published."""
    if not report.recommended:
        return ""
    gain = report.benchmark.get("int8_gain")
    if gain is None:
        return f"{report.recommended}, the only network there is."
    better = "int8" in report.recommended
    reason = f"INT8 is {gain:.2f} times as fast as float on this CPU"
    return f"{report.recommended}, for {reason}." if better else f"{report.recommended}, the float network: {reason}."


def measured_on(report: Report) -> str:
    """Where and how latencies were measured."""
    latency = report.benchmark["latency"]["result"]
    return (
        f"Published IRs on {report.environment['cpu']}, {latency['threads']} threads, median of {latency['calls']} "
        "single requests in turns; the baseline at float32, the result at OpenVINO's default precision."
    )


def calibration(report: Report) -> str:
    """How far confidence can be believed; empty where it was not measured."""
    error = report.benchmark["accuracy"].get("calibration_error")
    return "" if error is None else f"Expected calibration error of the result: {error:.3f}."


def stage_rows(report: Report) -> list[tuple[str, ...]]:
    """What each stage left."""
    rows: list[tuple[str, ...]] = []
    for stage in report.stages:
        left = stage["footprint"]
        again = ", taken from an earlier run" if stage.get("reused") else ""
        rows.append(
            (
                f"[{stage['index']}] {stage['type']}",
                millions(left["params"]),
                millions(left["macs"]),
                percent(left["val_accuracy"]),
                duration(stage["seconds"]) + again,
            )
        )
    return rows


def reorders(report: Report) -> str:
    """Changes of layout, which INT8 pays for."""
    if not report.layer_totals:
        return ""
    counts = [
        str(sum(entry["count"] for entry in report.layer_totals[name]["reorders"].values()))
        for name in ("baseline", "result")
    ]
    return f"Changes of layout or precision between layers: {counts[0]} in the baseline, {counts[1]} in the result."


def layer_rows(report: Report) -> list[tuple[str, ...]]:
    """Every layer, before and after."""
    rows: list[tuple[str, ...]] = []
    for layer in report.layers:
        pair = layer["baseline"], layer["result"]

        def both(form: Any, pair: tuple[Any, Any] = pair) -> str:
            told = ["gone" if one is None else form(one) for one in pair]
            return told[0] if told[0] == told[1] else " -> ".join(told)

        rows.append(
            (
                layer["layer"],
                layer["kind"],
                both(lambda one: f"{one['in']} x {one['out']}"),
                both(lambda one: f"{one['macs'] / 1e6:.1f}"),
                both(lambda one: "unknown" if one["ms"] is None else f"{one['ms']:.3f}"),
                both(lambda one: "unknown" if one["share"] is None else f"{one['share']:.1%}"),
                both(lambda one: one["precision"] or "unknown"),
            )
        )
    return rows


def parity_rows(parity: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Each pair of executions that were compared."""
    rows: list[tuple[str, ...]] = []
    for which in ("baseline", "float", "int8"):
        for pair, found in parity.get(which, {}).get("pairs", {}).items():
            rows.append(
                (
                    f"{which}: {pair.replace('/', ' and ')}",
                    str(parity["images"]),
                    "NaN or infinite" if found["difference"] is None else f"{found['difference']:.2g}",
                    percent(found["agreement"], 2),
                    str(found["undecided"]),
                )
            )
    return rows


def audit_rows(audit: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Convolutions and reorders by precision."""

    def told(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count} {precision}" for precision, count in counts.items()) or "none"

    return [(name, told(found["convolutions"]), told(found["reorders"])) for name, found in audit.items()]


def data_pairs(report: Report) -> list[tuple[str, str]]:
    """What was learnt from and what was measured on."""
    totals = report.data["totals"]
    weights = report.weights
    size = report.data.get("native_size")
    found = [
        ("source", str(report.data["source"])),
        ("classes", str(len(report.data["labels"]))),
        ("images", ", ".join(f"{totals[part]} {part}" for part in ("train", "val", "test"))),
        ("fingerprint", report.data["fingerprint"]),
        ("weights", str(weights["source"]) + (f", sha256 {weights['sha256']}" if weights["sha256"] else "")),
    ]
    return [*found, ("median size", f"{size[1]} x {size[0]} pixels")] if size else found


def environment_pairs(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine and the versions."""
    trained = []
    if "training_device" in environment:  # of a run; a study is no training
        trained.append(("training", f"{environment['training_device']}, {environment['torch_threads']} threads"))
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    return [
        ("processor", f"{environment['cpu']}, {environment['cpus']} cores"),
        ("instructions", ", ".join(environment["isa"]) or "none of those that matter"),
        ("system", environment["platform"]),
        *trained,
        ("versions", versions),
    ]


def recipe_text(report: Report) -> str:
    """The resolved recipe as YAML."""
    recipe = {key: value for key, value in report.recipe.items() if key != "hash"}
    return f"# hash {report.recipe['hash']}\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
