"""Which arithmetic trains a network faster on this machine: measured on two steps of each, and remembered.

Invariant: the same network, batch and machine get the same answer, whatever the clock says another day: what was
measured once is kept in the cache folder, because the same seed must give the same weights.
"""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor import environment
from compressor.artifacts import write_json
from compressor.inference import arithmetic, choose_precision
from compressor.outputs import logits_of

log = logging.getLogger(__name__)
STEPS = 2  # timed of each, after one that is not


@dataclass(frozen=True)
class TrainingPrecision:
    """`chosen` is what `precision: auto` means; `seconds` of a step in each, empty where nothing was to choose."""

    chosen: str
    seconds: dict[str, float] = field(default_factory=dict)


def faster_precision(module: nn.Module, x: Tensor, *, device: str, identity: Mapping[str, Any]) -> TrainingPrecision:
    """float32 where the processor has no bf16 units; else what takes less time for this network and batch.

    Args:
        module: On the CPU; a copy of it is trained.
        x: A batch (N, C, H, W).
        device: Measured on the CPU only; on CUDA bf16 is taken.
        identity: What else tells this network from others of its shape, JSON; the machine is added here.
    """
    hardware = str(choose_precision("auto", device)).removeprefix("torch.")
    if hardware == "float32" or device != "cpu":
        return TrainingPrecision(hardware)
    key = {
        **identity,
        "batch": list(x.shape),
        "cpu": environment.cpu_model(),
        "isa": sorted(environment.cpu_flags() & set(environment.BF16_FEATURES)),
        "threads": torch.get_num_threads(),
        "versions": environment.versions(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = environment.cache_dir() / "precision" / f"{name}.json"
    try:
        seconds = {dtype: float(json.loads(file.read_text())["seconds"][dtype]) for dtype in ("float32", "bfloat16")}
    except (OSError, ValueError, KeyError, TypeError):  # never measured here, or damaged: measured again
        seconds = seconds_of_a_step(module, x)
        write_json(file, {"seconds": seconds, "of": key})
        log.info("a training step takes %.3f s in float32, %.3f s in bf16", seconds["float32"], seconds["bfloat16"])
    return TrainingPrecision(min(seconds, key=lambda dtype: seconds[dtype]), seconds)


def seconds_of_a_step(module: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of forward and backward pass in `float32` and `bfloat16`, in turns, the faster of two.

    The network and the random numbers drawn after this are as if nothing had been measured.
    """
    twin = copy.deepcopy(module).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    with torch.random.fork_rng(devices=[]):
        for step in range(STEPS + 1):
            for name, spent in seconds.items():
                started = time.perf_counter()
                with arithmetic(getattr(torch, name), "cpu"):
                    out = logits_of(twin(x))
                out.float().square().mean().backward()  # type: ignore[no-untyped-call]
                twin.zero_grad(set_to_none=True)
                if step:
                    spent.append(time.perf_counter() - started)
    return {name: min(spent) for name, spent in seconds.items()}
