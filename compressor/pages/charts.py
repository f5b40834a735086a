"""Charts of one run, each with a description for whoever cannot see it.

Invariant: colours can be told apart by everyone (Okabe and Ito) and never carry a meaning alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.chart import Chart, draw_chart
from compressor.report import Report

BEFORE, AFTER, THIRD = "#0072B2", "#E69F00", "#009E73"
MOST_LAYERS, MOST_CLASSES = 24, 40


def run_charts(report: Report) -> list[Chart]:
    """All that a report holds figures for."""
    drawn = [learning_curves(report), layer_times(report), confusion_matrix(report), memory_over_time(report)]
    return [chart for chart in (*drawn, time_of_the_run(report)) if chart is not None]


def learning_curves(report: Report) -> Chart | None:
    """Validation accuracy and losses over the epochs of all finetune stages, one after the other."""
    trained = [stage for stage in report.stages if stage["details"].get("history")]
    if not trained:
        return None

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        done = 0
        for stage in trained:
            history = stage["details"]["history"]
            at = [done + epoch["epoch"] + 1 for epoch in history]
            first = stage is trained[0]
            above.plot(at, [100 * epoch["val_accuracy"] for epoch in history], "o-", color=THIRD, markersize=3)
            for key, colour, mark, label in (
                ("loss", BEFORE, "s-", "training"),
                ("val_loss", AFTER, "^-", "validation"),
            ):
                losses = [epoch[key] for epoch in history]
                below.plot(at, losses, mark, color=colour, markersize=3, label=label if first else None)
            for panel in (above, below):
                panel.axvline(done + 0.5, color="grey", linewidth=0.8, linestyle=":")
            above.annotate(
                f"[{stage['index']}]", (done + 0.6, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8
            )
            done += len(history)
        above.set_ylabel("validation accuracy, %")
        above.set_ylim(top=min(above.get_ylim()[1], 100.5))
        below.set_ylabel("loss")
        below.set_xlabel("epoch, over the finetune stages; [i] = stages[i]")
        below.set_yscale("log")
        below.legend(fontsize=8)
        for panel in (above, below):
            panel.grid(alpha=0.3)

    ends = [(stage["index"], stage["details"]["history"][-1]) for stage in trained]
    told = "; ".join(
        f"stages[{index}] ended at {100 * last['val_accuracy']:.1f} % and a validation loss of {last['val_loss']:.3g}"
        for index, last in ends
    )
    return draw_chart("Learning curves", f"Validation accuracy and losses by epoch. {told}.", (8, 5), draw)


def layer_times(report: Report) -> Chart | None:
    """Milliseconds of the layers that took most of the baseline's time, before and after."""
    timed = [row for row in report.layers if row["baseline"] and row["baseline"]["ms"]]
    slowest = sorted(timed, key=lambda row: -row["baseline"]["ms"])[:MOST_LAYERS]
    if not slowest:
        return None
    after = [(row["result"] or {}).get("ms") for row in slowest]

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        places = range(len(slowest))
        before = [row["baseline"]["ms"] for row in slowest]
        panel.barh([p - 0.2 for p in places], before, 0.4, color=BEFORE, label="baseline, FP32")
        panel.barh([p + 0.2 for p in places], [ms or 0 for ms in after], 0.4, color=AFTER, hatch="///", label="result")
        for place, row, ms in zip(places, slowest, after, strict=True):
            if ms is None:
                panel.annotate("gone" if row["result"] is None else "unknown", (0, place + 0.35), fontsize=7)
        panel.set_yticks(places, [row["layer"] for row in slowest])
        panel.set_ylim(len(slowest) - 0.5, -0.5)
        panel.set_xlabel("time in one image, ms")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(fontsize=8)

    told = "; ".join(
        f"{row['layer']} {row['baseline']['ms']:.3g} ms, then {'gone' if row['result'] is None else _ms(ms)}"
        for row, ms in list(zip(slowest, after, strict=True))[:5]
    )
    title = f"Time of the {len(slowest)} slowest layers"
    return draw_chart(
        title, f"{title} of the baseline, before and after. {told}.", (8, 1.4 + 0.24 * len(slowest)), draw
    )


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} ms"


def confusion_matrix(report: Report) -> Chart | None:
    """Which class is taken for which: of the classes with most mistakes, where there are many."""
    mistakes = report.mistakes
    labels: Sequence[str] = report.data["labels"]
    if not mistakes or not mistakes["confusions"]:
        return None
    wrong = [0] * len(labels)
    for label, named, count in mistakes["confusions"]:
        wrong[label] += count
        wrong[named] += count
    shown = sorted(sorted(range(len(labels)), key=lambda i: -wrong[i])[:MOST_CLASSES])
    place = {index: i for i, index in enumerate(shown)}
    table = [[0] * len(shown) for _ in shown]
    for index in shown:
        table[place[index]][place[index]] = mistakes["right"][index]
    for label, named, count in mistakes["confusions"]:
        if label in place and named in place:
            table[place[label]][place[named]] = count

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        image = panel.imshow(table, cmap="cividis", norm="symlog", interpolation="nearest")
        names = [labels[i] if len(labels[i]) <= 18 else labels[i][:17] + "…" for i in shown]
        panel.set_xticks(range(len(shown)), names, rotation=90, fontsize=7)
        panel.set_yticks(range(len(shown)), names, fontsize=7)
        panel.set_xlabel("named")
        panel.set_ylabel("is")
        if len(shown) <= 12:
            for i, row in enumerate(table):
                for j, count in enumerate(row):
                    panel.text(j, i, str(count), ha="center", va="center", color="white", fontsize=8)
                    panel.texts[-1].set_bbox({"facecolor": "black", "alpha": 0.45, "linewidth": 0, "pad": 1})
        figure.colorbar(image, label="test images")

    side = 3.2 + 0.17 * len(shown)
    told = "; ".join(f"{labels[a]} taken for {labels[b]} {n} times" for a, b, n in mistakes["confusions"][:5])
    some = "" if len(shown) == len(labels) else f" of the {len(shown)} classes with most mistakes"
    return draw_chart(
        "Confusion matrix", f"Test images by class and by what they were named{some}. {told}.", (side + 1, side), draw
    )


def memory_over_time(report: Report) -> Chart | None:
    """Resident memory while stages train, one after the other."""
    trained = [stage for stage in report.stages if stage["details"].get("memory_over_time", {}).get("bytes")]
    if not trained:
        return None
    floor: float | None = report.benchmark.get("memory_floor_bytes")

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        start = 0.0
        for stage in trained:
            series: Mapping[str, list[float]] = stage["details"]["memory_over_time"]
            at = [(start + seconds) / 60 for seconds in series["seconds"]]
            panel.step(at, [size / 1e6 for size in series["bytes"]], where="post", color=BEFORE)
            panel.axvline(start / 60, color="grey", linewidth=0.8, linestyle=":")
            panel.annotate(
                f"[{stage['index']}]", (start / 60, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8
            )
            start += series["seconds"][-1]
        if floor:
            panel.axhline(floor / 1e6, color=AFTER, linestyle="--", linewidth=1, label="an interpreter with torch")
            panel.legend(fontsize=8)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("minutes of training; [i] = stages[i]")
        panel.set_ylabel("resident memory, MB")
        panel.grid(alpha=0.3)

    told = "; ".join(
        f"stages[{stage['index']}] at most {max(stage['details']['memory_over_time']['bytes']) / 1e6:.0f} MB"
        for stage in trained
    )
    return draw_chart(
        "Memory while training", f"Resident memory over time, the teacher's included. {told}.", (8, 3.2), draw
    )


def time_of_the_run(report: Report) -> Chart | None:
    """Where the time of the run went."""
    spent = {name: seconds for name, seconds in report.timing.items() if name != "total"}
    if not spent:
        return None
    slowest = sorted(spent, key=lambda name: -spent[name])[:12]
    slowest = [name for name in spent if name in slowest]  # in the order of the run

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.barh(range(len(slowest)), [spent[name] / 60 for name in slowest], color=BEFORE)
        panel.set_yticks(range(len(slowest)), slowest)
        panel.set_ylim(len(slowest) - 0.5, -0.5)
        panel.set_xlabel("minutes")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)

    whole = report.timing.get("total") or sum(spent.values())
    most = sorted(spent, key=lambda name: -spent[name])[:3]
    told = ", ".join(f"{name} {spent[name] / max(whole, 1e-9):.0%}" for name in most)
    return draw_chart(
        "Where the time went", f"Minutes of each part of the run. Most: {told}.", (8, 1.2 + 0.26 * len(slowest)), draw
    )
