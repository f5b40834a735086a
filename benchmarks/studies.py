"""Keep what studies found in the repository, write the README's tables from it, and go on with a study elsewhere.

    python benchmarks/studies.py record STUDY_DIR NAME    store a study as benchmarks/studies/NAME, runs in the ledger
    python benchmarks/studies.py restore NAME STUDY_DIR   put its runs' reports back: `study` then runs what is left
    python benchmarks/studies.py table                    rewrite the tables in README.md

Invariant: every figure in a table is copied from a `study.json`; nothing is typed by hand. What is stored names no
folder of the machine it was measured on.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import README, rewrite
from results import note_in_ledger, without_folders

from compressor.pages.study_page import outcome
from compressor.report import read_report
from compressor.study_figures import read_mean
from compressor.study_spec import COLUMNS, FIGURES, folder_of

HERE = Path(__file__).resolve().parent
OPENING = """
Studies put networks side by side that were trained alike, each run in a process of its own, and time all results in
turns. Accuracy: mean of the seeds, ± their deviation, (Wilson's 95 % interval); memory: while the network that is
deployed trains. Bold: in the Pareto set of the study's objectives. `python benchmarks/studies.py table` writes these
tables from `benchmarks/studies/`.
"""
LARGE = ("mistakes", "layers")  # of a report: not needed to go on with a study


def record(study_dir: Path, name: str) -> None:
    """Store a study's figures, chart and reports; of runs that were not stored before, the ledger gets a line."""
    kept = HERE / "studies" / name
    (kept / "runs").mkdir(parents=True, exist_ok=True)
    study = json.loads((study_dir / "study.json").read_text())
    (kept / "study.json").write_text(json.dumps(without_folders(study), indent=1) + "\n")
    for file in ("study.csv", "pareto.svg"):
        shutil.copyfile(study_dir / file, kept / file)
    for row in study["rows"]:
        for run in row["runs"]:
            folder = folder_of(row["name"])
            report = read_report(study_dir / "runs" / folder / f"seed{run['seed']}" / "report.json")
            data = {key: value for key, value in report.to_json().items() if key not in LARGE}
            target = kept / "runs" / f"{folder}.seed{run['seed']}.json"
            text = json.dumps(without_folders(data), separators=(",", ":")) + "\n"
            if not target.is_file() or target.read_text() != text:
                target.write_text(text)
                note_in_ledger(report, f"{name}/{row['name']}/seed{run['seed']}")


def restore(name: str, study_dir: Path) -> None:
    """Put stored reports where `compress.py study --out STUDY_DIR` looks for them."""
    for stored in sorted((HERE / "studies" / name / "runs").glob("*.json")):
        row, seed = stored.stem.rsplit(".", 1)
        target = study_dir / "runs" / row / seed / "report.json"
        if target.exists():
            raise SystemExit(f"{target}: there is a run already; give another folder")
        target.parent.mkdir(parents=True)
        shutil.copyfile(stored, target)


def table_of(study: Mapping[str, Any]) -> str:
    """Markdown: a row of the study in a line, the published figures below, then what came out and what to know."""
    names = [name for name in COLUMNS if any(name in row["figures"] for row in study["rows"])]
    head = [
        "row",
        "seeds",
        "epochs",
        *(f"{FIGURES[name].label}, {FIGURES[name].unit}" for name in names),
        "dominated by",
    ]
    lines = [f"### {study['title']}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in study["rows"]:
        if not row["runs"]:
            continue
        cells = [read_mean(row["figures"].get(name), FIGURES[name]) for name in names]
        if "accuracy" in row["figures"]:
            interval = [f"{100 * row['figures']['accuracy'][end]:.1f}" for end in ("low", "high")]
            cells[names.index("accuracy")] += f" ({' to '.join(interval)})"
        mark = "**" if row["name"] in study["pareto_set"] else ""
        rivals = ", ".join(study["dominated_by"].get(row["name"], ()))
        seeds, epochs = str(len(row["runs"])), f"{row['runs'][0]['epochs']:.1f}"
        lines.append(f"| {' | '.join([mark + row['name'] + mark, seeds, epochs, *cells, rivals])} |")
    for one in study["published"]:
        cells = [
            f"{one['figures'][name] * FIGURES[name].scale:.4g}" if name in one["figures"] else "" for name in names
        ]
        lines.append(f"| *{one['name']}, as published ({one['source']})* | | | {' | '.join(cells)} | |")
    return "\n".join([*lines, "", outcome(study), *(f"- {note}" for note in study["notes"])])


def table() -> None:
    """Rewrite the README's tables from `benchmarks/studies/*/study.json`."""
    studies = [json.loads(path.read_text()) for path in sorted((HERE / "studies").glob("*/study.json"))]
    rewrite(README, "studies", "\n\n".join([OPENING.strip(), *map(table_of, studies)]) + "\n" if studies else "")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="store a study's figures")
    recorder.add_argument("study_dir", type=Path)
    recorder.add_argument("name")
    restorer = commands.add_parser("restore", help="go on with a stored study")
    restorer.add_argument("name")
    restorer.add_argument("study_dir", type=Path)
    commands.add_parser("table", help="rewrite the README's tables")
    args = parser.parse_args()
    if args.command == "record":
        record(args.study_dir, args.name)
    elif args.command == "restore":
        restore(args.name, args.study_dir)
    else:
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
