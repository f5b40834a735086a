"""The architectures a recipe can name.

Invariant: a name resolves in a fixed table; no recipe text is ever imported or evaluated.
"""

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from compressor.errors import RecipeError, did_you_mean
from compressor.models.xception import xception

BUILTIN: dict[str, Callable[..., nn.Module]] = {"xception": xception}
# Module that holds the classifier, per architecture: re-initialised when the class count differs.
HEADS = {"xception": "fc"}


def build(source: str, name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    """Build a randomly initialised network with `num_classes` outputs.

    Raises:
        RecipeError: unknown source, name or argument.
    """
    if source != "builtin":
        raise RecipeError(f"model.source: '{source}' is not known; allowed: builtin")
    if name not in BUILTIN:
        raise RecipeError(
            f"model.name: '{name}' is not a built-in model; allowed: {', '.join(BUILTIN)}{did_you_mean(name, BUILTIN)}"
        )
    known = set(inspect.signature(BUILTIN[name]).parameters) - {"num_classes"}
    if unknown := sorted(set(args) - known):
        allowed = ", ".join(sorted(known)) or f"no argument for {name}"
        raise RecipeError(f"model.args: found {', '.join(unknown)}, allowed {allowed}")
    return BUILTIN[name](num_classes=num_classes, **args)
