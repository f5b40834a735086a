"""Walk a newcomer's path on images that no recipe knows, and write down what was typed, what came and how long it took.

    python examples/walkthrough.py docs/walkthrough.md            # six to twelve minutes on two cores

The words between the commands are those of walkthrough.template.md; the rest of the page, and its pictures in
docs/walkthrough/, are what the commands gave.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from compressor.pages.charts import confusion_matrix, layer_times, learning_curves
from compressor.report import read_report

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("walkthrough.template.md")
OURS = ("compress.py", "examples/steel_surfaces.py")
PICTURES = {"curves": learning_curves, "layers": layer_times, "confusion": confusion_matrix}
PROMPT, CODE = "$ ", "# exit code "
MOST_LINES = 120  # of a command's output on the page
SMALL = ["input.size=96", "stages[0].epochs=10", "stages[1].recovery.steps=20", "stages[2].epochs=10"]


def typed(line: str, folder: Path) -> tuple[str, float]:
    """Type a command in `folder`: what it prints, and the seconds it took.

    Raises:
        SystemExit: It ended with another exit code than the line says.
    """
    command, _, code = line.partition(CODE)
    words = {"python": sys.executable} | {name: str(REPOSITORY / name) for name in OURS}
    print(line, flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [words.get(word, word) for word in shlex.split(command.removeprefix(PROMPT))],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != int(code or 0):
        raise SystemExit(f"{line}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout.replace(f"{folder}/", "").replace(f"{REPOSITORY}/", ""), seconds


def walked(template: str, folder: Path, names: Mapping[str, str]) -> str:
    """The page: the template, with what each command printed below it."""
    page, whole = [], 0.0
    for line in template.splitlines():
        if not line.startswith(PROMPT):
            page.append(line)
            continue
        line = line.format(**names)
        output, seconds = typed(line, folder)
        whole += seconds
        shown = [row.rstrip() for row in output.strip().splitlines()]
        if len(shown) > MOST_LINES:
            half = MOST_LINES // 2
            shown = [*shown[:half], f"[{len(shown) - 2 * half} lines more]", *shown[-half:]]
        page += ["```", line, *shown, "```", f"*{seconds:.1f} s*"]
    return "\n".join([*page, "", f"All commands together: {whole / 60:.1f} minutes."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--model", default="xception")
    parser.add_argument("--train", type=int, default=48, help="images of each class")
    parser.add_argument("--test", type=int, default=16, help="images of each class")
    parser.add_argument("--floor", default="0.5", help="the least accuracy that is good enough")
    parser.add_argument("--set", dest="changes", action="append", help="what makes the run small")
    args = parser.parse_args()
    pictures = args.page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    small = " ".join(f"--set {change}" for change in args.changes or SMALL)
    names = {"train": str(args.train), "test": str(args.test), "first": f"{args.train:03d}", "model": args.model}
    names |= {"small": small, "floor": args.floor}
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room).resolve()
        os.environ["COMPRESSOR_CACHE"] = str(folder / "cache")
        page = walked(TEMPLATE.read_text(), folder, names)
        report = read_report(folder / "runs" / "steel" / "report.json")
        (pictures / "steel.png").write_bytes((folder / "steel.png").read_bytes())
    for name, draw in PICTURES.items():
        chart = draw(report)
        assert chart is not None, "a run has figures for all three"
        (pictures / f"{name}.svg").write_text(chart.svg)
    machine = report.environment
    named = f"Machine: {machine['cpu']}, {machine['cpus']} CPUs, {', '.join(machine['isa'])}."
    args.page.write_text(f"{page} {named}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
