"""The one place that imports timm and torchvision, both optional (`pip install compressor[zoo]`).

Invariant: nothing is imported before it is asked for, nothing is downloaded, and nothing is patched unless
torchvision's import fails with the one message that is known to be harmless.
"""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from compressor.errors import MissingDependencyError, RecipeError, did_you_mean

log = logging.getLogger(__name__)

# torchvision's wheel is built for CUDA: beside a CPU build of torch its operators are not loaded and its own
# registration code fails (torchvision 0.29). Classifiers never call these two, so their signatures are enough.
_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Kept for the life of the process: torch drops the operators with the object that defined them.
_defined: list[torch.library.Library] = []

# What the toolkit decides itself, or what would read files and networks behind its back.
_OWN_ARGUMENTS = {
    "timm": {
        "num_classes",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
    },
    "torchvision": {"num_classes", "weights", "weights_backbone", "progress", "pretrained"},
}
# Auxiliary classifiers serve the training from scratch only, and these two warn that their slow initialisation will
# change (torchvision 0.28).
_QUIET = {name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")}
_RESIZES = {"bilinear": "pillow_bilinear", "bicubic": "pillow_bicubic"}


@dataclass(frozen=True)
class DataConfig:
    """How a pretrained network wants its images; `mean` and `std` for pixels scaled to 0..1, RGB."""

    size: tuple[int, int]
    resize: str
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def import_timm() -> tuple[ModuleType, str | None]:
    """Import timm, with torchvision made importable beside a CPU build of torch.

    Returns:
        The module, and a note for the report where operators had to be defined, else None.

    Raises:
        MissingDependencyError: timm or torchvision is not installed or does not fit the installed torch.
    """
    try:
        note = _import_torchvision()
        return importlib.import_module("timm"), note
    except ModuleNotFoundError as error:
        raise _not_installed("timm", error) from error


def import_torchvision() -> tuple[ModuleType, str | None]:
    """Import torchvision, made importable beside a CPU build of torch; see `import_timm`."""
    try:
        note = _import_torchvision()
        return importlib.import_module("torchvision"), note
    except ModuleNotFoundError as error:
        raise _not_installed("torchvision", error) from error


def _not_installed(zoo: str, error: ModuleNotFoundError) -> MissingDependencyError:
    return MissingDependencyError(
        f"models of {zoo} need the package '{error.name}', which is not installed; pip install 'compressor[zoo]'"
    )


def import_note(source: str) -> str | None:
    """What the report must say about how a zoo was imported; None for the other sources."""
    if source not in ("timm", "torchvision"):
        return None
    return (import_timm if source == "timm" else import_torchvision)()[1]


def _import_torchvision() -> str | None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if str(error) != _MISSING_OPERATOR:
            raise MissingDependencyError(
                f"torchvision does not fit torch {torch.__version__}: {error}; install the version made for it"
            ) from error
        _define_operators()
        importlib.import_module("torchvision")
    if not _defined:
        return None
    return "torchvision was built for another torch: its operators nms and qnms are defined but cannot run"


def _define_operators() -> None:
    log.warning("torchvision has no operators for this torch; defining %d of them, unable to run", len(_OPERATORS))
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for signature in _OPERATORS:
        library.define(signature)  # type: ignore[no-untyped-call]
    _defined.append(library)
    # The failed import leaves submodules behind, which a second import would take for complete.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def known_timm(name: str) -> ModuleType:
    """timm, if it has a network of that name (a tag such as `.a1_in1k` may follow); hub addresses are no names.

    Raises:
        RecipeError: it has none.
    """
    timm = import_timm()[0]
    names = timm.list_models()
    architecture, _, tag = name.partition(".")
    if architecture not in names:
        raise RecipeError(f"model.name: timm {timm.__version__} has no '{name}'{did_you_mean(name, names)}")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise RecipeError(f"model.name: timm has no weights '{name}', only {', '.join(tagged) or 'none'}")
    return timm


def known_torchvision(name: str) -> ModuleType:
    """`torchvision.models`, if it has a classification network of that name.

    Raises:
        RecipeError: it has none.
    """
    torchvision = import_torchvision()[0]
    models = cast(ModuleType, torchvision.models)
    if name not in (names := models.list_models(models)):
        raise RecipeError(
            f"model.name: torchvision {torchvision.__version__} has no '{name}'{did_you_mean(name, names)}"
        )
    return models


def build_timm(name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    """`timm.create_model` without weights; `name` may carry a tag such as `resnet50.a1_in1k`.

    Raises:
        RecipeError: timm has no such model, or the model takes no such argument.
    """
    timm = known_timm(name)
    return _construct(
        "timm", name, args, lambda: timm.create_model(name, pretrained=False, num_classes=num_classes, **args)
    )


def build_torchvision(name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    """A classification network of `torchvision.models` without weights and, unless asked for, auxiliary heads.

    Raises:
        RecipeError: torchvision has no such model, or the model takes no such argument.
    """
    models = known_torchvision(name)
    values = {**_QUIET.get(name, {}), **args}
    return _construct(
        "torchvision", name, args, lambda: models.get_model(name, weights=None, num_classes=num_classes, **values)
    )


def _construct(source: str, name: str, args: Mapping[str, object], make: Callable[[], object]) -> nn.Module:
    if own := sorted(_OWN_ARGUMENTS[source] & set(args)):
        raise RecipeError(
            f"model.args: found {', '.join(own)}, which the toolkit decides; weights come from model.weights, the "
            "number of outputs from the data"
        )
    try:
        return cast(nn.Module, make())
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        if not args:
            raise RecipeError(f"model.name: {source}'s '{name}' cannot be built ({_line(error)})") from error
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise RecipeError(f"model.args: found {unknown[1]}, which {source}'s {name} does not take") from error
        shown = ", ".join(f"{key}={value!r:.40}" for key, value in args.items())
        raise RecipeError(f"model.args: {source}'s {name} cannot be built with {shown} ({_line(error)})") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def data_config(source: str, name: str, args: Mapping[str, object]) -> DataConfig:
    """How the zoo's pretrained weights want their images."""
    if source == "timm":
        cfg = known_timm(name).get_pretrained_cfg(name)
        return timm_config(cfg.to_dict() if cfg else {}, name)
    models = known_torchvision(name)
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name in _QUIET and not args.get("transform_input"):
        # Their weights come from TensorFlow. torchvision feeds them ImageNet's mean and std and converts inside the
        # network (transform_input) to what this is without the detour.
        mean = std = (0.5, 0.5, 0.5)
    side = int(transforms.crop_size[0])
    resize = _resize(transforms.interpolation.value, f"torchvision's {name}")
    return DataConfig((side, side), resize, "center_crop", mean, std)


def timm_config(cfg: Mapping[str, Any], name: str) -> DataConfig:
    """The same from a `pretrained_cfg`, which every network made by timm carries."""
    timm_data = importlib.import_module("timm.data")
    values = timm_data.resolve_data_config(pretrained_cfg=dict(cfg))
    channels, height, width = values["input_size"]
    if channels != 3 or len(values["mean"]) != 3:
        raise RecipeError(f"model.name: '{name}' takes {channels} channels; images here have three")
    # The crop's share of the image is left out: a centred box of the right shape is cut out and scaled.
    fit = "stretch" if values["crop_mode"] == "squash" else "center_crop"
    resize = _resize(values["interpolation"], f"timm's {name}")
    return DataConfig((height, width), resize, fit, tuple(values["mean"]), tuple(values["std"]))


def _resize(interpolation: str, whose: str) -> str:
    if interpolation not in _RESIZES:
        raise RecipeError(f"input.resize: {whose} wants '{interpolation}', which is not available; choose one")
    return _RESIZES[interpolation]


def pretrained(source: str, name: str) -> tuple[str | None, str | None]:
    """Hub id and address of the ImageNet weights of a zoo's network; None where it names none."""
    if source == "timm":
        cfg = known_timm(name).get_pretrained_cfg(name)
        return (cfg.hf_hub_id or None, cfg.url or None) if cfg and not cfg.custom_load else (None, None)
    return None, known_torchvision(name).get_model_weights(name).DEFAULT.url
