"""Points inside a stage of many steps from which a run that was cut off goes on, instead of from the stage's start.

Invariant: a point that is not whole, or was made under another key, does not count.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from torch import nn

from compressor.artifacts import sha256_of, write_json
from compressor.checkpoint import Network, load_network, save_network
from compressor.context import Work
from compressor.memory import MemoryUse

WORK_JSON = "work.json"
# What a stage has gathered, as JSON; its edits are the network's.
_GATHERED = ("details", "notes", "plans", "train_time_s", "reached")


def point_of(stage_folder: Path) -> Path:
    """Where a stage that is not finished keeps its last point."""
    return stage_folder.with_name(f"unfinished-{stage_folder.name}")


def keep_point(folder: Path, key: str, network: Network, work: Work) -> None:
    """Keep what a stage has come to, in the place of its last point.

    Args:
        folder: From `point_of`.
        key: Of the stage.
        network: With the edits of the stage so far.
        work: What it has gathered.
    """
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    save_network(unfinished, network)
    write_json(
        unfinished / WORK_JSON,
        {
            "key": key,
            "files": {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())},
            **{name: getattr(work, name) for name in _GATHERED},
            "memory": work.memory and dataclasses.asdict(work.memory) | {"samples": []},
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def last_point(folder: Path, key: str, start: Network, dense: nn.Module | None) -> tuple[Network, Work] | None:
    """The network and the work at a stage's last point; None: there is none to go on from.

    Args:
        folder: From `point_of`.
        key: Of the stage.
        start: What the stage was given; the edits of the network that is returned are its.
        dense: As in `load_network`.
    """
    try:
        kept = json.loads((folder / WORK_JSON).read_text())
        whole = all(sha256_of(folder / name) == digest for name, digest in kept["files"].items())
        if kept["key"] != key or not whole:
            return None
        work = Work(edits=[], **{name: kept[name] for name in _GATHERED})
        work.memory = kept["memory"] and MemoryUse(**kept["memory"])
    except (OSError, ValueError, KeyError, TypeError):  # never kept, or cut off while it was
        return None
    network = load_network(folder, dense)
    work.edits = list(network.edits[len(start.edits) :])
    return dataclasses.replace(network, edits=start.edits), work
