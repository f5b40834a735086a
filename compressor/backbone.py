"""From a recipe, or a network given beside it, to the dense network with its weights and preprocessing.

Invariant: everything that can be wrong with a network is found here, before data are decoded or a stage starts; a
caller's own module is never changed.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.errors import RecipeError
from compressor.models import build, zoo
from compressor.models.custom import Own, identity, make_own, tensors_digest
from compressor.models.heads import check_classes, find_head, initialise_head, look, replace_head
from compressor.models.weights import WeightsReport, load_weights
from compressor.preprocess import InputSpec
from compressor.recipe import BROUGHT_ALONG, BUILTIN_INPUT, Recipe, with_input

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dense:
    """The network before any stage.

    Attributes:
        module: On the CPU, in training mode.
        architecture: `{source, name, args, num_classes}`, as `model.json` stores it.
        weights: Where its tensors come from.
        identity: sha256 of a network the toolkit did not build itself; None where name and arguments say it all.
    """

    module: nn.Module
    architecture: dict[str, Any]
    weights: WeightsReport
    identity: str | None


def resolve_input(recipe: Recipe, own: Own | None = None) -> Recipe:
    """The recipe with every key of `input` filled in: by the recipe itself, else by what the network's zoo says.

    Raises:
        RecipeError: no network, an unknown one, or one that does not say what size its images have.
    """
    return with_input(recipe, _input_defaults(recipe, own))


def input_spec(recipe: Recipe, own: Own | None = None) -> InputSpec:
    """The recipe's `input` section as the preprocessing every part shares; see `resolve_input`."""
    values = dict(resolve_input(recipe, own).input)
    height, width = values.pop("size")
    return InputSpec(height, width, **values)


def _input_defaults(recipe: Recipe, own: Own | None) -> Mapping[str, Any]:
    model = recipe.model
    if all(value is not None for _, value in recipe.input) or model.source == "builtin":
        return BUILTIN_INPUT
    if model.source in ("timm", "torchvision"):
        assert model.name is not None
        return vars(zoo.data_config(model.source, model.name, model.args))
    if own is not None and isinstance(cfg := getattr(own.module, "pretrained_cfg", None), dict):
        return vars(zoo.timm_config(cfg, own.name))  # every network made by timm carries it
    if recipe.input.size is None:
        raise RecipeError(
            f"input.size: found nothing, and a network of source {model.source} does not say what it takes; give the "
            "side of its images in pixels"
        )
    return BUILTIN_INPUT


def build_dense(recipe: Recipe, classes: int, own: Own | None = None, *, offline: bool = False) -> Dense:
    """Build the network with one output for each class and load what `model.weights` asks for.

    Args:
        recipe: With or without its `input` filled in.
        classes: Number of classes of the data.
        own: The caller's network; needed for `source: custom`.
        offline: Ask no hub and accept no random weights in place of absent ones, whatever the recipe allows.

    Raises:
        RecipeError: the network cannot be built, or cannot take the recipe's images.
        ResourceError: the weights are not at hand.
    """
    model, spec = recipe.model, input_spec(recipe, own)
    example = torch.zeros(1, 3, spec.height, spec.width)
    name = model.name or "custom"
    if model.source == "custom" and own is not None:
        module, head, kept = _fit(own, classes, example, recipe.seed)
    else:
        module, kept = build(model.source, name, model.args, classes), False
        seen = look(module, example)
        check_classes(seen, classes, where="model.name")
        head = find_head(seen, classes)
        if head is not None and model.source != "plugin":
            initialise_head(module, head, recipe.seed)
    if model.source in BROUGHT_ALONG and model.weights == "none":
        note = f"{name}: the weights it came with" + ("" if kept or own is None or own.module is None else _NEW_HEAD)
        weights = WeightsReport(
            model.source, tensors_digest(module), len(module.state_dict()), (), (), (), head_loaded=kept, notes=(note,)
        )
    else:
        weights = load_weights(
            module,
            name=name,
            source=model.source,
            weights=model.weights,
            head=head,
            download=model.weights_download and not offline,
            fallback=None if offline else model.weights_fallback,
        )
    architecture = {"source": model.source, "name": name, "args": dict(model.args), "num_classes": classes}
    return Dense(module, architecture, weights, identity(module) if model.source in BROUGHT_ALONG else None)


_NEW_HEAD = ", but for its head, which had another number of classes and is new"


def fresh_architecture(own: Own | None, classes: int, size: tuple[int, int], seed: int = 0) -> nn.Module | None:
    """A caller's network as it was before any edit, to rebuild a saved one on; None where `model.json` is enough."""
    return _fit(own, classes, torch.zeros(1, 3, *size), seed)[0] if own is not None else None


def _fit(own: Own, classes: int, example: torch.Tensor, seed: int) -> tuple[nn.Module, str | None, bool]:
    """A copy with an output for each class, the name of its head, and whether a given module's head was kept."""
    module = make_own(own, classes)
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        module = module.cpu()
    seen = look(module, example)
    if classes in seen.widths:
        return module, find_head(seen, classes), own.module is not None
    if own.module is None:
        check_classes(seen, classes, where=f"own network {own.name}")
    head = replace_head(module, seen, classes)
    initialise_head(module, head, seed)
    check_classes(look(module, example), classes, where=f"own network {own.name}")
    log.info("%s: head '%s' is new, for %d classes", own.name, head, classes)
    return module, head, False
