"""Choosing what a training does with less memory, so that it stays below a limit.

Invariant: what is chosen was measured, in a process of its own, with the very options the training then has.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import Network, save_network
from compressor.checkpointing import blocks_of
from compressor.context import Assignment, Context
from compressor.errors import RecipeError, ResourceError
from compressor.inference import choose_precision
from compressor.recipe_training import Training
from compressor.retraining import retraining_memory, unrebuildable

log = logging.getLogger(__name__)

# Peaks of one training differ from process to process: 1103 and 1125 MB were seen (benchmarks/memory_limit.py).
MARGIN = 0.97


def combinations(options: Training, *, blocks: bool, bf16: bool) -> Iterator[dict[str, Any]]:
    """Levers beside those that are told, each time one more, least risk to accuracy first.

    Args:
        options: What is told.
        blocks: Whether the network has blocks that can be computed twice.
        bf16: Whether bf16 may be taken: the processor has units for it, and the precision is left open.
    """
    levers: dict[str, Any] = {}
    yield {}
    if blocks and not options.memory.checkpointing:
        levers["checkpointing"] = True  # exact
        yield dict(levers)
    if bf16:
        levers["precision"] = "bfloat16"  # rounds activations
        yield dict(levers)
    if options.optimizer == "adamw":
        levers["optimizer"] = "adafactor"  # other steps, of the same size
        yield dict(levers)
    for part in (2, 4, 8):
        size = options.batch_size // part
        if size >= 2 and size < (options.memory.micro_batch or options.batch_size):
            levers["micro_batch"] = size  # BatchNorm sees fewer images at once
            yield dict(levers)


def within_limit(
    network: Network, options: Training, context: Context, assignment: Assignment
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find the first combination of levers whose training stays below the limit, with a little to spare.

    Args:
        network: What is trained, as the stage is given it.
        options: Of the stage, with a limit.
        context: Of the stage.
        assignment: Of the stage; its teacher is the dense network that a fraction refers to, where there is one.

    Returns:
        Options of the training loop, and for the report `asked`, `limit_bytes`, `floor_bytes`, `chosen` and `tried`
        (each with `levers`, `average_bytes` and `peak_bytes`).

    Raises:
        RecipeError: No combination does, with what each takes; or no other process could rebuild the network.
        ResourceError: The process failed.
    """
    limit, where = options.memory.limit, f"{assignment.where}.memory.limit"
    assert limit is not None
    if reason := unrebuildable(network.architecture):
        raise RecipeError(f"{where}: {reason}")

    def measured(what: Network, levers: Mapping[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix=".levers", dir=context.run_dir) as room:
            save_network(Path(room), what)
            found = retraining_memory(
                context.run_dir, Path(room), assignment.index, context.precision, what.architecture, levers
            )
        if "error" in found:
            raise ResourceError(f"{where}: training could not be measured: {found['error']}")
        return found

    as_told = measured(network, {})
    dense = as_told["peak_bytes"]  # a leading finetune trains the dense network itself
    if limit.relative and assignment.teacher is not None:
        full = context.baseline_data.spec
        size = (3, full.height, full.width)
        baseline = dataclasses.replace(network, module=assignment.teacher, edits=(), quantizer=None, input=size)
        dense = measured(baseline, {})["peak_bytes"]
    most = limit.resolve(dense)
    open_precision = options.precision == "auto" and context.precision != "bfloat16"
    bf16 = open_precision and choose_precision("auto", context.device) is torch.bfloat16
    blocks = network.quantizer is None and bool(blocks_of(network.module))
    tried = []
    for levers in combinations(options, blocks=blocks, bf16=bf16):
        found = measured(network, levers) if levers else as_told
        tried.append({"levers": levers, **{key: found[key] for key in ("average_bytes", "peak_bytes")}})
        log.info("%s: %s MB with %s", where, f"{found['peak_bytes'] / 1e6:.0f}", _named(levers))
        if found["peak_bytes"] <= MARGIN * most:
            told = {"asked": limit.plain(), "limit_bytes": round(most), "floor_bytes": found["floor_bytes"]}
            return levers, {**told, "chosen": levers, "tried": tried}
    least = min(tried, key=lambda entry: entry["peak_bytes"])
    raise RecipeError(
        f"{where}: {most / 1e6:.0f} MB cannot be met with {1 - MARGIN:.0%} to spare; the least is "
        f"{least['peak_bytes'] / 1e6:.0f} MB with {_named(least['levers'])}, of which an interpreter with torch takes "
        f"{found['floor_bytes'] / 1e6:.0f} MB. "
        "A smaller batch_size or input.size, or layers in `freeze`, reach further"
    )


def _named(levers: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in levers.items()) or "no lever"
