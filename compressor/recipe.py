"""The recipe: what to compress, on which data, by which stages, to which budget.

Invariant: a frozen value; all that can be wrong without looking at data, weights or the network has been refused.
Importing this module loads no torch.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from compressor.errors import did_you_mean
from compressor.recipe_bounds import STRICT, Bound, Budget
from compressor.recipe_rules import DEFAULT_SIZE, broken_rules
from compressor.recipe_stages import (
    Augment,
    Distill,
    DropBlocks,
    Finetune,
    MacsTarget,
    Prune,
    Quantize,
    ReduceChannels,
    ReplaceKernels,
    Stage,
    Target,
    Training,
    refuse,
)

__all__ = [
    "Augment",
    "BenchmarkSection",
    "Bound",
    "Budget",
    "DataSection",
    "Distill",
    "DropBlocks",
    "ExportSection",
    "Finetune",
    "InputSection",
    "MacsTarget",
    "ModelSection",
    "Prune",
    "Quantize",
    "Recipe",
    "ReduceChannels",
    "ReplaceKernels",
    "Stage",
    "Target",
    "Training",
]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
# Arguments that a built-in architecture takes, beside the number of classes which the data decide.
MODEL_ARGS: Mapping[str, frozenset[str]] = {"xception": frozenset()}
# Xception's two unpadded convolutions and four strides leave nothing of a smaller image.
SMALLEST_INPUT = 33

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1)]
Side = Annotated[int, Field(ge=SMALLEST_INPUT, le=4096)]


def _both_sides(size: object) -> object:
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size


_SIDE_SCHEMA = {"type": "integer", "minimum": SMALLEST_INPUT, "maximum": 4096}
_SIZE_SCHEMA = {"anyOf": [_SIDE_SCHEMA, {"type": "array", "items": _SIDE_SCHEMA, "minItems": 2, "maxItems": 2}]}


class ModelSection(BaseModel):
    """The network and where its weights come from."""

    model_config = STRICT

    source: Literal["builtin"] = Field(default="builtin", description="Where the architecture comes from.")
    name: Literal["xception"] = Field(description="The architecture.")
    args: Mapping[str, bool | int | float | str] = Field(
        default={}, description="Arguments of the architecture; xception has none."
    )
    weights: str = Field(
        default="imagenet",
        min_length=1,
        description="imagenet (from the local cache), none (random), or a .safetensors or .pth file, relative "
        "to the current folder.",
    )
    weights_download: bool = Field(
        default=False, description="Ask the hub when the cache does not hold the ImageNet weights."
    )
    weights_fallback: Literal["none"] | None = Field(
        default=None,
        description="none = train from random weights, announced loudly, where there are none; null = fail.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if unknown := sorted(set(self.args) - MODEL_ARGS[self.name]):
            allowed = ", ".join(sorted(MODEL_ARGS[self.name])) or f"no argument for {self.name}"
            faults.append(("args", f"found {', '.join(unknown)}, allowed {allowed}"))
        if self.weights not in ("imagenet", "none") and not self.weights.endswith(WEIGHT_SUFFIXES):
            near = did_you_mean(self.weights, ["imagenet", "none"])
            allowed = f"imagenet, none, or a path ending in {', '.join(WEIGHT_SUFFIXES)}"
            faults.append(("weights", f"found {self.weights!r:.80}, allowed {allowed}{near}"))
        refuse(self, *faults)
        return self


class DataSection(BaseModel):
    """The labelled images.

    Keys that the source does not read are passed over, so that a child recipe or `--set` can change the source alone.
    """

    model_config = STRICT

    source: Literal["synthetic_pcb", "image_folder", "caltech101", "deeppcb"] = Field(
        description="synthetic_pcb is generated, the others read data.path."
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="A folder or .tar with train/ [val/] test/, or with one folder per class; relative to the "
        "current folder.",
    )
    val_fraction: float = Field(
        default=0.1, gt=0, le=0.4, description="Share of train that becomes val if there is no val/."
    )
    test_fraction: float = Field(
        default=0.2, gt=0, le=0.4, description="Share that becomes test where there is no test/."
    )
    group_by: int | None = Field(
        default=None,
        ge=1,
        le=255,
        description="Leading characters of file names; images that share them stay on one side of a split. null = the "
        "source's own (5 for deeppcb, none for the others).",
    )
    images_per_class: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000,
        description="Training images of a class at most, for sources with a path; null = all.",
    )
    train_per_class: int = Field(
        default=400, ge=2, le=100_000, description="Training images of a class, for synthetic_pcb."
    )
    val_per_class: int = Field(
        default=60, ge=2, le=100_000, description="Validation images of a class, for synthetic_pcb."
    )
    test_per_class: int = Field(default=100, ge=2, le=100_000, description="Test images of a class, for synthetic_pcb.")
    image_size: int | None = Field(
        default=None, ge=48, le=1024, description="Side of the images synthetic_pcb draws; null = the input's size."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source == "synthetic_pcb" and self.path is not None:
            text = (
                f"found {self.path!r:.80}, but source synthetic_pcb reads no files; did you mean source image_folder?"
            )
            refuse(self, ("path", text))
        if self.source != "synthetic_pcb" and self.path is None:
            refuse(self, ("path", f"found nothing, needs the folder or .tar that source {self.source} reads"))
        return self


class InputSection(BaseModel):
    """How an image becomes the network's input; exported with the model."""

    model_config = STRICT

    size: Annotated[
        tuple[Side, Side], Field(strict=False), BeforeValidator(_both_sides), WithJsonSchema(_SIZE_SCHEMA)
    ] = Field(default=DEFAULT_SIZE, description="Side of the square input in pixels, or [height, width].")
    resize: Literal["pillow_bilinear", "pillow_bicubic", "linear"] = Field(
        default="pillow_bilinear",
        description="Interpolation; linear is faster on large images but aliases when shrinking.",
    )
    fit: Literal["stretch", "center_crop"] = Field(
        default="stretch", description="Stretch to the size, or keep the aspect ratio and cut the borders off."
    )
    mean: Annotated[tuple[Unit, Unit, Unit], Field(strict=False)] = Field(
        default=(0.5, 0.5, 0.5), description="Red, green and blue subtracted from pixels scaled to 0..1."
    )
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = Field(
        default=(0.5, 0.5, 0.5), description="Red, green and blue divisors after the mean is subtracted."
    )


class ExportSection(BaseModel):
    """What is written and how it is proven equal."""

    model_config = STRICT

    parity_images: int = Field(
        default=256, ge=1, le=100_000, description="Test images on which torch, ONNX and IR must agree."
    )
    opset: int = Field(default=17, ge=17, le=20, description="ONNX operator set of the exported files.")


class BenchmarkSection(BaseModel):
    """How the exported model is timed."""

    model_config = STRICT

    calls: int = Field(
        default=100, ge=100, le=1_000_000, description="Timed calls per model, interleaved with the baseline's."
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="Inference threads; null = OpenVINO's choice.")
    throughput_s: float | None = Field(
        default=3.0, gt=0, le=600, description="Seconds to measure throughput for; null = not measured."
    )


class Recipe(BaseModel):
    """A complete recipe, version 1."""

    model_config = STRICT

    version: Literal[1] = Field(description="Version of the recipe format.")
    extends: str | None = Field(
        default=None,
        min_length=1,
        description="A recipe to start from, relative to this file: mappings are merged, lists and values replaced.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of everything random.")
    model: ModelSection = Field(description="The network and its weights.")
    data: DataSection = Field(description="The labelled images.")
    input: InputSection = Field(default=InputSection(), description="Size and normalisation of the network's input.")
    stages: Annotated[tuple[Annotated[Stage, Field(discriminator="type")], ...], Field(strict=False)] = Field(
        min_length=1,
        max_length=64,
        description="What is done to the network, in order; the leading finetunes train the baseline.",
    )
    export: ExportSection = Field(default=ExportSection(), description="What is written and how it is proven equal.")
    benchmark: BenchmarkSection = Field(default=BenchmarkSection(), description="How the exported model is timed.")
    budget: Budget = Field(
        default=Budget(), description="What the result must meet; a miss fails the run after the report."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        details = [
            InitErrorDetails(type=PydanticCustomError("broken_rule", "{text}", {"text": text}), loc=path, input=None)
            for path, text in broken_rules(self.model_dump(mode="json"))
        ]
        if details:
            raise ValidationError.from_exception_data("Recipe", details)
        return self
