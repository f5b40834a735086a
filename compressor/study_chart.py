"""The chart of a study: accuracy, or whatever is to be large, against each figure that is to be small.

Invariant: measured rows and published figures never look alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compressor.chart import Chart, draw_chart
from compressor.study_spec import FIGURES

ON_FRONT, DOMINATED, PUBLISHED = "#0072B2", "#999999", "#D55E00"


def study_chart(study: Mapping[str, Any]) -> Chart:
    """Draw what `study.run_study` returned: a panel for each figure to be small, all with the same vertical axis."""
    objectives = study["objectives"]
    upward = objectives["maximize"][0] if objectives["maximize"] else objectives["minimize"][-1]
    across = [name for name in (*objectives["minimize"], *objectives["maximize"]) if name != upward]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(across), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, across, strict=True):
            _draw(panel, study, name, upward)
        panels[0].set_ylabel(_axis(upward))
        panels[0].legend(*_legend(panels), loc="best", fontsize=8)

    size = (1.0 + 5.5 * len(across), 5.0)
    return draw_chart(study["title"], _description(study, upward, across), size, draw)


def _draw(panel: Any, study: Mapping[str, Any], name: str, upward: str) -> None:
    unit, rise = FIGURES[name].scale, FIGURES[upward].scale
    values = [row["figures"][name]["mean"] for row in study["rows"] if name in row["figures"]]
    middle = (min(values, default=0.0) + max(values, default=0.0)) / 2
    for row in study["rows"]:
        figures = row["figures"]
        if name not in figures or upward not in figures:
            continue
        front = row["name"] in study["pareto_set"]
        x, y = figures[name], figures[upward]
        panel.errorbar(
            x["mean"] * unit,
            y["mean"] * rise,
            xerr=[[(x["mean"] - x["low"]) * unit], [(x["high"] - x["mean"]) * unit]],
            yerr=[[(y["mean"] - y["low"]) * rise], [(y["high"] - y["mean"]) * rise]],
            marker="o" if front else "x",
            color=ON_FRONT if front else DOMINATED,
            linestyle="none",
            elinewidth=0.8,
            label="Pareto set" if front else "dominated",
        )
        left = x["mean"] > middle  # names stay inside the panel
        panel.annotate(
            row["name"],
            (x["mean"] * unit, y["mean"] * rise),
            xytext=(-5 if left else 5, 4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
        )
    for published in study["published"]:
        figures = published["figures"]
        if name in figures and upward in figures:
            at = figures[name] * unit, figures[upward] * rise
            panel.scatter(
                *at, marker="D", facecolors="none", edgecolors=PUBLISHED, label="published, not measured here"
            )
            panel.annotate(
                published["name"], at, xytext=(5, -10), textcoords="offset points", fontsize=8, style="italic"
            )
    panel.set_xlabel(_axis(name))
    panel.grid(alpha=0.3)


def _legend(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each kind of mark once, wherever it is."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _description(study: Mapping[str, Any], upward: str, across: Sequence[str]) -> str:
    """The chart in words."""
    told = []
    for row in study["rows"]:
        values = [_in_words(name, row["figures"][name]["mean"]) for name in (upward, *across) if name in row["figures"]]
        if values:
            front = ", in the Pareto set" if row["name"] in study["pareto_set"] else ""
            told.append(f"{row['name']}{front}: {', '.join(values)}")
    return "; ".join(told) + "."


def _axis(name: str) -> str:
    return f"{FIGURES[name].label}, {FIGURES[name].unit}"


def _in_words(name: str, value: float) -> str:
    kind = FIGURES[name]
    return f"{kind.label} {value * kind.scale:.4g} {kind.unit}"
