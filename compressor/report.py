"""What was measured, as values: footprints and the report of a run.

Invariant: a figure nobody measured is None, never 0; JSON holds exactly what these values hold.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.artifacts import Artifact, write_json
from compressor.errors import DataError

REPORT_VERSION = 1


@dataclass(frozen=True)
class Footprint:
    """What a network costs and gives. Units are in the names; accuracies are fractions 0..1; None = not measured."""

    params: int | None = None
    macs: int | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_default_ms: float | None = None
    latency_native_ms: float | None = None
    throughput_fps: float | None = None
    accuracy: float | None = None
    accuracy_ci: tuple[float, float] | None = None
    val_accuracy: float | None = None
    train_time_s: float | None = None
    train_avg_memory_bytes: int | None = None
    train_peak_memory_bytes: int | None = None
    retrain_avg_memory_bytes: int | None = None
    retrain_peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names of the fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Footprint":
        """Inverse of `to_json`; names a newer version added are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return cls(**values)


@dataclass(frozen=True)
class Report:
    """All a run found out. `verdict` is `{"status": "passed" | "failed", "reasons": [...]}`."""

    verdict: dict[str, Any]
    baseline: Footprint
    result: Footprint
    stages: tuple[dict[str, Any], ...]
    artifacts: tuple[Artifact, ...]
    parity: dict[str, Any]
    audit: dict[str, Any]
    benchmark: dict[str, Any]
    data: dict[str, Any]
    weights: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    timing: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mistakes: dict[str, Any] = field(default_factory=dict)  # of the result on test images: `mistakes.mistakes_of`
    recommended: str | None = None  # the artifact to deploy; None where nothing was published
    layers: tuple[dict[str, Any], ...] = ()  # see `layer_report.compare_layers`
    layer_totals: dict[str, Any] = field(
        default_factory=dict
    )  # of `baseline` and `result`: `layer_report.Costs.totals`
    version: int = REPORT_VERSION

    @property
    def passed(self) -> bool:
        """Whether every gate and budget was met."""
        return bool(self.verdict["status"] == "passed")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names of the fields."""
        return dataclasses.asdict(self)


def images_trained(stage: Mapping[str, Any]) -> int:
    """Images that a stage of a report trained on, each pass counted: itself, and in trainings inside it."""
    details = stage["details"]
    inside = [*details.get("recovery", ()), *filter(None, [details.get("sparsify")])]
    return int(details.get("images", 0)) + sum(int(training["images"]) for training in inside)


def write_report(path: Path, report: Report) -> None:
    """Write `report.json` atomically."""
    write_json(path, report.to_json())


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        DataError: missing, damaged, or of an unknown version.
    """
    try:
        data = json.loads(path.read_text())
        if data["version"] != REPORT_VERSION:
            raise DataError(f"{path}: report version {data['version']}, this toolkit reads version {REPORT_VERSION}")
        fields = {f.name for f in dataclasses.fields(Report)}
        values: dict[str, Any] = {k: v for k, v in data.items() if k in fields}
        values["baseline"] = Footprint.from_json(values["baseline"])
        values["result"] = Footprint.from_json(values["result"])
        values["artifacts"] = tuple(Artifact(**a) for a in values["artifacts"])
        values["stages"] = tuple(values["stages"])
        for name in ("notes", "layers"):  # older reports have no layers
            values[name] = tuple(values.get(name, ()))
        return Report(**values)
    except FileNotFoundError:
        raise DataError(f"{path}: no report; give the folder of a finished run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable report ({error})") from None
