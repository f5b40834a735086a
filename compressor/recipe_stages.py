"""The stages a recipe can list: what each one takes, its ranges and its defaults.

Invariant: data only; no stage knows how it is carried out, and nothing here imports torch.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from compressor.recipe_bounds import STRICT, ReductionBound
from compressor.recipe_rules import TRAININGS
from compressor.recipe_training import Globs, Ratio, Sparsify, Training, refuse

Width = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=8, le=4096)]
SIDE_SCHEMA = {"type": "integer", "minimum": 8, "maximum": 4096}
SIZE_SCHEMA = {"anyOf": [SIDE_SCHEMA, {"type": "array", "items": SIDE_SCHEMA, "minItems": 2, "maxItems": 2}]}


def both_sides(size: object) -> object:
    """A side alone means a square."""
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size


Init = Literal["inherit", "random"]


def _ignored_scope() -> Any:
    return Field(
        default=(),
        description="Globs over module names to leave alone, or roles: role:stem, role:body, role:head, role:strideN "
        "(maps N times smaller than the image); one that matches nothing is an error.",
    )


def _round_to() -> Any:
    return Field(default=8, ge=1, le=256, description="Channels kept in multiples of this, for SIMD instructions.")


def _min_channels() -> Any:
    return Field(default=8, ge=1, le=4096, description="Channels that every group keeps at least.")


def _bn_batches() -> Any:
    text = "Training batches that re-estimate BatchNorm statistics afterwards; 0 = none."
    return Field(default=16, ge=0, le=10_000, description=text)


def _recovery(when: str) -> Any:
    text = f"Short training {when}: the options of finetune without `type`; null = none."
    return Field(default=None, description=text)


class TransferWatch(BaseModel):
    """Short trainings that tell whether pretrained weights help."""

    model_config = STRICT

    steps: int = Field(
        default=170,
        ge=1,
        le=1_000_000,
        description="Optimiser steps of each: with the stage's own start and options, from random weights, and of the "
        "classifier alone, on the layers as they came and on those that the first one trained.",
    )


class Finetune(Training):
    """Train: the baseline when it leads the recipe, recovery after a change, QAT after `quantize`."""

    type: Literal["finetune"] = Field(default="finetune", description="Train the network.")
    transfer_watch: TransferWatch | None = Field(
        default=None,
        description="Of the first stage, with pretrained weights: short trainings beforehand, and a warning where "
        "random weights do better on validation by more than chance, or where training undoes more than half of what "
        "the layers were ahead of random ones, as classifiers trained alone on them tell; null = do not.",
    )


_MACS = "Multiply-accumulates left for one sample: a number, or a fraction of the baseline's such as 0.4x."


class Target(BaseModel):
    """How small or fast the network must get; with several given, all must be met."""

    model_config = STRICT

    macs: ReductionBound | None = Field(default=None, description=_MACS)
    params: ReductionBound | None = Field(
        default=None, description="Parameters left: a number, or a fraction of the baseline's such as 0.4x."
    )
    latency_ms: ReductionBound | None = Field(
        default=None,
        description="Median latency of one request: ms, or a fraction of the baseline's such as 0.5x. What is "
        "timed is the IR that would be deployed, on this machine at OpenVINO's default precision: INT8 where a later "
        "stage quantizes; the budget judges the result.",
    )
    size_bytes: ReductionBound | None = Field(
        default=None,
        description="Size of the IR (.xml and .bin) that would be deployed, INT8 where a later stage quantizes: bytes, "
        "or a fraction of the baseline's FP32 IR such as 0.25x. Files are written and measured until one fits.",
    )
    train_peak_memory_bytes: ReductionBound | None = Field(
        default=None,
        description="Peak resident memory of retraining the network, as a device would: bytes, or a fraction of what "
        "retraining the baseline takes such as 0.7x. Measured in a process of its own, a few steps by the next "
        "finetune's options without a teacher; what an interpreter with torch takes is part of it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(bound is None for _, bound in self):
            refuse(self, ("", f"found no target, needs one or several of {', '.join(type(self).model_fields)}"))
        return self


class Prune(BaseModel):
    """Remove the least important channel groups, arXiv 2301.12900 (DepGraph)."""

    model_config = STRICT

    type: Literal["prune"] = Field(default="prune", description="Remove channels by importance.")
    importance: Literal["magnitude", "bn_scale", "fpgm", "lamp", "taylor", "hessian", "activation", "random"] = Field(
        default="magnitude",
        description="Score of a channel. Of the weights: their norm; magnitude of BatchNorm scales (arXiv 1708.06519); "
        "fpgm, distance to the other channels (1811.00250); lamp, share among those at least as large (2010.07611). Of "
        "training images: taylor, first-order change of the loss (1906.10771); hessian, second-order, a backward pass "
        "an image (1801.05787); activation, size of what is read (1611.06440). random = a control.",
    )
    ranking: Literal["local", "global", "latency"] = Field(
        default="local",
        description="Rank channels within each group, or over the whole network: groups shrink unevenly; latency = by "
        "the importance lost per millisecond saved, which is measured on copies of the network.",
    )
    pruning_ratio: Ratio | None = Field(
        default=None, description="Fraction of channels removed; give this or `target`."
    )
    target: Target | None = Field(default=None, description="Size to reach; give this or `pruning_ratio`.")
    round_to: int = _round_to()
    min_channels: int = _min_channels()
    ignored_scope: Globs = _ignored_scope()
    iterations: int = Field(
        default=1, ge=1, le=100, description="Equal steps in which channels go, each scored afresh."
    )
    sparsify: Sparsify | None = Field(
        default=None,
        description="Training before the first channel goes that draws the BatchNorm scales of channels, coupled ones "
        "together, towards zero: the options of finetune without `type`, and `strength`; null = none.",
    )
    recovery: Training | None = _recovery("between iterations")
    importance_batches: int = Field(
        default=16,
        ge=1,
        le=10_000,
        description="Training batches of 32 that taylor, hessian and activation average over.",
    )
    sensitivity_images: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Training images on which it is measured how the network's answers change without a quarter and "
        "without half of each group (arXiv 1804.03230): groups then compete by that, and scores only order a group's "
        "channels; null = scores are compared over the whole network. For ranking global and latency.",
    )
    reconstruction_images: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Training images over which layers that read removed channels are refitted to those that stay, in "
        "least squares, before any training (as arXiv 1707.06168 and 1707.06342 do); null = removed channels are only "
        "cut off.",
    )
    bn_batches: int = _bn_batches()

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if self.sensitivity_images is not None and self.ranking == "local":
            text = f"found {self.sensitivity_images} beside ranking local, under which groups do not compete"
            faults.append(("sensitivity_images", text))
        if self.pruning_ratio is None and self.target is None:
            faults.append(("pruning_ratio", "found neither `pruning_ratio` nor `target`, needs one of them"))
        if self.pruning_ratio is not None and self.target is not None:
            faults.append(("target", f"found beside pruning_ratio {self.pruning_ratio}, needs only one of them"))
        if self.recovery is not None and self.iterations == 1:
            text = "found beside iterations 1, between which nothing runs; raise `iterations`, or let a finetune follow"
            faults.append(("recovery", text))
        refuse(self, *faults)
        return self


class ReduceChannels(BaseModel):
    """Give every channel group a fraction of its width, as MobileNet's width multiplier (arXiv 1704.04861)."""

    model_config = STRICT

    type: Literal["reduce_channels"] = Field(default="reduce_channels", description="Scale the widths of layers.")
    width: Width = Field(
        default=1.0, description="Fraction of channels kept in every group that `widths` does not name."
    )
    widths: Mapping[str, Width] = Field(
        default={},
        description="Fraction kept, by glob over channel groups, which go by the name of their first layer; in "
        "Xception the stream that the middle flow adds to is block3.skip.",
    )
    init: Init = Field(
        default="inherit", description="Keep the most important channels' weights, or start from random ones."
    )
    round_to: int = _round_to()
    min_channels: int = _min_channels()
    ignored_scope: Globs = _ignored_scope()
    bn_batches: int = _bn_batches()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min([self.width, *self.widths.values()]) == 1:
            refuse(self, ("width", "found nothing to reduce, needs a `width` or an entry of `widths` below 1"))
        return self


class ReplaceKernels(BaseModel):
    """Turn k x k depthwise and separable convolutions into 1 x 1, SqueezeNet's first strategy (arXiv 1602.07360)."""

    model_config = STRICT

    type: Literal["replace_kernels"] = Field(
        default="replace_kernels", description="Turn k x k convolutions into 1 x 1."
    )
    scope: Globs = Field(
        min_length=1, description="Globs over module names, or roles, whose convolutions are replaced."
    )
    init: Init = Field(
        default="inherit", description="Keep the centre tap plus the folded surround, or draw random weights."
    )
    ignored_scope: Globs = _ignored_scope()
    bn_batches: int = _bn_batches()


class DropBlocks(BaseModel):
    """Drop residual blocks one by one, each time the one whose removal hurts least."""

    model_config = STRICT

    type: Literal["drop_blocks"] = Field(
        default="drop_blocks", description="Drop residual blocks, least harmful first."
    )
    count: int | None = Field(default=None, ge=1, le=1000, description="Blocks to drop; give this or `target`.")
    target: Target | None = Field(default=None, description="Drop until this is met; give this or `count`.")
    scope: Globs = Field(
        default=("*",), min_length=1, description="Globs over module names, or roles, that may be dropped."
    )
    metric: Literal["val_loss", "distill_loss"] = Field(
        default="val_loss",
        description="What judges a removal: the validation loss, or the distance to the baseline's outputs.",
    )
    min_blocks: int = Field(default=0, ge=0, le=1000, description="Droppable blocks that must remain.")
    metric_images: int = Field(
        default=512, ge=1, le=1_000_000, description="Images that the metric is measured on, at most."
    )
    recovery: Training | None = _recovery("after each drop")
    bn_batches: int = _bn_batches()

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if self.count is None and self.target is None:
            faults.append(("count", "found neither `count` nor `target`, needs one of them"))
        if self.count is not None and self.target is not None:
            faults.append(("target", f"found beside count {self.count}, needs only one of them"))
        refuse(self, *faults)
        return self


class ReduceResolution(BaseModel):
    """Feed the network smaller images (resolution multiplier, arXiv 1704.04861)."""

    model_config = STRICT

    type: Literal["reduce_resolution"] = Field(
        default="reduce_resolution",
        description="Feed smaller images: cost falls with their area, and the deployed preprocessing scales to the new "
        "size. The baseline, and so the teacher, keeps the size it was trained at.",
    )
    size: Annotated[
        tuple[Side, Side], Field(strict=False), BeforeValidator(both_sides), WithJsonSchema(SIZE_SCHEMA)
    ] = Field(description="Side of the network's input in pixels from here on, or [height, width]; no side grows.")
    bn_batches: int = _bn_batches()


class Quantize(BaseModel):
    """Quantize to INT8 with NNCF; alone it is PTQ, followed by `finetune` it is QAT."""

    model_config = STRICT

    type: Literal["quantize"] = Field(default="quantize", description="Quantize weights and activations.")
    precision: Literal["int8", "auto"] = Field(
        default="int8",
        description="int8 = all layers but those of ignored_scope; auto = block by block, as measured on this machine: "
        "float, at OpenVINO's default precision, where INT8 gains no time, or where it raises the validation loss (by "
        "more than 0.01 in all) and float takes no more time than was won elsewhere; sensitivity of blocks and layers "
        "as in arXiv 2004.09602. The result is as fast as the faster of all INT8 and all float; a prune stage before "
        "this one times copies all in INT8.",
    )
    preset: Literal["mixed", "performance"] = Field(
        default="mixed",
        description="Activations asymmetric (mixed, more accurate) or symmetric (performance).",
    )
    subset_size: int = Field(
        default=300, ge=1, le=1_000_000, description="Class-balanced training images that set the ranges."
    )
    metric_images: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Validation images that precision auto judges by, at most: two passes over them for each block.",
    )
    range_estimator: Literal[
        "mean_minmax", "minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"
    ] = Field(
        default="mean_minmax",
        description="Range of an activation, from the images' own: mean_minmax and median_minmax, mean or median of "
        "their extremes; minmax, the outermost; mean_no_outliers_minmax, the mean of all but the outermost; "
        "mean_quantile, without 1 in 10,000 values at each end; histogram, the range of least error. Weights, and with "
        "mean_minmax channels that have a range each, take their extremes.",
    )
    bias_correction: bool = Field(
        default=True,
        description="Move biases so that the mean of each channel is as in float on the training images (arXiv "
        "1906.04721); layers without a bias are left alone.",
    )
    ignored_scope: Globs = Field(
        default=(),
        description="Globs over module names to leave in float, or roles as in prune; one that matches nothing is an "
        "error. At 8 bits the first and the last layer are quantized like the others, as the field does; [role:stem, "
        "role:head] leaves them out.",
    )
    residual: Literal["int8", "float"] = Field(
        default="float",
        description="Terms of additions: float = left alone, and only inputs of layers are rounded; int8 = rounded as "
        "well, which OpenVINO does not do where it computes an addition with the convolution before it.",
    )
    equalize: bool = Field(
        default=True,
        description="First balance channels between depthwise and pointwise convolutions (arXiv 1906.04721); the float "
        "function stays, INT8 gets finer.",
    )
    per_channel_activations: bool = Field(
        default=False,
        description="One range per channel for depthwise inputs: more accurate, but ONNX Runtime refuses it.",
    )
    overflow_fix: Literal["auto", "enable", "disable", "first_layer_only"] = Field(
        default="auto",
        description="Halve the weights' range against 8-bit overflow; auto = where the processor lacks VNNI.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.range_estimator == "histogram" and self.per_channel_activations:
            text = "found 'histogram' beside per_channel_activations, which have no histograms; mean_quantile is near"
            refuse(self, ("range_estimator", text))
        return self


Stage: TypeAlias = Finetune | Prune | ReduceChannels | ReplaceKernels | DropBlocks | ReduceResolution | Quantize


def trainings_of(stage: Stage) -> Iterator[tuple[str, Training]]:
    """Every training of a stage, with its key in the stage; `""` = the stage itself."""
    if isinstance(stage, Finetune):
        yield "", stage
    for key in TRAININGS:
        if isinstance(options := getattr(stage, key, None), Training):
            yield key, options
