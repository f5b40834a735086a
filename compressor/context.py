"""What every stage may read, what it gathers while it works, and the training it may ask for.

Invariant: `Context` never changes during a run.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.data import Dataset
from compressor.data.batches import Augment
from compressor.memory import MemoryUse, measure_memory
from compressor.recipe_stages import Training
from compressor.training import Distillation, TrainingResult, finetune


@dataclass(frozen=True)
class Context:
    """What every stage may read."""

    example: Tensor  # (1, 3, H, W), a real normalised image
    data: Dataset
    device: str
    run_dir: Path


@dataclass
class Work:
    """What a stage gathers while it runs."""

    details: dict[str, Any]
    notes: list[str]
    edits: list[dict[str, Any]]
    plan: dict[str, Any] | None = None
    quantizer: dict[str, Any] | None = None
    memory: MemoryUse | None = None
    train_time_s: float | None = None


def train(
    module: nn.Module,
    options: Training,
    context: Context,
    *,
    seed: int,
    teacher: nn.Module | None,
    quantized: bool = False,
) -> TrainingResult:
    """Run the training loop with a recipe's options."""
    distill = None
    if options.distill is not None:
        assert teacher is not None, "the recipe validator demands a baseline before distillation"
        distill = Distillation(teacher, options.distill.temperature, options.distill.weight)
    values = options.model_dump(exclude={"type", "augment", "distill"})
    augment = Augment(**options.augment.model_dump())
    data = context.data
    return finetune(
        module,
        train=data.train,
        val=data.val,
        spec=data.spec,
        augment=augment,
        distill=distill,
        seed=seed,
        device=context.device,
        **values,
    )


def recovery(
    options: Training | None, context: Context, work: Work, *, seed: int, teacher: nn.Module | None
) -> Callable[[nn.Module, int], None]:
    """A function that trains a network a little; its time and memory go on the stage's account."""
    histories = work.details.setdefault("recovery", [])

    def recover(module: nn.Module, index: int) -> None:
        if options is None:
            return
        with measure_memory() as memory:
            result = train(module, options, context, seed=seed + index, teacher=teacher)
        histories.append(dataclasses.asdict(result))
        work.train_time_s = (work.train_time_s or 0.0) + result.seconds
        if work.memory is None or memory.peak_bytes > work.memory.peak_bytes:
            work.memory = memory

    return recover
