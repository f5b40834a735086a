"""Rules that span several keys of a recipe: the order of stages, who may be distilled from, what fits the input.

Invariant: works on plain data that may hold other faults (those parts are passed over), so that everything wrong with a
recipe can be reported at once.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from compressor.strict_yaml import KeyPath

TRAININGS = ("sparsify", "recovery")  # keys of stages that hold the options of a training
STRUCTURAL = frozenset({"prune", "reduce_channels", "replace_kernels", "drop_blocks", "reduce_resolution"})
DEFAULT_SIZE = (299, 299)  # of the built-in network; what others want is known when they are built
# Xception's two unpadded convolutions and four strides leave nothing of a smaller image.
SMALLEST_INPUT = 33


def broken_rules(data: object) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and the text of every broken rule."""
    root = _mapping(data)
    listed = root.get("stages")
    stages = [_mapping(stage) for stage in listed] if isinstance(listed, list) else []
    yield from _order(stages)
    yield from _memory(stages)
    yield from _teacher(root, stages)
    yield from _transfer(stages)
    yield from _geometry(root, stages)
    yield from _measurable(root, stages)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _trainings(stages: list[Mapping[str, Any]]) -> Iterator[tuple[int, KeyPath, Mapping[str, Any]]]:
    """Yield stage index, key path and options of every training loop."""
    for index, stage in enumerate(stages):
        if stage.get("type") == "finetune":
            yield index, ("stages", index), stage
        for key in TRAININGS:
            if isinstance(stage.get(key), dict):
                yield index, ("stages", index, key), stage[key]


def _order(stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    quantized: int | None = None
    for index, stage in enumerate(stages):
        kind = stage.get("type")
        if kind not in ("quantize", *STRUCTURAL):
            continue
        if quantized is not None:
            text = f"found '{kind}' after the quantize of stages[{quantized}], allowed there only finetune"
            yield ("stages", index, "type"), text
        elif kind == "quantize":
            quantized = index


def _memory(stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    """A quantized network's hooks are not called again with its blocks; a limit is what a device retrains under."""
    first = next((i for i, stage in enumerate(stages) if stage.get("type") == "quantize"), len(stages))
    for index, path, training in _trainings(stages):
        if index > first and _mapping(training.get("memory")).get("checkpointing") is True:
            text = f"found true after the quantize of stages[{first}], whose quantizers cannot be computed twice"
            yield (*path, "memory", "checkpointing"), f"{text}; allowed there: false, and a smaller micro_batch"
        if len(path) > 2 and _mapping(training.get("memory")).get("limit") is not None:
            text = f"found a limit of the {path[-1]} inside a stage, allowed of a finetune only"
            yield (*path, "memory", "limit"), text


def _transfer(stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    """Later stages begin with what was trained here."""
    for index, stage in enumerate(stages):
        if index and stage.get("type") == "finetune" and stage.get("transfer_watch") is not None:
            yield ("stages", index, "transfer_watch"), f"found in stages[{index}], allowed in stages[0] only"


def _teacher(root: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    """The baseline is the network before the first stage that is no finetune; until then nobody can teach."""
    leading = next((index for index, stage in enumerate(stages) if stage.get("type") != "finetune"), len(stages))
    for index, path, options in _trainings(stages):
        if index < leading and options.get("distill") is not None:
            text = (
                "found in a finetune that trains the baseline, which is the teacher itself; remove it, or put it later"
            )
            yield (*path, "distill"), text
    if leading or not stages or _head_may_be_trained(root):
        return
    need = "needs a trained baseline: begin `stages` with a finetune, or give model.weights a file that covers the head"
    for _, path, options in _trainings(stages):
        if options.get("distill") is not None:
            yield (*path, "distill"), f"found a teacher whose head is new and untrained; {need}"
    for index, stage in enumerate(stages):
        if stage.get("metric") == "distill_loss":
            yield ("stages", index, "metric"), f"found 'distill_loss' against a head that is new and untrained; {need}"
    budget = _mapping(root.get("budget"))
    for name in ("accuracy_drop", "accuracy"):
        if budget.get(name) is not None and (name == "accuracy_drop" or isinstance(budget[name], str)):
            yield ("budget", name), f"found {budget[name]!r:.20} against a head that is new and untrained; {need}"


def _head_may_be_trained(root: Mapping[str, Any]) -> bool:
    """A file may hold a head that fits, so may an own network, and ImageNet's fits a folder of its classes: only
    loading the weights tells."""
    model = _mapping(root.get("model"))
    weights, source = model.get("weights", "imagenet"), _mapping(root.get("data")).get("source")
    if model.get("source") == "custom":
        return True
    return weights not in ("imagenet", "none") or (weights == "imagenet" and source == "image_folder")


def _measurable(root: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    """A budget that no result can meet is refused now, not after the training."""
    benchmark = _mapping(root.get("benchmark"))
    for index, stage in enumerate(stages):
        target = _mapping(stage.get("target"))
        if target.get("train_peak_memory_bytes") is not None and not any(
            later.get("type") == "finetune" for later in stages[index + 1 :]
        ):
            text = "found a target of retraining, but no finetune follows this stage that says how; let one follow"
            yield ("stages", index, "target", "train_peak_memory_bytes"), text
    trains = [stage.get("type") == "finetune" for stage in stages]
    for name, bound in _mapping(root.get("budget")).items():
        if bound is None or not isinstance(name, str):
            continue
        relative, text = isinstance(bound, str), ""
        if name == "throughput_fps" and benchmark.get("throughput_s", 0) is None:
            text = "but benchmark.throughput_s is null, so it is not measured"
        elif name.startswith("retrain_") and not any(trains):
            text = "but no stage is a finetune that could be rerun"
        elif name.startswith("retrain_") and relative:
            text = "but only the result is retrained; allowed: an absolute number"
        elif name.startswith("train_") and relative and not any(trains[:1]):
            text = "but the baseline is not trained; allowed: an absolute number"
        elif name in ("train_time_s", "train_peak_memory_bytes") and _fraction(bound) < 1:  # a mean can be less
            text = "but the result's training includes the baseline's; allowed: 1x or more, or an absolute number"
        if text:
            # The same number read from text and from a built recipe (1e9, 1000000000) is one fault.
            shown = f"{bound:.6g}" if isinstance(bound, int | float) else repr(bound)[:20]
            yield ("budget", name), f"found {shown}, {text}"


def _fraction(bound: object) -> float:
    """The number of a bound such as 0.5x; 1 for anything else, which other rules judge."""
    try:
        return float(bound.removesuffix("x")) if isinstance(bound, str) else 1.0
    except ValueError:
        return 1.0


def _geometry(root: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> Iterator[tuple[KeyPath, str]]:
    builtin = _mapping(root.get("model")).get("source", "builtin") == "builtin"
    size = _mapping(root.get("input")).get("size")
    size = DEFAULT_SIZE if size is None and builtin else size
    now = _sides(size)
    if now is not None and builtin:
        yield from _large_enough(("input", "size"), now)
    trainings = list(_trainings(stages))
    for index, stage in enumerate(stages):
        if stage.get("type") == "reduce_resolution" and (sides := _sides(stage.get("size"))) is not None:
            if now is not None and (fault := not_smaller(sides, now)):
                yield ("stages", index, "size"), fault
            if builtin:
                yield from _large_enough(("stages", index, "size"), sides)
            now = sides
        for at, path, options in trainings:
            if at == index and now is not None:
                teacher = _sides(size) if options.get("distill") is not None else None
                yield from _fitting((*path, "augment"), _mapping(options.get("augment")), now, teacher)


def _fitting(
    path: KeyPath, augment: Mapping[str, Any], now: tuple[int, int], teacher: tuple[int, int] | None
) -> Iterator[tuple[KeyPath, str]]:
    """Whether images of the input's size, and of a teacher's, which keeps its own, can be changed like that."""
    shift, shorter = augment.get("shift"), min(now)
    if _is_integer(shift) and shift >= shorter:
        yield (*path, "shift"), f"found {shift}, allowed less than the input's shorter side of {shorter}"
    oblong = next((sides for sides in (now, teacher) if sides is not None and sides[0] != sides[1]), None)
    if augment.get("rotate90") is True and oblong:
        yield (*path, "rotate90"), f"found true, needs a square input.size, not {list(oblong)}"


def _sides(size: object) -> tuple[int, int] | None:
    """Height and width, where a size says both."""
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    return (height, width) if _is_integer(height) and _is_integer(width) else None


def _large_enough(path: KeyPath, sides: tuple[int, int]) -> Iterator[tuple[KeyPath, str]]:
    if 8 <= min(sides) < SMALLEST_INPUT:
        yield path, f"found {min(sides)}, allowed an integer >= {SMALLEST_INPUT} for the built-in network"


def not_smaller(sides: tuple[int, int], before: tuple[int, int]) -> str | None:
    """What is wrong where a reduced input is as large as the one before, or a side of it longer; None: nothing."""
    if sides != before and all(new <= old for new, old in zip(sides, before, strict=True)):
        return None
    return f"found {list(sides)}, allowed less than the {list(before)} before"
