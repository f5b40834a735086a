"""Replacing k x k convolutions by 1 x 1 ones: the first strategy of SqueezeNet (arXiv 1602.07360).

Invariant: every output shape in the network stays as it was.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedModelError
from compressor.pruning.coupling import is_depthwise
from compressor.pruning.groups import resolve_scope


def find_kernels(
    module: nn.Module, scope: Iterable[str], *, where: str = "scope", example: Tensor | None = None
) -> tuple[str, ...]:
    """Return the convolutions in a scope that can become 1 x 1, in network order.

    Depthwise convolutions, alone or in separable pairs, are taken wherever a glob reaches them: they mix space only and
    are slow for their MACs on CPUs. A dense k x k convolution mixes channels too, so it is taken only when the scope
    gives its full name.

    Args:
        module: The network.
        scope: Globs over module names, as in `resolve_scope`.
        where: Recipe path of the list, for messages.
        example: Input `(N, C, H, W)`, needed where the scope names roles.

    Raises:
        RecipeError: If a glob matches no module, a layer named in full cannot be replaced (the message says why), or
            nothing in the scope can.
    """
    globs = list(scope)
    reached = resolve_scope(module, globs, where=where, example=example)
    found = []
    refused: list[str] = []
    for name, layer in module.named_modules():
        if name not in reached or not isinstance(layer, nn.Conv2d):
            continue
        problem = _problem(layer)
        if problem is not None:
            if name in globs:
                raise RecipeError(f"{where}[{globs.index(name)}]: '{name}' cannot become 1x1: {problem}")
            refused.append(f"'{name}' {problem}")
        elif is_depthwise(layer) or name in globs:
            found.append(name)
    if not found:
        seen = f" (of {len(refused)} convolutions refused, the first: {refused[0]})" if refused else ""
        raise RecipeError(
            f"{where}: no depthwise convolution in it can become 1x1{seen}; dense convolutions must be named in full"
        )
    return tuple(found)


def replace_kernels(
    module: nn.Module, names: Sequence[str], *, init: Literal["inherit", "random"], seed: int = 0
) -> None:
    """Replace k x k convolutions by 1 x 1 ones with the same stride, groups and bias, in place.

    Args:
        module: The network.
        names: From `find_kernels`.
        init: `inherit` gives the centre tap plus the surround folded into it, the sum over all taps: exact wherever the
            input is locally constant. `random` draws from He's initialisation (arXiv 1502.01852), fan-in mode, because
            fan-out ignores groups and would start depthwise kernels far too small; biases become zero.
        seed: For `random`.

    Raises:
        UnsupportedModelError: If a name is no convolution that can become 1 x 1. Nothing is replaced then.
    """
    layers: list[tuple[str, nn.Conv2d]] = []
    modules = dict(module.named_modules())
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Conv2d):
            found = "no module" if layer is None else f"a {type(layer).__name__}"
            raise UnsupportedModelError(f"{name}: expected a convolution to replace, found {found}")
        if (problem := _problem(layer)) is not None:
            raise UnsupportedModelError(f"{name}: cannot become 1x1: {problem}")
        layers.append((name, layer))
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, _pointwise(layer, init, generator))


def _problem(layer: nn.Conv2d) -> str | None:
    """Why a convolution cannot become 1 x 1 with its output shape preserved; None if it can."""
    if layer.kernel_size == (1, 1):
        return "is 1x1 already"
    if any(size % 2 == 0 for size in layer.kernel_size):
        return f"has an even kernel {layer.kernel_size}, which has no centre"
    if layer.dilation != (1, 1):
        return f"has dilation {layer.dilation}"
    # With p = (k - 1) / 2 a convolution of stride s gives floor((n - 1) / s) + 1 positions, as a 1 x 1 one does.
    centred = tuple(size // 2 for size in layer.kernel_size)
    if layer.padding not in ("same", centred):
        return f"has padding {layer.padding}, so its output would change shape; {centred} is needed"
    return None


def _pointwise(layer: nn.Conv2d, init: str, generator: torch.Generator) -> nn.Conv2d:
    new = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        1,
        (layer.stride[0], layer.stride[1]),
        groups=layer.groups,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        if init == "inherit":
            new.weight.copy_(layer.weight.sum((2, 3), keepdim=True))
        else:
            weight: Tensor = torch.empty(new.weight.shape)
            nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)
            new.weight.copy_(weight)
        if layer.bias is not None and new.bias is not None:
            new.bias.copy_(layer.bias if init == "inherit" else torch.zeros_like(layer.bias))
    new.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None and new.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new.train(layer.training)
