"""The quantize stage, and the same on a copy that is only timed: what pruning to a latency asks for.

Invariant: a network is timed with the layers in INT8 that the recipe's own quantize stage would put there, before
`precision: auto` leaves some of them in float.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.context import Context, located
from compressor.data import calibration_indices
from compressor.data.batches import to_input
from compressor.equalization import equalize_depthwise
from compressor.export import convert_float_ir, convert_ir, trace_float, trace_int8
from compressor.folding import fold_batchnorm
from compressor.latency_target import DeploymentBench
from compressor.mixed_precision import choose_layers, scopes_of
from compressor.pruning.groups import resolve_scope
from compressor.pruning.roles import named_layers
from compressor.quantization import quantize
from compressor.runtime import DEFAULT

EQUALIZE_IMAGES = 64  # ranges of channels need fewer images than the quantizers' own
TIMED_IMAGES = 8  # what ranges come out does not change how long a layer takes
DRAFT_IMAGES = 2  # nor how large a file is; enough to see which activations are signed


@dataclass(frozen=True)
class Quantized:
    """A quantized network, its configuration for `load_quantized`, and what was done to the float one before."""

    module: nn.Module
    config: dict[str, Any]
    folded: list[list[str]]
    equalized: int


def calibration(stage: spec.Quantize, context: Context, seed: int, *, most: int | None = None) -> list[Tensor]:
    """Class-balanced training images as network inputs, each (1, 3, H, W)."""
    train = context.data.train
    count = stage.subset_size if most is None else min(stage.subset_size, most)
    chosen = calibration_indices(train, count, seed)
    return [to_input(train.images[i : i + 1], context.data.spec, "cpu") for i in chosen]


def quantize_as_told(
    module: nn.Module, stage: spec.Quantize, batches: Sequence[Tensor], context: Context, *, where: str
) -> Quantized:
    """Fold BatchNorm, balance channels and quantize; `module` is folded and balanced in place.

    Raises:
        RecipeError: `ignored_scope` matches nothing, or NNCF refuses the network.
    """
    resolve_scope(module, stage.ignored_scope, where=f"{where}.ignored_scope", example=context.example)
    ignored = named_layers(module, stage.ignored_scope, context.example)
    pairs = fold_batchnorm(module, context.example)
    equalized = equalize_depthwise(module, batches[:EQUALIZE_IMAGES]) if stage.equalize else []
    quantized, config = _quantized(module, stage, batches, ignored, where=where)
    return Quantized(quantized, config, [list(pair) for pair in pairs], len(equalized))


def _quantized(
    module: nn.Module, stage: spec.Quantize, batches: Sequence[Tensor], ignored: Sequence[str], *, where: str
) -> tuple[nn.Module, dict[str, Any]]:
    with located(where):
        return quantize(
            module,
            batches,
            preset=stage.preset,
            ignored_scope=ignored,
            residual=stage.residual,
            per_channel_activations=stage.per_channel_activations,
            overflow_fix=stage.overflow_fix,
            range_estimator=stage.range_estimator,
            bias_correction=stage.bias_correction,
        )


def quantize_where_it_pays(
    module: nn.Module,
    stage: spec.Quantize,
    batches: Sequence[Tensor],
    context: Context,
    *,
    where: str,
    seed: int,
) -> tuple[Quantized | None, dict[str, Any], list[str]]:
    """Quantize what INT8 makes faster without costing accuracy; see `mixed_precision`.

    Args:
        module: Left as it is.
        stage: Of precision `auto`.
        batches: From `calibration`.
        context: Validation images to judge by, and where files may lie meanwhile.
        where: Key path of the stage, for messages.
        seed: Draws the validation images.

    Returns:
        The quantized network, or None where float is faster than all that was tried; what was measured; notes.

    Raises:
        RecipeError: see `quantize_as_told`; or `ignored_scope` leaves nothing to choose from.
    """
    data = context.data
    told = named_layers(module, stage.ignored_scope, context.example)
    folded = copy.deepcopy(module)
    everything = quantize_as_told(folded, stage, batches, context, where=where)
    val = data.val.take(calibration_indices(data.val, stage.metric_images, seed))
    images = np.asarray(data.train.images[:TIMED_IMAGES])

    def ir_of(network: nn.Module) -> ov.Model:
        traced = trace_float if network is folded else trace_int8
        return convert_ir(traced(network, data.spec), data.spec, data.labels)

    with (
        located(where),
        DeploymentBench(
            convert_float_ir(module, data.spec, data.labels),
            ir_of,
            images,
            images,
            context.run_dir,
            context.threads,
            baseline_config=DEFAULT,
        ) as bench,
    ):
        blocks, choice, measured = choose_layers(
            folded,
            everything.module,
            lambda scope: _quantized(folded, stage, batches[:TIMED_IMAGES], [*told, *scope], where=where)[0],
            bench,
            val,
            data.spec,
            context.example,
            device=context.device,
        )
    chosen, int8, floating = choice.chosen, *choice.tried[:2]
    notes = []
    if not choice.accurate:
        lost = chosen.validated.loss - floating.validated.loss
        notes.append(
            f"precision auto: the validation loss is {lost:.3g} above float's; nothing tried that is as fast as the "
            "faster of all INT8 and all float does better; a finetune after this stage (QAT) may win it back"
        )
    if chosen is floating:
        notes.append(
            f"precision auto: nothing was quantized, for all float is the fastest here ({chosen.timed.measured:.3g} "
            f"ms; all INT8 {int8.timed.measured:.3g} ms)"
        )
        return None, measured, notes
    result = everything
    if chosen is not int8:
        ignored = [*told, *scopes_of(blocks, chosen.in_float)]
        quantized, config = _quantized(folded, stage, batches, ignored, where=where)
        result = dataclasses.replace(everything, module=quantized, config=config)
    return result, measured, notes


def deployed_ir(module: nn.Module, stage: spec.Quantize | None, context: Context, *, where: str) -> ov.Model:
    """The IR that would be deployed, if the network were finished: INT8 where a quantize stage follows, else float.

    A stage of precision `auto` is taken as one of `int8`: what stays in float is measured on the finished network only.
    It computes as fast and weighs as much as the network that is deployed, and is of no other use: few images calibrate
    it, and nothing is equalized or corrected.

    Args:
        module: Left as it is.
        stage: The quantize stage that follows; None: none does.
        context: Data to calibrate with, and the input.
        where: Key path of the quantize stage, for messages.

    Raises:
        RecipeError: see `quantize_as_told`.
    """
    data = context.data
    if stage is None:
        return convert_float_ir(module, data.spec, data.labels)
    batches = calibration(stage, context, seed=0, most=DRAFT_IMAGES)
    draft = stage.model_copy(update={"equalize": False, "bias_correction": False})
    quantized = quantize_as_told(copy.deepcopy(module), draft, batches, context, where=where).module
    return convert_ir(trace_int8(quantized, data.spec), data.spec, data.labels)
