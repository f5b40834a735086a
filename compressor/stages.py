"""What each stage of a recipe does to a network.

Invariant: `run_stage` returns a network whose outputs have the same shape and dtype as before, and finite parameters.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.bias_grid import snap_biases
from compressor.channel_stages import prune_stage, reduce_channels_stage
from compressor.checkpoint import Network
from compressor.context import Assignment, Context, Work, reestimate, train
from compressor.errors import TrainingError, UnsupportedModelError
from compressor.inference import evaluate
from compressor.memory import measure_memory
from compressor.memory_levers import within_limit
from compressor.models.counting import count
from compressor.outputs import named_tensors
from compressor.quantization import resolve_overflow_fix
from compressor.quantize_stage import calibration, quantize_as_told, quantize_where_it_pays
from compressor.report import Footprint
from compressor.structure import drop_blocks_stage, replace_kernels_stage
from compressor.transfer_watch import compare_starts, divergence


@dataclass(frozen=True)
class Outcome:
    """A stage's network and what happened: figures for the footprint, details for the report, plans for people."""

    network: Network
    footprint: Footprint
    details: dict[str, Any]
    notes: tuple[str, ...] = ()
    plans: tuple[dict[str, Any], ...] = ()


def run_stage(
    stage: spec.Stage,
    network: Network,
    context: Context,
    assignment: Assignment,
    work: Work,
) -> Outcome:
    """Run one stage; `network.module` may be changed in place, the returned network is the one to keep.

    Args:
        work: empty; after an error its edits say how far `network.module` has been changed.

    Raises:
        UnsupportedModelError: the stage changed the shape or type of the outputs.
        TrainingError: training diverged, or left a tensor not finite.
    """
    before = _signature(network.module, context.example)
    module = network.module
    match stage:
        case spec.Finetune():
            _finetune(network, stage, context, assignment, work)
            if network.quantizer is not None:
                snap_biases(module, context.example)  # training has moved them, and the ranges
        case spec.Prune():
            prune_stage(module, stage, context, assignment, work)
        case spec.ReduceChannels():
            reduce_channels_stage(module, stage, context, assignment, work)
        case spec.ReplaceKernels():
            replace_kernels_stage(module, stage, context, assignment, work)
        case spec.DropBlocks():
            drop_blocks_stage(module, stage, context, assignment, work)
        case spec.ReduceResolution():
            _reduce_resolution(module, stage, context, assignment, work)
        case spec.Quantize():
            module = _quantize(module, stage, context, assignment, work)
        case _:
            assert_never(stage)
    after = _signature(module, context.example)
    if after != before:
        raise UnsupportedModelError(
            f"{assignment.where}: outputs were {before} and became {after}; "
            "this is a fault of the toolkit, please report it"
        )
    if bad := not_finite(module):
        raise TrainingError(
            f"{assignment.where}: {len(bad)} tensors are not finite any more, first {bad[0]}; lower the learning rate"
        )
    if work.memory is not None:
        work.details["memory_over_time"] = work.memory.over_time()
    kept = dataclasses.replace(
        network,
        module=module,
        edits=(*network.edits, *work.edits),
        quantizer=work.quantizer or network.quantizer,
        input=(3, context.data.spec.height, context.data.spec.width),
    )
    return Outcome(
        kept, _footprint(kept, context, work), work.details, tuple(dict.fromkeys(work.notes)), tuple(work.plans)
    )


def not_finite(module: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold NaN or infinity."""
    return [
        name
        for name, value in module.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]


def _signature(module: nn.Module, example: Tensor) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every output."""
    module.eval()
    with torch.no_grad():
        outputs = named_tensors(module(example))
    return {name: (tuple(value.shape), str(value.dtype)) for name, value in outputs.items()}


def _footprint(network: Network, context: Context, work: Work) -> Footprint:
    """Counts, validation accuracy and training cost of a stage."""
    counts = count(network.module, context.example)
    accuracy = work.val_accuracy
    if accuracy is None:
        accuracy, _ = evaluate(network.module, context.data.val, context.data.spec, device=context.device)
    memory = work.memory
    return Footprint(
        params=counts.params,
        macs=counts.macs,
        val_accuracy=accuracy,
        train_time_s=work.train_time_s,
        train_avg_memory_bytes=memory.average_bytes if memory else None,
        train_peak_memory_bytes=memory.peak_bytes if memory else None,
    )


def _finetune(network: Network, stage: spec.Finetune, context: Context, assignment: Assignment, work: Work) -> None:
    levers: dict[str, Any] = {}
    found = watched = None
    if stage.transfer_watch is not None:
        watched, warnings = _watched(network.module, stage, context, assignment)
        work.notes += warnings
    if stage.memory.limit is not None:
        levers, found = within_limit(network, stage, context, assignment)
    with measure_memory() as memory:
        result = train(network.module, stage, context, assignment, levers=levers)
    work.memory, work.train_time_s, work.val_accuracy = memory, result.seconds, result.val_accuracy
    beside = {"memory_levers": found, "transfer_watch": watched}
    work.details = dataclasses.asdict(result) | {name: value for name, value in beside.items() if value is not None}
    work.notes += result.frozen["notes"] if result.frozen else []
    if turned := divergence(result.history):
        work.notes.append(turned)


def _watched(
    module: nn.Module, stage: spec.Finetune, context: Context, assignment: Assignment
) -> tuple[dict[str, Any] | None, list[str]]:
    """What the probes of `transfer_watch` found, and what is to be said of it."""
    if not context.pretrained:
        return None, ["transfer_watch: the weights are random, so there is no transfer to watch"]
    return compare_starts(module, stage, context, assignment)


def _reduce_resolution(
    module: nn.Module, stage: spec.ReduceResolution, context: Context, assignment: Assignment, work: Work
) -> None:
    """The images are smaller already; what is left to do is to let BatchNorms see them."""
    full = context.baseline_data.spec
    work.details = {"baseline_size": [full.height, full.width], "size": list(stage.size)}
    reestimate(module, stage.bn_batches, context, assignment.seed)


def _quantize(
    module: nn.Module, stage: spec.Quantize, context: Context, assignment: Assignment, work: Work
) -> nn.Module:
    batches = calibration(stage, context, assignment.seed)
    work.details = {
        "calibration_images": len(batches),
        "overflow_fix": resolve_overflow_fix(stage.overflow_fix),
    }
    if stage.precision == "auto":
        result, work.details["auto"], notes = quantize_where_it_pays(
            module, stage, batches, context, where=assignment.where, seed=assignment.seed
        )
        work.notes += notes
    else:
        result = quantize_as_told(module, stage, batches, context, where=assignment.where)
    if result is None:
        return module
    work.edits.append({"type": "fold_bn", "pairs": result.folded})
    work.quantizer = result.config
    work.details |= {"folded": len(result.folded), "equalized": result.equalized}
    return result.module
