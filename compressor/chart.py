"""Charts as SVG: of an inspection, what each channel group takes, and what the network is worth without parts of it.

Invariant: the same figures give the same bytes. Text stays text; colours can be told apart by everyone (Okabe and Ito,
jfly.uni-koeln.de/color) and never carry a meaning alone.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from compressor import environment

PRECISIONS = {"fp32": ("FP32", "#0072B2", ""), "int8": ("INT8", "#E69F00", "///")}
MARKS = {0.25: ("o", "#009E73"), 0.5: ("s", "#CC79A7"), 0.75: ("^", "#D55E00")}


@dataclass(frozen=True)
class Chart:
    """A drawing as SVG text, what it shows, the same in words, and how wide it is, inches."""

    title: str
    description: str
    svg: str
    width: float

    @property
    def source(self) -> str:
        """For `<img src=...>`: inside an image nothing can run, and names cannot clash with another drawing's."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode("ascii")


def inspection_chart(inspection: Mapping[str, Any]) -> Chart:
    """Draw what `inspect_recipe` returned: a row for each group in network order, time left, accuracy right."""
    rows = [*inspection["groups"], {"name": "rest", "sensitivity": None, **inspection["rest"]}]
    unpruned = inspection["unpruned"]
    size = (7 if unpruned is None else 11, 1.8 + 0.26 * len(rows))

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 1 if unpruned is None else 2, sharey=True, squeeze=False)[0]
        _draw_times(panels[0], rows, [name for name in PRECISIONS if name in inspection["network"]["ms"]])
        if unpruned is not None:
            _draw_sensitivity(panels[1], rows, unpruned["accuracy"])

    return draw_chart(_title(inspection), _description(inspection, rows), size, draw)


def draw_chart(title: str, description: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Chart:
    """What a function draws on a matplotlib figure.

    Args:
        title: Shown above, and read out.
        description: The chart in words, for whoever cannot see it.
        size: Width and height in inches.
        draw: Gets the figure.
    """
    environment.prepare_process()  # where matplotlib keeps its list of fonts
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compressor", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.suptitle(title, fontsize=11)
        draw(figure)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib (3.11) can put both into metadata only, which nothing reads out.
    words = f'<title id="title">{escape(title)}</title>\n <desc id="desc">{escape(description)}</desc>'
    head, tag, body = drawn.getvalue().partition("<svg ")
    attributes, bracket, body = body.partition(">")
    svg = f'{head}{tag}role="img" aria-labelledby="title desc" {attributes}{bracket}\n {words}{body}'
    return Chart(title, description, svg, size[0])


def _title(inspection: Mapping[str, Any]) -> str:
    height, width = inspection["input"]
    return f"Channel groups of {inspection['recipe'].rpartition('/')[2]} at {width} x {height} pixels"


def _description(inspection: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The chart in words: whole, and where most of the time is."""
    whole = inspection["network"]["ms"]
    parts = [f"{PRECISIONS[name][0]} takes {ms:.3g} ms" for name, ms in whole.items()]
    slowest = sorted(rows, key=lambda row: -row["ms"]["fp32"])[:3]
    text = f"Bars: milliseconds of each of {len(rows) - 1} channel groups and the rest; {' and '.join(parts)} in all. "
    shares = (f"{row['name']} {row['ms']['fp32'] / whole['fp32']:.0%}" for row in slowest)
    text += f"Most of the FP32 time: {', '.join(shares)}."
    if inspection["unpruned"] is not None:
        marks = ", ".join(f"{ratio:.0%}" for ratio in MARKS)
        text += (
            f" Marks: validation accuracy with one group alone pruned by {marks}; "
            f"{inspection['unpruned']['accuracy']:.1%} unpruned."
        )
    return text


def _draw_times(panel: Any, rows: Sequence[Mapping[str, Any]], precisions: Sequence[str]) -> None:
    height = 0.8 / len(precisions)
    for i, name in enumerate(precisions):
        label, colour, hatch = PRECISIONS[name]
        at = [row - 0.4 + height * (i + 0.5) for row in range(len(rows))]
        values = [row["ms"][name] for row in rows]
        panel.barh(at, values, height, label=label, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("latency of the group's layers, ms")
    panel.set_ylabel("channel group, by its first layer")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(loc="best")


def _draw_sensitivity(panel: Any, rows: Sequence[Mapping[str, Any]], unpruned: float) -> None:
    for ratio, (marker, colour) in MARKS.items():
        points = [
            (100 * figure["accuracy"], at)
            for at, row in enumerate(rows)
            for figure in row["sensitivity"] or ()
            if figure["ratio"] == ratio and figure["accuracy"] is not None
        ]
        if points:
            panel.scatter(
                *zip(*points, strict=True), marker=marker, color=colour, label=f"{ratio:.0%} removed", zorder=2
            )
    panel.axvline(100 * unpruned, color="black", linestyle="--", linewidth=1, label="unpruned")
    panel.set_xlabel("validation accuracy with this group alone pruned, %")
    panel.set_xlim(0, 100)
    panel.grid(alpha=0.3)
    panel.legend(loc="best")
