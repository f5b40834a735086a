"""What the benchmarks share: things timed in turns, the file their figures are kept in, and the README's tables.

Invariant: things that are compared are measured in turns within one process, so that a change of the load of the
machine falls on all of them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compressor import environment
from compressor.artifacts import write_json

README = Path(__file__).resolve().parents[1] / "README.md"


def in_turns(works: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of each work: once each uncounted, then `rounds` times in turns.

    A work that returns a number says itself how many of its seconds count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            counted = work()
            if turn:
                seconds[name].append(time.perf_counter() - started if counted is None else counted)
    return seconds


def summary(values: list[float]) -> dict[str, Any]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


def growth(sizes: list[float], costs: list[float]) -> dict[str, float]:
    """How a cost grows with a size: exponent of the power law through the points, 1 = linear, and the straight line.

    Returns:
        `exponent`; `per_unit` and `fixed` of the least-squares line; `worst_error`, its largest relative deviation.
    """
    exponent = float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
    slope, fixed = np.polyfit(sizes, costs, 1)
    line = slope * np.asarray(sizes) + fixed
    worst = float(np.max(np.abs(line / np.asarray(costs) - 1)))
    return {"exponent": exponent, "per_unit": float(slope), "fixed": float(fixed), "worst_error": worst}


def keep(output: Path | None, figures: Mapping[str, Any]) -> None:
    """Print the figures; write them with the machine they were measured on, if a file is named."""
    print(json.dumps(figures, indent=1))
    if output:
        machine = {**environment.describe(), "torch_threads": torch.get_num_threads()}
        write_json(output, {**figures, "environment": machine})


def rewrite(page: Path, name: str, text: str) -> None:
    """Put Markdown between the page's comments `NAME: begin` and `NAME: end`, in place of what is there."""
    begin, end = (f"<!-- {name}: {side} -->" for side in ("begin", "end"))
    head, rest = page.read_text().split(begin)
    page.write_text(f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")
