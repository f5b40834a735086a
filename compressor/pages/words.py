"""Figures as people read them, the same in every page.

Invariant: what was not measured reads so, and is never 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from compressor.report import Footprint

UNMEASURED = "not measured"


@dataclass(frozen=True)
class Line:
    """A figure of a footprint: its name there, what it is called, and how it reads."""

    key: str
    title: str
    read: Callable[[float], str]


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction 0..1 in per cent."""
    return UNMEASURED if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """Milliseconds to three figures."""
    return UNMEASURED if value is None else f"{_figures(value)} ms"


def megabytes(value: float | None) -> str:
    """Bytes in MB (10^6)."""
    return UNMEASURED if value is None else f"{_figures(value / 1e6)} MB"


def millions(value: float | None) -> str:
    """A count in millions."""
    return UNMEASURED if value is None else f"{_figures(value / 1e6)} M"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes or seconds."""
    if seconds is None:
        return UNMEASURED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def rate(value: float) -> str:
    """Images a second."""
    return f"{value:.0f} images/s"


FOOTPRINT = (
    Line("accuracy", "test accuracy", percent),
    Line("latency_ms", "latency, one image", milliseconds),
    Line("latency_p95_ms", "latency, 95th percentile", milliseconds),
    Line("latency_default_ms", "latency at OpenVINO's default precision", milliseconds),
    Line("latency_native_ms", "latency at the images' own size", milliseconds),
    Line("throughput_fps", "throughput", rate),
    Line("size_bytes", "size of the IR", megabytes),
    Line("params", "parameters", millions),
    Line("macs", "multiply-accumulates", millions),
    Line("train_time_s", "training, all stages", duration),
    Line("train_avg_memory_bytes", "training memory, mean", megabytes),
    Line("train_peak_memory_bytes", "training memory, peak", megabytes),
    Line("retrain_avg_memory_bytes", "retraining memory, mean", megabytes),
    Line("retrain_peak_memory_bytes", "retraining memory, peak", megabytes),
)


@dataclass(frozen=True)
class Change:
    """A figure of the baseline and of the result, and their ratio, in words."""

    title: str
    before: str
    after: str
    ratio: str


def changes(baseline: Footprint, result: Footprint) -> list[Change]:
    """Baseline against result, line by line; lines that neither has are left out."""
    rows = []
    for line in FOOTPRINT:
        before, after = getattr(baseline, line.key), getattr(result, line.key)
        if before is None and after is None:
            continue
        both = before is not None and after is not None
        if both and line.key == "accuracy":
            ratio = f"{100 * (after - before):+.1f} points"
        else:
            ratio = f"{after / before:.3f}x" if both and before else ""
        told = [UNMEASURED if value is None else line.read(value) for value in (before, after)]
        rows.append(Change(line.title, told[0], told[1], ratio))
    return rows
