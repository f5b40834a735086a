"""The options of a training loop, wherever a recipe asks for one: in `finetune` and inside other stages.

Invariant: data only; nothing here knows how a training is carried out, or imports torch.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from compressor.recipe_bounds import STRICT, ReductionBound

# Lists become tuples so that a recipe is immutable; `strict=False` only lets a list in, the items stay strict.
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
Ratio = Annotated[float, Field(gt=0, lt=1)]


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
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the images that are blended with another one, labels likewise (arXiv 1710.09412); long "
        "distillation on few images gains from it (2106.05237); 0 = off.",
    )


class Distill(BaseModel):
    """Distillation from the baseline, arXiv 1503.02531."""

    model_config = STRICT

    temperature: float = Field(default=2.0, gt=0, le=100, description="Softens both distributions; higher = softer.")
    weight: float = Field(
        default=0.5, gt=0, le=1, description="Share of the distillation loss; the labels' loss has the rest."
    )
    features: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight, beside the rest, of having before the classifier what the baseline has there: squared "
        "error over its variance, through a linear map where widths differ. With few images this keeps more of what a "
        "pretrained network knows than its answers do (arXiv 2202.07861); 0 = off.",
    )


class Memory(BaseModel):
    """What a training does with less memory, at the price of time; `freeze`, `precision` and `optimizer` tell too."""

    model_config = STRICT

    checkpointing: bool = Field(
        default=False,
        description="Blocks remember their input only and are computed again in the backward pass (arXiv 1604.06174): "
        "same weights up to rounding, about a third more time.",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Images that pass at once; gradients add up to a step of batch_size. BatchNorm normalises over "
        "these; null = batch_size.",
    )
    limit: ReductionBound | None = Field(
        default=None,
        description="Peak resident memory of a finetune, as a device would run it: bytes, or a fraction such as 0.5x "
        "of what the dense network takes with the same options. Levers are added until it is met with 3 % to spare, "
        "least risk to accuracy first: checkpointing, bf16, Adafactor, micro-batches of half, a quarter and an eighth. "
        "Each is measured, a few steps in a process of its own without a teacher; an interpreter with torch is part "
        "of it.",
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
    optimizer: Literal["adamw", "sgd", "adafactor"] = Field(
        default="adamw",
        description="AdamW; SGD with momentum, whose state is half as large; or Adafactor (arXiv 1804.04235), whose "
        "state is rows and columns in place of the weights' shape.",
    )
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
    memory: Memory = Field(default=Memory(), description="Less memory while training.")
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
        if self.memory.checkpointing and self.freeze and self.freeze_cache_gb:
            text = f"found {self.freeze_cache_gb:g} beside memory.checkpointing, which needs whole blocks; allowed 0"
            faults.append(("freeze_cache_gb", text))
        refuse(self, *faults)
        return self


class Sparsify(Training):
    """Training under a group lasso on BatchNorm scales: arXiv 1708.06519, over coupled layers as in 2301.12900."""

    strength: float = Field(
        default=1e-3,
        ge=0,
        le=1000,
        description="Weight of the penalty beside the loss: the sum over channels, coupled ones as one, of the norm of "
        "their BatchNorm scales times the root of how many these are; 0 = train without it.",
    )
