"""The oracle: cutting channels out of a network must give the outputs of the network with those channels masked.

Invariant: the network asked about is never touched; trials run on a copy with random weights.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.surgery import mask, shrink

# Of the output's range; a wrongly cut channel changes the output by about the range itself.
_TOLERANCE = {torch.float64: 1e-6}
_FLOAT_TOLERANCE = 1e-3


def randomised_twin(module: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a copy under whose weights every channel matters, in evaluation mode, and a random input for it."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).eval()
    _randomise(twin, generator)
    _normalise(twin, torch.randn((4, *example.shape[1:]), generator=generator).to(example), generator)
    return twin, torch.randn(example.shape, generator=generator).to(example)


def holds(twin: nn.Module, x: Tensor, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> bool:
    """Whether cutting and masking the same channels give the same output."""
    chosen = {group.name: keep[group.name] for group in groups}
    if _agree(twin, x, groups, chosen):
        return True
    # Random weights can make a network amplify rounding until nothing of the output is left: double precision tells
    # that from a wrong cut.
    return x.dtype is torch.float32 and _agree(copy.deepcopy(twin).double(), x.double(), groups, chosen)


def _agree(twin: nn.Module, x: Tensor, groups: Sequence[ChannelGroup], chosen: Mapping[str, Sequence[int]]) -> bool:
    masked, cut = copy.deepcopy(twin), copy.deepcopy(twin)
    with torch.no_grad():
        mask(masked, groups, chosen)
        try:
            expected = _outputs(masked(x))
            del masked
            shrink(cut, groups, chosen)
            outputs = _outputs(cut(x))
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):  # shapes that no longer fit
            return False
    return len(outputs) == len(expected) and all(map(_equal, outputs, expected))


def _outputs(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _equal(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape or output.dtype != expected.dtype or not bool(expected.isfinite().all()):
        return False
    if not output.is_floating_point():
        return torch.equal(output, expected)
    scale = float(expected.abs().max())
    return float((output - expected).abs().max()) <= _TOLERANCE.get(output.dtype, _FLOAT_TOLERANCE) * max(scale, 1e-12)


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill weights and statistics with values under which every channel matters.

    Pretrained or fresh weights may hide a fault: a BatchNorm scale of zero makes a whole branch invisible.
    """

    def fill(tensor: Tensor | None, mean: float, spread: float) -> None:
        if tensor is not None:
            tensor.copy_(mean + spread * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                fill(layer.weight, 1, 0.5)
                fill(layer.bias, 0, 0.5)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                fill(layer.weight, 0, (6 / fan_in) ** 0.5)  # He's uniform initialisation keeps the signal's size
                fill(layer.bias, 0, 0.2)
            elif not isinstance(layer, nn.PReLU):
                # Scales of layers and of branches, which may start so close to zero that they hide what they scale.
                for parameter in layer.parameters(recurse=False):
                    fill(parameter, 1, 0.5)


def _normalise(twin: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Give every BatchNorm statistics near those of its input.

    With any others a deep network amplifies, and its output is rounding errors.
    """
    norms = [
        layer
        for layer in twin.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of what is seen
        norm.train()
    with torch.no_grad():
        # A network that cannot be run in this mode keeps plain statistics: the oracle only gets less sharp.
        with contextlib.suppress(RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            twin(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            spread = norm.running_var.clamp(min=1e-4)
            draw = torch.rand((2, *spread.shape), generator=generator).to(spread)
            norm.running_mean += (draw[0] - 0.5) * 0.4 * spread.sqrt()
            norm.running_var.copy_(spread * (0.5 + draw[1]))
            norm.momentum = momentum
    twin.eval()
