"""Addressing layers by what they are in a network, so that one recipe serves many backbones.

Invariant: a role depends on one pass of the network at the given input size, never on names.
"""

import math
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.modes import evaluating

PREFIX = "role:"
_MAPPINGS = (nn.modules.conv._ConvNd, nn.Linear)


def find_roles(module: nn.Module, example: Tensor) -> dict[str, set[str]]:
    """Names of modules by role; the network's modes are restored.

    `stem`: from the input up to, not including, the second convolution that runs. `head`: what runs after the last
    layer whose output is a map of more than one position: the classifier, and what lies between it and the pooling.
    `body`: the rest. `strideN`: layers of the body whose map is N times smaller than the image, N a power of two; what
    works on pooled values in between (squeeze-excite) counts as what runs before it. A container has a role when all
    layers with parameters inside it have it.

    Args:
        module: Network whose forward takes one tensor.
        example: Input `(N, C, H, W)` at the size the network is used at.
    """
    runs: list[tuple[str, nn.Module, int | None]] = []  # name, layer, positions along the shorter side of its map
    hooks = [
        layer.register_forward_hook(lambda m, _i, out, name=name: runs.append((name, m, _positions(m, out))))
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    try:
        with evaluating(module):
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    convolutions = [i for i, (_, layer, _) in enumerate(runs) if isinstance(layer, nn.modules.conv._ConvNd)]
    body_begins = convolutions[1] if len(convolutions) > 1 else len(runs)
    mapped = [i for i, (_, _, side) in enumerate(runs) if side is not None and side > 1]
    head_begins = max(mapped, default=-1) + 1
    # A norm or an activation that ends the last map belongs to it.
    while head_begins < len(runs) and not isinstance(runs[head_begins][1], _MAPPINGS):
        head_begins += 1
    roles: dict[str, set[str]] = {}
    stride = 1
    for i, (name, _, side) in enumerate(runs):
        if side is not None and side > 1:
            stride = 2 ** max(0, round(math.log2(min(example.shape[-2:]) / side)))
        if i < body_begins:
            found = ["stem"]
        elif i >= head_begins:
            found = ["head"]
        else:
            found = ["body", f"stride{stride}"]
        for role in found:
            roles.setdefault(role, set()).add(name)
    ran = {name for name, _, _ in runs}
    for role, layers in roles.items():
        for name, container in module.named_modules():
            inside = {inner for inner, _ in container.named_modules(prefix=name) if inner in ran}
            if name and inside and inside <= layers:
                roles[role] = roles[role] | {name}
    return roles


def named_layers(module: nn.Module, globs: Iterable[str], example: Tensor) -> list[str]:
    """The globs, with each role replaced by the names of its convolutions and linear layers."""
    found: list[str] = []
    for glob in globs:
        if glob.startswith(PREFIX):
            members = find_roles(module, example).get(glob.removeprefix(PREFIX), set())
            found += sorted(name for name in members if isinstance(module.get_submodule(name), _MAPPINGS))
        else:
            found.append(glob)
    return found


def _positions(layer: nn.Module, output: object) -> int | None:
    """Shorter side of a layer's map; None for what is no convolution or linear layer, or gives no map."""
    value = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if value is None or not isinstance(layer, _MAPPINGS):
        return None
    if value.dim() != 4:
        return 1 if value.dim() == 2 else None
    sides = value.shape[1:3] if isinstance(layer, nn.Linear) else value.shape[2:]  # linear layers run on (N, H, W, C)
    return min(sides)
