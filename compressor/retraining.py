"""Asking a process of its own what memory training a saved network takes there; `retrain.py` is that process.

Invariant: nothing is written, and what this process holds in memory is not counted.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RETRAIN_STEPS = 12  # enough for the optimiser's state and the largest activations to be resident


def unrebuildable(architecture: Mapping[str, Any]) -> str | None:
    """Why another process cannot rebuild a network of this `source` and `name`; None where it can."""
    name = architecture["name"] or ""
    if architecture["source"] == "custom" and ":" not in name:
        return f"another process cannot rebuild {name}, which was given as an object; --factory names one it can"
    return None


def retraining_memory(
    run: Path,
    folder: Path,
    index: int,
    precision: str,
    architecture: Mapping[str, Any],
    levers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a saved network for a few steps in a process of its own, without a teacher.

    Args:
        run: Holds `recipe.yaml`.
        folder: Holds the network, as `save_network` writes it.
        index: Of the `finetune` stage in that recipe whose options are taken.
        precision: What `precision: auto` means in this run.
        architecture: `source` and `name` of the network.
        levers: Options that replace the stage's, see `memory_levers`.

    Returns:
        Resident bytes, see `retrain`; or `error` with the reason why nothing was measured.
    """
    if reason := unrebuildable(architecture):
        return {"error": reason}
    custom = architecture["source"] == "custom"
    command = [
        sys.executable,
        "-P",  # what lies in the working folder is not imported
        "-m",
        "compressor.retrain",
        str(run),
        str(folder),
        str(index),
        str(RETRAIN_STEPS),
        precision,
        json.dumps(dict(levers or {})),
        *([architecture["name"]] if custom else []),  # `compress` has put the factory's name there itself
    ]
    # The toolkit may run from a checkout that is not installed, in another working folder.
    search = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    if custom:
        search += sys.path  # the factory was found somewhere there
    child = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured
