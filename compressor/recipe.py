"""The recipe: what to compress, on which data, by which stages, to which budget.

Invariant: a frozen value; all that can be wrong without looking at data, weights or the network has been refused.
Importing this module loads no torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from compressor.errors import did_you_mean
from compressor.recipe_bounds import STRICT, Bound, Budget
from compressor.recipe_rules import DEFAULT_SIZE, broken_rules
from compressor.recipe_stages import (
    SIZE_SCHEMA,
    DropBlocks,
    Finetune,
    Prune,
    Quantize,
    ReduceChannels,
    ReduceResolution,
    ReplaceKernels,
    Side,
    Stage,
    Target,
    TransferWatch,
    both_sides,
)
from compressor.recipe_training import Augment, Distill, Memory, Sparsify, Training, refuse

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
    "Memory",
    "ModelSection",
    "Prune",
    "Quantize",
    "Recipe",
    "ReduceChannels",
    "ReduceResolution",
    "ReplaceKernels",
    "Sparsify",
    "Stage",
    "Target",
    "Training",
    "TransferWatch",
]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
# The built-in architectures and the arguments they take, beside the number of classes which the data decide.
MODEL_ARGS: Mapping[str, frozenset[str]] = {"xception": frozenset()}
BROUGHT_ALONG = ("plugin", "custom")  # sources whose networks may come with weights of their own

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1)]
_SIZE_OR_NULL = {"anyOf": [*SIZE_SCHEMA["anyOf"], {"type": "null"}]}


BUILTIN_INPUT: Mapping[str, Any] = {
    "size": DEFAULT_SIZE,
    "resize": "pillow_bilinear",
    "fit": "stretch",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


class ModelSection(BaseModel):
    """The network and where its weights come from."""

    model_config = STRICT

    source: Literal["builtin", "timm", "torchvision", "plugin", "custom"] = Field(
        default="builtin",
        description="Where the architecture comes from: built in; timm or torchvision, to be installed; plugin = an "
        "installed package's entry point in the group compressor.models; custom = the network given with --factory or "
        "compress(model=...), which take the place of any other source.",
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The architecture, as its source names it: xception is built in, timm.list_models() and "
        "torchvision.models.list_models() list theirs; needed unless the source is custom.",
    )
    args: Mapping[str, bool | int | float | str] = Field(
        default={}, description="Arguments of the architecture's constructor; the built-in xception has none."
    )
    weights: str = Field(
        default="imagenet",
        min_length=1,
        description="imagenet (from local caches), none (random, or what a plugin's or custom network comes with: "
        "their default), or a .safetensors or .pth file, relative to the current folder.",
    )
    weights_download: bool = Field(default=False, description="Ask the hub when no cache holds the ImageNet weights.")
    weights_fallback: Literal["none"] | None = Field(
        default=None,
        description="none = train from random weights, announced loudly, where there are none; null = fail.",
    )

    @model_validator(mode="before")
    @classmethod
    def _weights_of_its_own(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("source") in BROUGHT_ALONG and "weights" not in data:
            return {**data, "weights": "none"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if self.source == "builtin":
            known = ", ".join(MODEL_ARGS)
            if self.name is None:
                faults.append(("name", f"found nothing, needs {known}"))
            elif self.name not in MODEL_ARGS:
                near = did_you_mean(self.name, MODEL_ARGS) or "; others: model.source timm, torchvision or plugin"
                faults.append(("name", f"found {self.name!r:.60}, allowed {known}{near}"))
            elif unknown := sorted(set(self.args) - MODEL_ARGS[self.name]):
                allowed = ", ".join(sorted(MODEL_ARGS[self.name])) or f"no argument for {self.name}"
                faults.append(("args", f"found {', '.join(unknown)}, allowed {allowed}"))
        elif self.name is None and self.source != "custom":
            faults.append(("name", f"found nothing, needs the name of a network of source {self.source}"))
        if self.source in BROUGHT_ALONG and self.weights == "imagenet":
            text = f"found 'imagenet', which is unknown for source {self.source}; allowed none or a path"
            faults.append(("weights", text))
        if self.weights not in ("imagenet", "none") and not self.weights.endswith(WEIGHT_SUFFIXES):
            near = did_you_mean(self.weights, ["imagenet", "none"])
            allowed = f"imagenet, none, or a path ending in {', '.join(WEIGHT_SUFFIXES)}"
            faults.append(("weights", f"found {self.weights!r:.80}, allowed {allowed}{near}"))
        refuse(self, *faults)
        return self


def custom_model(name: str, replaced: object) -> dict[str, Any]:
    """The `model` section of a network given beside the recipe; of the section it replaces it keeps a weights file."""
    weights = replaced.get("weights") if isinstance(replaced, Mapping) else None
    path = isinstance(weights, str) and weights not in ("imagenet", "none")
    return {"source": "custom", "name": name, "weights": weights if path else "none"}


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
    """How an image becomes the network's input; exported with the model.

    Null keys are filled in when the network is known: by what timm or torchvision say about its pretrained weights, or
    by `BUILTIN_INPUT`.
    """

    model_config = STRICT

    size: Annotated[
        tuple[Side, Side] | None, Field(strict=False), BeforeValidator(both_sides), WithJsonSchema(_SIZE_OR_NULL)
    ] = Field(
        default=None,
        description="Side of the square input in pixels, or [height, width]; null = timm's or torchvision's for the "
        "network, 299 for the built-in one; plugins and custom networks need it said.",
    )
    resize: Literal["pillow_bilinear", "pillow_bicubic", "linear"] | None = Field(
        default=None,
        description="Interpolation; linear is faster on large images but aliases when shrinking. null = timm's or "
        "torchvision's for the network, else pillow_bilinear.",
    )
    fit: Literal["stretch", "center_crop"] | None = Field(
        default=None,
        description="Stretch to the size, or keep the aspect ratio and cut the borders off; null = center_crop where "
        "timm or torchvision crop, else stretch.",
    )
    mean: Annotated[tuple[Unit, Unit, Unit] | None, Field(strict=False)] = Field(
        default=None,
        description="Red, green and blue subtracted from pixels scaled to 0..1; null = timm's or torchvision's for the "
        "network, else 0.5 each.",
    )
    std: Annotated[tuple[Positive, Positive, Positive] | None, Field(strict=False)] = Field(
        default=None,
        description="Red, green and blue divisors after the mean is subtracted; null = timm's or torchvision's for the "
        "network, else 0.5 each.",
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

    @model_validator(mode="before")
    @classmethod
    def _input_of_the_builtin(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        model, given = data.get("model"), data.get("input", {})
        source = model.get("source", "builtin") if isinstance(model, dict) else getattr(model, "source", None)
        values = dict(given) if isinstance(given, dict | InputSection) else None
        if source != "builtin" or values is None:
            return data
        return {**data, "input": {**BUILTIN_INPUT, **{key: v for key, v in values.items() if v is not None}}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        details = [
            InitErrorDetails(type=PydanticCustomError("broken_rule", "{text}", {"text": text}), loc=path, input=None)
            for path, text in broken_rules(self.model_dump(mode="json"))
        ]
        if details:
            raise ValidationError.from_exception_data("Recipe", details)
        return self


def with_input(recipe: Recipe, defaults: Mapping[str, Any]) -> Recipe:
    """The recipe with the null keys of its `input` filled in."""
    given = {key: value for key, value in recipe.input if value is not None}
    return recipe.model_copy(update={"input": InputSection.model_validate({**defaults, **given})})
