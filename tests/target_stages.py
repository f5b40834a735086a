"""Single stages run to their targets on the stand-in network, and a clock that repeats itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_networks import tiny

from compressor import latency_target
from compressor.benchmark import Candidate
from compressor.checkpoint import Network
from compressor.context import Assignment, Context, Work
from compressor.data import load_dataset
from compressor.data.batches import to_input
from compressor.environment import cache_dir
from compressor.inference import frozen_copy
from compressor.models.counting import count
from compressor.preprocess import InputSpec
from compressor.recipe import Finetune, Quantize, Stage
from compressor.report import Footprint
from compressor.stages import Outcome, run_stage

BASELINE_MS = 10.0


def tiny_context(images: Path, folder: Path) -> Context:
    """What stages may read, of the images of `make_images`."""
    data = load_dataset(source="image_folder", path=str(images), spec=InputSpec(48, 48), cache=cache_dir() / "data")
    return Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", folder, threads=1)


def fresh_network() -> Network:
    """The stand-in network, with the same weights every time."""
    torch.manual_seed(3)
    architecture = {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}
    return Network(tiny(4).eval(), architecture, (), None, (3, 48, 48))


def prune(network: Network, context: Context, target: dict[str, object], **options: Any) -> Outcome:
    told = {key: options.pop(key) for key in ("quantize", "finetune") if key in options}
    stage = {"type": "prune", "target": target, "round_to": 2, "min_channels": 2, **options}
    return run(network, context, stage, **told)


def run(
    network: Network,
    context: Context,
    stage: dict[str, object],
    *,
    quantize: tuple[str, Quantize] | None = None,
    finetune: tuple[int, Finetune] | None = None,
) -> Outcome:
    """Run one stage, given as a recipe writes it, with the untouched network as the baseline."""
    quick = {} if stage["type"] == "finetune" else {"bn_batches": 0}
    parsed: Any = TypeAdapter(Stage).validate_python({**quick, **stage})
    whole = count(network.module, context.example)
    baseline, teacher = Footprint(params=whole.params, macs=whole.macs), frozen_copy(network.module)
    start = Network(copy.deepcopy(network.module), network.architecture, network.edits, None, network.input)
    assignment = Assignment(1, 0, teacher, baseline, quantize, finetune, start)
    return run_stage(parsed, network, context, assignment, Work({}, [], []))


def time_by_weight(patch: pytest.MonkeyPatch) -> None:
    """Time what an IR computes by the size of its weights instead of by the clock; a layer takes its weights' share."""

    def times(baseline: Candidate, probe: Candidate, *_: object) -> tuple[float, float]:
        sizes = [timed.xml.with_suffix(".bin").stat().st_size for timed in (baseline, probe)]
        return BASELINE_MS, BASELINE_MS * sizes[1] / sizes[0]

    def shares(_: object, layers: dict[str, tuple[int, int]]) -> tuple[dict[str, float], float]:
        return {name: float(inputs * outputs) for name, (inputs, outputs) in layers.items()}, 0.0

    patch.setattr(latency_target, "time_pair", times)
    patch.setattr(latency_target, "profile", lambda *_, **__: [])
    patch.setattr(latency_target, "times_of_layers", shares)
    patch.setattr(latency_target, "RANDOM_COPIES", 1)  # each one traces a network
