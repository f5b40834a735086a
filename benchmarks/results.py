"""Keep the figures of finished runs in the repository and write the README's table from them.

    python benchmarks/results.py record RUN NAME    store RUN's report as benchmarks/results/NAME.json, one ledger line
    python benchmarks/results.py table              rewrite the table in README.md

Invariant: every figure in the table is copied from a run's `report.json`; nothing is typed by hand. What is stored
names no folder of the machine it was measured on.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from measuring import README, rewrite

from compressor.report import Footprint, Report, images_trained, read_report

HERE = Path(__file__).resolve().parent
# The folders of an absolute path inside a sentence; what precedes it tells it from torch/onnx and from a URL.
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;]+/)+")
KEPT = (
    "verdict",
    "baseline",
    "result",
    "parity",
    "audit",
    "benchmark",
    "data",
    "weights",
    "recipe",
    "environment",
    "timing",
    "notes",
    "recommended",
    "layer_totals",
    "layers",
)


def record(run: Path, name: str) -> None:
    """Store a report without its learning curves, and note that the test split was looked at."""
    report = read_report(run / "report.json")
    data = report.to_json()
    kept: dict[str, Any] = {key: data[key] for key in KEPT if key in data}
    kept["stages"] = [
        {"type": s["type"], "seconds": s["seconds"], "images_trained": images_trained(s), "footprint": s["footprint"]}
        for s in data["stages"]
    ]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(as_text(without_folders(kept)))
    note_in_ledger(report, name)


def note_in_ledger(report: Report, name: str) -> None:
    """A line for each look at a test split."""
    ledger = HERE / "test_ledger.json"
    lines = json.loads(ledger.read_text()) if ledger.is_file() else []
    lines.append(
        {
            "name": name,
            "recipe_hash": report.recipe["hash"],
            "status": report.verdict["status"],
            "baseline_accuracy": report.baseline.accuracy,
            "result_accuracy": report.result.accuracy,
            "test_images": report.benchmark["accuracy"]["test_images"],
        }
    )
    ledger.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")


def as_text(kept: dict[str, Any]) -> str:
    """JSON indented by one, with each layer on one line."""
    text = json.dumps({**kept, "layers": []}, indent=1) + "\n"
    rows = ",\n".join(f"  {json.dumps(row, separators=(',', ':'))}" for row in kept.get("layers", ()))
    # By its indentation it is the key of the report itself.
    return text.replace('\n "layers": []', f'\n "layers": [\n{rows}\n ]', 1) if rows else text


def without_folders(value: Any) -> Any:
    """The same JSON with every absolute path reduced to its file name: folders of one machine tell a reader nothing."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else FOLDERS.sub("", value)
    return value


def table() -> None:
    """Rewrite the README's table from `benchmarks/results/*.json`."""
    rows = [
        "| run | test accuracy | latency, ms | MACs, M | IR size, MB | training peak, MB | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        data = json.loads(path.read_text())
        before, after = (Footprint.from_json(data[key]) for key in ("baseline", "result"))
        cells = [
            _pair(before.accuracy, after.accuracy, "{:.3f}"),
            _pair(before.latency_ms, after.latency_ms, "{:.2f}"),
            _pair(before.macs, after.macs, "{:.0f}", 1e-6),
            _pair(before.size_bytes, after.size_bytes, "{:.1f}", 1e-6),
            _pair(before.train_peak_memory_bytes, after.retrain_peak_memory_bytes, "{:.0f}", 1e-6),
            _epochs(data),
        ]
        rows.append(f"| `{path.stem}` ({data['verdict']['status']}) | {' | '.join(cells)} |")
    rewrite(README, "results", "\n".join(rows) + "\n")


def _epochs(data: dict[str, Any]) -> str:
    """Passes over the training images: the baseline's, and all together."""
    kinds = [stage["type"] for stage in data["stages"]]
    lead = next((i for i, kind in enumerate(kinds) if kind != "finetune"), len(kinds))
    images = [stage["images_trained"] for stage in data["stages"]]
    return _pair(sum(images[:lead]), sum(images), "{:.1f}", 1 / data["data"]["totals"]["train"])


def _pair(before: float | None, after: float | None, form: str, scale: float = 1.0) -> str:
    shown = ["not measured" if value is None else form.format(value * scale) for value in (before, after)]
    return " -> ".join(shown)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="store a run's figures")
    recorder.add_argument("run", type=Path)
    recorder.add_argument("name")
    commands.add_parser("table", help="rewrite the README's table")
    args = parser.parse_args()
    if args.command == "record":
        record(args.run, args.name)
    else:
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
