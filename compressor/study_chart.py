"""The chart of a study: accuracy, or whatever is to be large, against each figure that is to be small.

Invariant: measured rows and published figures never look alike.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.chart import Chart, draw_chart
from compressor.study_figures import in_words
from compressor.study_spec import FIGURES

# Points above or below its mark at which a name may stand, the nearest first.
HEIGHTS = (4, -11, 14, -21, 24, -31, 34, -41)
MARK = 3.5  # points from a mark's middle to its edge
ON_FRONT, DOMINATED, PUBLISHED = "#0072B2", "#999999", "#D55E00"


def study_chart(study: Mapping[str, Any]) -> Chart:
    """Draw what `study.run_study` returned: a panel for each figure to be small, all with the same vertical axis."""
    objectives = study["objectives"]
    upward = objectives["maximize"][0] if objectives["maximize"] else objectives["minimize"][-1]
    across = [name for name in (*objectives["minimize"], *objectives["maximize"]) if name != upward]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(across), sharey=True, squeeze=False)[0]
        names = [_draw(panel, study, name, upward) for panel, name in zip(panels, across, strict=True)]
        panels[0].set_ylabel(_axis(upward))
        panels[0].legend(*_legend(panels), loc="best", fontsize=8)
        figure.draw_without_rendering()  # until then nobody knows where anything is
        for texts in names:
            _move_apart(texts)

    size = (1.0 + 5.5 * len(across), 5.0)
    return draw_chart(study["title"], _description(study, upward, across), size, draw)


def _draw(panel: Any, study: Mapping[str, Any], name: str, upward: str) -> list[Any]:
    """Draw one panel; return the names beside the marks."""
    texts = []
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
        texts.append(_name(panel, row["name"], x["mean"] * unit, y["mean"] * rise, left=x["mean"] > middle))
    for published in study["published"]:
        figures = published["figures"]
        if name in figures and upward in figures:
            x, y = figures[name], figures[upward]
            panel.scatter(
                x * unit,
                y * rise,
                marker="D",
                facecolors="none",
                edgecolors=PUBLISHED,
                label="published, not measured here",
            )
            texts.append(_name(panel, published["name"], x * unit, y * rise, left=x > middle, style="italic"))
    panel.set_xlabel(_axis(name))
    panel.grid(alpha=0.3)
    return texts


def _name(panel: Any, text: str, x: float, y: float, *, left: bool, style: str = "normal") -> Any:
    """A name beside a mark, left or right of it so that it stays inside the panel."""
    return panel.annotate(
        text,
        (x, y),
        xytext=(-5 if left else 5, HEIGHTS[0]),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=8,
        style=style,
    )


def _move_apart(texts: Sequence[Any]) -> None:
    """Move names around their marks until none lies on another name or mark, as far as there is room in the panel."""
    from matplotlib.transforms import Bbox

    marks = [text.axes.transData.transform(text.xy) for text in texts]
    edge = MARK * texts[0].figure.dpi / 72 if texts else 0.0  # places are in pixels
    taken = [Bbox([at - edge, at + edge]) for at in marks]
    for text in texts:
        aside, first = text.xyann[0], text.get_ha()
        sides = ((aside, first), (-aside, "left" if first == "right" else "right"))
        for height, (x, align) in itertools.product(HEIGHTS, sides):
            text.xyann, panel = (x, height), text.axes.bbox
            text.set_ha(align)
            place = text.get_window_extent()
            inside = panel.x0 <= place.x0 and place.x1 <= panel.x1 and panel.y0 <= place.y0 and place.y1 <= panel.y1
            if inside and not any(place.overlaps(other) for other in taken):
                break
        else:
            text.xyann = (aside, HEIGHTS[0])
            text.set_ha(first)
            place = text.get_window_extent()
        taken.append(place)


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
        means = {name: row["figures"][name]["mean"] for name in (upward, *across) if name in row["figures"]}
        if means:
            front = ", in the Pareto set" if row["name"] in study["pareto_set"] else ""
            told.append(f"{row['name']}{front}: {in_words(means)}")
    return "; ".join(told) + "."


def _axis(name: str) -> str:
    return f"{FIGURES[name].label}, {FIGURES[name].unit}"
