"""Where the time of a whole run goes, and how much of it is the toolkit's own.

    python benchmarks/run_time.py [benchmarks/run_time.json] [--recipe recipes/xception_slim.yaml] [--set PATH=VALUE]

Runs the recipe as a user would, in a fresh process with an empty cache, and takes its report apart. Useful are finding
the faster precision, steps of training with the teacher's answers, validation, what `prune`, `drop_blocks`, `quantize`
and their like compute, export, parity, accuracy, latency and the memory of retraining. All the rest of the wall clock
is overhead: starting Python and loading libraries, preparing data and weights, feeding batches, copies of weights,
files, what nobody timed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import keep

from compressor.report import Report, read_report

ROOT = Path(__file__).resolve().parents[1]
USEFUL_RUN = ("training precision", "export", "parity", "accuracy", "benchmark", "retraining memory")
USEFUL_TRAINING = ("teacher", "step", "validation")


def accounts(report: Report, wall: float) -> dict[str, Any]:
    """Seconds of useful work by kind, of overhead by kind, and the share of overhead in the wall clock."""
    useful: dict[str, float] = {}
    overhead: dict[str, float] = {"prepare": report.timing["prepare"], "keep stages": report.timing["keep stages"]}
    for stage in report.stages:
        details = stage["details"]
        trainings = [details] if stage["type"] == "finetune" else details.get("recovery", [])
        for training in trainings:
            for name, seconds in training["time"].items():
                account, key = (useful, f"training: {name}") if name in USEFUL_TRAINING else (overhead, name)
                account[key] = account.get(key, 0.0) + seconds
        rest = stage["seconds"] - sum(sum(training["time"].values()) for training in trainings)
        account, key = (overhead, "around training") if stage["type"] == "finetune" else (useful, stage["type"])
        account[key] = account.get(key, 0.0) + rest
    useful |= {name: report.timing[name] for name in USEFUL_RUN}
    overhead["start, end and untimed"] = wall - sum(useful.values()) - sum(overhead.values())
    return {
        "wall_s": wall,
        "useful_s": useful,
        "overhead_s": overhead,
        "overhead_share": sum(overhead.values()) / wall,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "xception_slim.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as of `compress.py run`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "compress.py"), "run", str(args.recipe), "--out", f"{folder}/run"]
        command += [word for change in args.set for word in ("--set", change)]
        started = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, "COMPRESSOR_CACHE": f"{folder}/cache"}, check=False)
        wall = time.perf_counter() - started
        if done.returncode:
            print(f"the run ended with exit code {done.returncode}; nothing was measured", file=sys.stderr)
            return done.returncode
        report = read_report(Path(folder) / "run" / "report.json")
    keep(args.output, {"recipe": args.recipe.name, "result_accuracy": report.result.accuracy, **accounts(report, wall)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
