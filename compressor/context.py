"""What every stage may read, what it gathers while it works, and the training it may ask for.

Invariant: `Context` never changes during a run, and networks are on the CPU except while they train or predict.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.checkpoint import Network
from compressor.data import Dataset
from compressor.data.batches import Augment
from compressor.distillation import Distillation, mimicking
from compressor.errors import RecipeError
from compressor.feed import Frozen, freezing, parameters_of
from compressor.inference import choose_precision, reestimate_batchnorm, visiting
from compressor.memory import MemoryUse, joined, measure_memory
from compressor.pruning.groups import resolve_scope
from compressor.recipe_stages import Finetune, Quantize, Stage
from compressor.recipe_training import Training
from compressor.report import Footprint
from compressor.training import TrainingResult, finetune


@dataclass(frozen=True)
class Context:
    """What every stage may read."""

    example: Tensor  # (1, 3, H, W), a real normalised image
    data: Dataset
    device: str
    run_dir: Path
    precision: str = "auto"  # what a recipe's `precision: auto` means in this run, once it is known
    threads: int | None = None  # of inference, wherever latency is measured; None leaves the choice to OpenVINO
    pretrained: bool = False  # whether the network came with weights that were trained elsewhere
    full_size: Dataset | None = None  # the images at the baseline's input size, where that is another

    @property
    def baseline_data(self) -> Dataset:
        """The images as the baseline takes them: `data`, until a stage reduces the resolution."""
        return self.full_size or self.data


@dataclass(frozen=True)
class Assignment:
    """What one stage is told besides its entry in the recipe."""

    index: int  # of the stage in the recipe
    seed: int
    teacher: nn.Module | None  # the frozen baseline, for distillation and for latencies in fractions of its own
    baseline: Footprint  # what targets such as `0.4x` are fractions of
    quantize: tuple[str, Quantize] | None = None  # the quantize stage that follows and its key path: what latency means
    finetune: tuple[int, Finetune] | None = None  # the next finetune and its index: what retraining means
    start: Network | None = None  # what the stage is given: how another process rebuilds a network that comes of it

    @property
    def where(self) -> str:
        """Key path of the stage in the recipe, for messages."""
        return f"stages[{self.index}]"


def assignment_of(
    stages: Sequence[Stage],
    index: int,
    *,
    seed: int,
    teacher: nn.Module | None,
    baseline: Footprint,
    start: Network | None,
) -> Assignment:
    """What a recipe's stage is told; the arguments are `Assignment`'s."""
    after = list(enumerate(stages))[index + 1 :]
    quantize = next(((f"stages[{i}]", stage) for i, stage in after if isinstance(stage, Quantize)), None)
    finetune = next(((i, stage) for i, stage in after if isinstance(stage, Finetune)), None)
    return Assignment(index, seed, teacher, baseline, quantize, finetune, start)


@dataclass
class Work:
    """What a stage gathers while it runs."""

    details: dict[str, Any]
    notes: list[str]
    edits: list[dict[str, Any]]
    plans: list[dict[str, Any]] = field(default_factory=list)
    quantizer: dict[str, Any] | None = None
    memory: MemoryUse | None = None
    train_time_s: float | None = None
    val_accuracy: float | None = None  # of the network the stage leaves, where its training measured that
    reached: dict[str, Any] = field(default_factory=dict)  # JSON: how far a stage of many steps has come
    keep: Callable[[nn.Module], None] = lambda _: None  # keeps the network as it is now, for a run that is cut off


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say which stage a decision failed in; the algorithms that decide do not know recipes."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def resolve_freeze(module: nn.Module, globs: Collection[str], *, where: str, example: Tensor) -> set[str]:
    """Names of all modules that a training leaves as they are.

    Raises:
        RecipeError: a glob matches nothing, or nothing is left to train.
    """
    frozen = resolve_scope(module, globs, where=where, example=example)
    held = {id(parameter) for parameter in parameters_of(module, frozen)}
    if held and all(id(parameter) in held for parameter in module.parameters()):
        last = list(dict.fromkeys(name.partition(".")[0] for name, _ in module.named_parameters()))[-1]
        raise RecipeError(f"{where}: {list(globs)} leave no layer to train; leave out '{last}' at least")
    return frozen


@contextmanager
def freezing_as_told(
    module: nn.Module, options: Training, *, where: str, folder: Path, example: Tensor
) -> Iterator[Frozen]:
    """Keep the layers of `options.freeze` from being trained; what they compute may be kept in a file in `folder`.

    Raises:
        RecipeError: see `resolve_freeze`.
    """
    layers = resolve_freeze(module, options.freeze, where=f"{where}.freeze", example=example)
    with freezing(module, layers, folder=folder, max_bytes=int(options.freeze_cache_gb * 1e9)) as frozen:
        yield frozen


@contextmanager
def distilling_as_told(
    module: nn.Module, options: Training, context: Context, assignment: Assignment
) -> Iterator[Distillation | None]:
    """What `options.distill` asks of a network that is on the context's device, its teacher too.

    Raises:
        UnsupportedModelError: features are asked for, and see `mimicking`.
    """
    if options.distill is None:
        yield None
        return
    assert assignment.teacher is not None, "the recipe validator demands a baseline before distillation"
    shown = (context.full_size.train, context.full_size.spec) if context.full_size else None
    told = Distillation(assignment.teacher, options.distill.temperature, options.distill.weight, shown)
    if not options.distill.features:
        yield told
        return
    precision = context.precision if options.precision == "auto" else options.precision
    with mimicking(
        module,
        assignment.teacher,
        weight=options.distill.features,
        train=context.data.train,
        spec=context.data.spec,
        shown=shown,
        dtype=choose_precision(precision, context.device),
        device=context.device,
        seed=assignment.seed,
    ) as mimicry:
        yield dataclasses.replace(told, mimicry=mimicry)


def loop_options(options: Training, precision: str) -> dict[str, Any]:
    """What of a recipe's options `finetune` takes as it is; distillation and freezing need more than the recipe.

    `precision` is what `auto` means, see `Context`.
    """
    values = options.model_dump(
        exclude={"type", "strength", "augment", "distill", "freeze", "freeze_cache_gb", "memory", "transfer_watch"}
    )
    values |= options.memory.model_dump(exclude={"limit"})
    if options.precision == "auto":
        values["precision"] = precision
    return values | {"augment": Augment(**options.augment.model_dump())}


def train(
    module: nn.Module,
    options: Training,
    context: Context,
    assignment: Assignment,
    *,
    key: str = "",
    round_index: int = 0,
    penalty: Callable[[], Tensor] | None = None,
    levers: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Run the training loop with a recipe's options.

    Args:
        module: Trained in place.
        options: Of the stage itself, or of the training that it has at `key`.
        context: What it is trained on.
        assignment: Of the stage.
        key: See `options`; for messages.
        round_index: Gives each round of one stage its own seed.
        penalty: See `finetune`.
        levers: Options of the loop that replace the recipe's, see `memory_levers`.
    """
    data = context.data
    where = f"{assignment.where}.{key}" if key else assignment.where
    with (
        visiting(context.device, module, *([assignment.teacher] if options.distill and assignment.teacher else [])),
        distilling_as_told(module, options, context, assignment) as distill,
        freezing_as_told(
            module, options, where=where, folder=context.run_dir, example=context.example.to(context.device)
        ) as frozen,
    ):
        return finetune(
            module,
            train=data.train,
            val=data.val,
            spec=data.spec,
            distill=distill,
            frozen=frozen,
            seed=assignment.seed + round_index,
            device=context.device,
            penalty=penalty,
            **(loop_options(options, context.precision) | dict(levers or {})),
        )


def recovery(
    options: Training | None, context: Context, assignment: Assignment, work: Work
) -> Callable[[nn.Module, int], None]:
    """A function that trains a network a little; its time and memory go on the stage's account."""
    histories = work.details.setdefault("recovery", [])

    def recover(module: nn.Module, index: int) -> None:
        if options is None:
            return
        with accounted(work) as results:
            results.append(train(module, options, context, assignment, key="recovery", round_index=index))
        histories.append(dataclasses.asdict(results[0]))

    return recover


@contextmanager
def accounted(work: Work) -> Iterator[list[TrainingResult]]:
    """Put the time and memory of a training inside a stage on the stage's account; the block appends its result."""
    results: list[TrainingResult] = []
    with measure_memory() as memory:
        yield results
    (result,) = results
    work.notes += result.frozen["notes"] if result.frozen else []
    spent = work.train_time_s or 0.0
    work.memory = memory if work.memory is None else joined(work.memory, spent, memory, result.seconds)
    work.train_time_s = spent + result.seconds


def reestimate(module: nn.Module, passes: int, context: Context, seed: int) -> None:
    """Let BatchNorms see training images again, after what feeds them has changed."""
    reestimate_batchnorm(module, context.data.train, context.data.spec, passes=passes, seed=seed, device=context.device)
