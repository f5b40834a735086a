"""What people see of a study: names beside marks that can be told apart, a table that keeps its digits."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from compressor import study_chart
from compressor.console import show_study
from compressor.study_figures import row_figures


def study(points: dict[str, tuple[float, float]], published: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Rows of one run each, by name: accuracy and latency in milliseconds."""
    rows = [
        {"name": name, "runs": [{}], "figures": row_figures([{"accuracy": accuracy, "latency_ms": ms}], 860)}
        for name, (accuracy, ms) in points.items()
    ]
    return {
        "title": "Points",
        "objectives": {"maximize": ["accuracy"], "minimize": ["latency_ms"]},
        "rows": rows,
        "pareto_set": [rows[0]["name"]],
        "hypervolume": 0.5,
        "dominated_by": {},
        "published": [
            {"name": name, "source": "arXiv 2403.10569", "figures": {"accuracy": accuracy, "latency_ms": ms}}
            for name, (accuracy, ms) in published.items()
        ],
        "notes": [],
        "failures": [],
        "missing": [],
    }


NEAR = {"efficientnet_lite0-pretrained": (0.92, 1.0), "mobilenetv2-pretrained": (0.921, 1.02), "xception": (0.93, 9.0)}
PUBLISHED = {"Xception": (0.7589, 8.7), "optimised Xception": (0.7621, 8.5)}


def test_names_lie_on_no_other_name_and_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    move = study_chart._move_apart

    def noted(texts: list[Any]) -> None:
        boxes = [text.get_window_extent() for text in texts]
        assert any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), "there is something to move apart"
        move(texts)
        seen.extend(texts)

    monkeypatch.setattr(study_chart, "_move_apart", noted)
    study_chart.study_chart(study(NEAR, PUBLISHED))
    assert len(seen) == 5
    boxes = [text.get_window_extent() for text in seen]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    marks = [text.axes.transData.transform(text.xy) for text in seen]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    panel = seen[0].axes.bbox
    assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 for box in boxes)


def test_a_table_in_a_file_keeps_every_digit(capsys: pytest.CaptureFixture[str]) -> None:
    show_study(study(NEAR, PUBLISHED), Path("out"))
    lines = capsys.readouterr().out.splitlines()
    for mark, name, cells in (
        ("*", "efficientnet_lite0-pretrained", ["1", "92.0", "1.00"]),
        ("", "xception", ["1", "93.0", "9.00"]),
    ):
        (line,) = [line for line in lines if f" {name} " in f" {line} " and line.split()[-1] == cells[-1]]
        assert line.split() == [*([mark] if mark else []), name, *cells]
    assert any(
        "optimised Xception: test accuracy 76.21 %, IR latency 8.5 ms (arXiv 2403.10569)" in line for line in lines
    )
