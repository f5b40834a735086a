"""The stages a recipe can list: what each one takes, its ranges and its defaults.

Invariant: data only; no stage knows how it is carried out, and nothing here imports torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from compressor.recipe_bounds import STRICT, ReductionBound

# Lists become tuples so that a recipe is immutable; `strict=False` only lets a list in, the items stay strict.
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Width = Annotated[float, Field(gt=0, le=1)]
Init = Literal["inherit", "random"]


def refuse(model: BaseModel, *faults: tuple[str, str]) -> None:
    """Raise faults found after validation, each at its own key (`""` = the mapping itself).

    Raises:
        ValidationError: There is at least one fault.
    """
    if faults:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("rule", "{text}", {"text": text}),
                loc=(key,) if key else (),
                input=getattr(model, key, None) if key else None,
            )
            for key, text in faults
        ]
        raise ValidationError.from_exception_data(type(model).__name__, details)


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


class Augment(BaseModel):
    """Random changes to training images, drawn per image."""

    model_config = STRICT

    flip: bool = Field(default=True, description="Mirror left-right half of the time; off where left and right differ.")
    vertical_flip: bool = Field(default=False, description="Mirror top-bottom half of the time.")
    rotate90: bool = Field(default=False, description="Rotate by 0, 90, 180 or 270 degrees; needs a square input.size.")
    shift: int = Field(
        default=0, ge=0, le=512, description="Shift by up to this many pixels, borders filled by reflection."
    )
    crop: float = Field(
        default=1.0,
        ge=0.1,
        le=1,
        description="Cut out a random rectangle, each side at least this share of the image's, and stretch it back to "
        "the input size; 1 = off.",
    )


class Distill(BaseModel):
    """Distillation from the baseline, arXiv 1503.02531."""

    model_config = STRICT

    temperature: float = Field(default=2.0, gt=0, le=100, description="Softens both distributions; higher = softer.")
    weight: float = Field(
        default=0.5, gt=0, le=1, description="Share of the distillation loss; the labels' loss has the rest."
    )


class Training(BaseModel):
    """The options of one training loop, for `finetune` and for the `recovery` inside other stages."""

    model_config = STRICT

    epochs: int | None = Field(
        default=None, ge=1, le=10_000, description="Passes over the training set; give this or `steps`."
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Optimiser steps, for less than an epoch; give this or `epochs`."
    )
    batch_size: int = Field(default=32, ge=1, le=65_536, description="Images per optimiser step.")
    learning_rate: float = Field(
        default=5e-4, gt=0, le=10, description="Peak learning rate; the default suits adamw, sgd must name its own."
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW, or SGD with momentum.")
    schedule: Literal["one_cycle", "cosine"] = Field(
        default="one_cycle", description="How the learning rate moves: up and down in one cycle, or a cosine decay."
    )
    warmup: float = Field(default=0.25, ge=0, le=0.9, description="Fraction of the steps in which the rate rises.")
    weight_decay: float = Field(default=0.02, ge=0, lt=1, description="Pull of the weights towards zero.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Probability spread evenly over all classes.")
    clip_norm: float | None = Field(default=5.0, gt=0, description="Largest norm of the gradient; null = not clipped.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic; auto = bfloat16 autocast where the processor has units for it and a step of it was "
        "measured to take less time than one of float32.",
    )
    ema: Ratio | None = Field(default=None, description="Decay of a moving average of the weights; null = none.")
    patience: int | None = Field(
        default=None, ge=1, description="Stop when validation has not improved for this many epochs; null = never."
    )
    freeze: Globs = Field(
        default=(),
        description="Globs over module names, or roles, that stay as they are, statistics of BatchNorm too; one that "
        "matches nothing is an error.",
    )
    freeze_cache_gb: float = Field(
        default=4.0,
        ge=0,
        le=100_000,
        description="Disk space, in 10^9 bytes, for what frozen first layers give: computed once for an image and each "
        "flip or turn of it, unless it is shifted or cropped; 0 = computed anew every time.",
    )
    augment: Augment = Field(default=Augment(), description="Random changes to training images.")
    distill: Distill | None = Field(
        default=None, description="Learn from the baseline's outputs too; null = from the labels alone."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if self.epochs is None and self.steps is None:
            faults.append(("epochs", "found nothing, needs `epochs` or `steps`"))
        if self.epochs is not None and self.steps is not None:
            faults.append(("steps", f"found {self.steps} beside epochs {self.epochs}, needs only one of them"))
        if self.optimizer == "sgd" and "learning_rate" not in self.model_fields_set:
            faults.append(("learning_rate", "found nothing beside optimizer sgd, needs a number; 0.02 is usual"))
        refuse(self, *faults)
        return self


class Finetune(Training):
    """Train: the baseline when it leads the recipe, recovery after a change, QAT after `quantize`."""

    type: Literal["finetune"] = Field(default="finetune", description="Train the network.")


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
        description="Median latency of one request: ms, or a fraction of the baseline's such as 0.5x. The pruned "
        "network's float IR is timed at OpenVINO's default precision on this machine, also where the recipe quantizes "
        "later; the budget judges the result.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.macs is None and self.params is None and self.latency_ms is None:
            refuse(self, ("", "found no target, needs `macs`, `params`, `latency_ms` or several"))
        return self


class MacsTarget(BaseModel):
    """How many multiply-accumulates may remain."""

    model_config = STRICT

    macs: ReductionBound = Field(description=_MACS)


class Prune(BaseModel):
    """Remove the least important channel groups, arXiv 2301.12900 (DepGraph)."""

    model_config = STRICT

    type: Literal["prune"] = Field(default="prune", description="Remove channels by importance.")
    importance: Literal["magnitude", "taylor"] = Field(
        default="magnitude",
        description="Score of a channel: weight norm, or estimated change of the loss (arXiv 1906.10771).",
    )
    ranking: Literal["local", "global"] = Field(
        default="local",
        description="Rank channels within each group, or over the whole network: groups shrink unevenly.",
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
    recovery: Training | None = _recovery("between iterations")
    importance_batches: int = Field(
        default=16, ge=1, le=10_000, description="Training batches of 32 that taylor importance averages over."
    )
    bn_batches: int = _bn_batches()

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
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
    target: MacsTarget | None = Field(default=None, description="Drop until this is met; give this or `count`.")
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


class Quantize(BaseModel):
    """Quantize to INT8 with NNCF; alone it is PTQ, followed by `finetune` it is QAT."""

    model_config = STRICT

    type: Literal["quantize"] = Field(default="quantize", description="Quantize weights and activations.")
    precision: Literal["int8"] = Field(default="int8", description="Number format of weights and activations.")
    preset: Literal["mixed", "performance"] = Field(
        default="mixed",
        description="Activations asymmetric (mixed, more accurate) or symmetric (performance).",
    )
    subset_size: int = Field(
        default=300, ge=1, le=1_000_000, description="Class-balanced training images that set the ranges."
    )
    ignored_scope: Globs = _ignored_scope()
    residual: Literal["int8", "float"] = Field(
        default="int8",
        description="Terms of additions: int8 = rounded as well; float = left alone, and only inputs of layers are "
        "rounded: less noise.",
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


Stage: TypeAlias = Finetune | Prune | ReduceChannels | ReplaceKernels | DropBlocks | Quantize
