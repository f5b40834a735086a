"""The classifier of a network: where it is, how it begins, how it is made to fit the classes.

Invariant: found by running the network, not by its name; looking changes nothing in the network.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedModelError
from compressor.modes import evaluating
from compressor.outputs import named_tensors


@dataclass(frozen=True)
class Look:
    """What one forward pass showed.

    Attributes:
        widths: Columns of every `(N, columns)` tensor in the output, in its order.
        layers: Linear layers and 1x1 convolutions with their outputs' number, in order of execution.
        direct: The layer whose output is the network's first output, if there is one.
    """

    widths: tuple[int, ...]
    layers: tuple[tuple[str, int], ...]
    direct: str | None


def look(module: nn.Module, example: Tensor) -> Look:
    """Run the network once in eval mode.

    Args:
        module: On the CPU.
        example: Input (1, C, H, W).

    Raises:
        RecipeError: the network cannot take an image of that size.
    """
    seen: list[tuple[str, int, Tensor]] = []

    def watch(name: str, layer: nn.Linear | nn.Conv2d) -> Any:
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        return layer.register_forward_hook(lambda _layer, _inputs, out: seen.append((name, width, out)))

    hooks = [watch(name, layer) for name, layer in module.named_modules() if _is_candidate(layer)]
    try:
        with evaluating(module):
            output = module(example)
    except Exception as error:  # whatever a network raises on an image it was not made for
        height, width = example.shape[-2:]
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise RecipeError(
            f"input.size: the network fails on an image of {height} x {width} pixels ({reason}); give it a size it can "
            "take, mostly a larger one"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    tables = [value for value in named_tensors(output).values() if value.dim() == 2 and len(value) == len(example)]
    direct = next((name for name, _, out in seen if out is tables[0]), None)
    widths = tuple(value.shape[1] for value in tables)
    return Look(widths, tuple((name, width) for name, width, _ in seen), direct)


def _is_candidate(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def find_head(seen: Look, classes: int) -> str | None:
    """Name of the layer that makes the `classes` logits: the one whose output they are, else the last of that width."""
    widths = dict(seen.layers)
    if seen.direct is not None and widths[seen.direct] == classes:
        return seen.direct
    return next((name for name, width in reversed(seen.layers) if width == classes), None)


def check_classes(seen: Look, classes: int, *, where: str) -> None:
    """The network has an output for each class.

    Raises:
        RecipeError: it has not.
    """
    if classes not in seen.widths:
        found = ", ".join(str(width) for width in seen.widths)
        raise RecipeError(
            f"{where}: the network was asked for {classes} outputs, one for each class, and gives {found}"
        )


def initialise_head(module: nn.Module, head: str, seed: int) -> None:
    """Small seeded weights for a new classifier, so that the first loss is that of a uniform guess."""
    layer = module.get_submodule(head)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def replace_head(module: nn.Module, seen: Look, classes: int) -> str:
    """Put a classifier of `classes` outputs in place of the network's own; returns its name.

    Raises:
        UnsupportedModelError: there is no linear layer or 1x1 convolution that makes the logits.
    """
    head = find_head(seen, seen.widths[0])
    if head is None:
        raise UnsupportedModelError(
            f"the network gives {seen.widths[0]} outputs, the data have {classes} classes, and no linear layer or 1x1 "
            "convolution makes these outputs; give it a head of the right size"
        )
    layer = module.get_submodule(head)
    fresh: nn.Module
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, classes, bias=layer.bias is not None)
    else:
        assert isinstance(layer, nn.Conv2d)
        fresh = nn.Conv2d(
            layer.in_channels, classes, 1, (layer.stride[0], layer.stride[-1]), bias=layer.bias is not None
        )
    module.set_submodule(head, fresh.train(layer.training))
    for stale in ("num_classes", "n_classes"):
        if isinstance(getattr(module, stale, None), int):
            setattr(module, stale, classes)
    return head
