"""Where architectures come from: built in, timm, torchvision, or an installed plugin.

Invariant: a name is looked up in a table, a zoo's own list or the entry points of installed packages; no recipe text is
ever imported or evaluated, and building asks no network.
"""

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from compressor.errors import RecipeError, did_you_mean
from compressor.models import custom, zoo
from compressor.models.xception import xception

BUILTIN: dict[str, Callable[..., nn.Module]] = {"xception": xception}
SOURCES = ("builtin", "timm", "torchvision", "plugin")


def build(source: str, name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    """Build a network with `num_classes` outputs; its weights are random, or a plugin's own.

    Raises:
        RecipeError: unknown source, name or argument.
        MissingDependencyError: the source is a zoo that is not installed.
    """
    match source:
        case "builtin":
            return _build_builtin(name, args, num_classes)
        case "timm":
            return zoo.build_timm(name, args, num_classes)
        case "torchvision":
            return zoo.build_torchvision(name, args, num_classes)
        case "plugin":
            return custom.build_plugin(name, args, num_classes)
        case "custom":
            raise RecipeError(
                f"model.source: found 'custom' ({name}), a network from outside that only its owner can build; pass it "
                "with --factory package.module:function, compress(..., model=...) or load_network(folder, module=...)"
            )
        case _:
            raise RecipeError(
                f"model.source: '{source}' is not known; allowed: {', '.join(SOURCES)}{did_you_mean(source, SOURCES)}"
            )


def _build_builtin(name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    if name not in BUILTIN:
        raise RecipeError(
            f"model.name: '{name}' is not a built-in model; allowed: {', '.join(BUILTIN)}{did_you_mean(name, BUILTIN)}"
        )
    known = set(inspect.signature(BUILTIN[name]).parameters) - {"num_classes"}
    if unknown := sorted(set(args) - known):
        allowed = ", ".join(sorted(known)) or f"no argument for {name}"
        raise RecipeError(f"model.args: found {', '.join(unknown)}, allowed {allowed}")
    return BUILTIN[name](num_classes=num_classes, **args)
