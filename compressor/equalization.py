"""Channels between two convolutions brought to similar ranges, for one quantization range that serves them all.

Invariant: in evaluation mode the network computes the same function before and after, up to rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.layer_pairs import direct_pairs, is_plain_convolution, scales_with_weight
from compressor.modes import evaluating

# Exponent of the channel ranges: 1 makes all of them equal and moves the whole spread into the next weights, 0 does
# nothing; the square root shares it between the two, as arXiv 1906.04721 does.
_SHARE = 0.5


def equalize_depthwise(module: nn.Module, batches: Sequence[Tensor]) -> list[tuple[str, str]]:
    """Bring the channels between a depthwise and its pointwise convolution to similar ranges, in place.

    One range per tensor serves every channel of an activation, so a channel much smaller than the largest keeps few of
    the 256 levels. With nothing between the two convolutions, dividing a depthwise filter and multiplying the pointwise
    column by the same factor changes nothing else (cross-layer equalisation, arXiv 1906.04721, here with ranges
    measured on the calibration images).

    Args:
        module: Network, after `fold_batchnorm`.
        batches: Calibration inputs, each (N, C, H, W).

    Returns:
        Names of the equalised pairs.
    """
    pairs = direct_pairs(module, batches[0], _is_depthwise, _is_pointwise)
    with evaluating(module):
        pairs = [pair for pair in pairs if all(scales_with_weight(module.get_submodule(name)) for name in pair)]
    ranges: dict[str, Tensor] = {}

    def observe(name: str, output: Tensor) -> None:
        largest = output.abs().amax((0, 2, 3))  # (C,)
        ranges[name] = torch.maximum(ranges[name], largest) if name in ranges else largest

    handles = [
        module.get_submodule(first).register_forward_hook(lambda _m, _i, out, name=first: observe(name, out))
        for first, _ in pairs
    ]
    with evaluating(module):
        try:
            for batch in batches:
                module(batch)
        finally:
            for handle in handles:
                handle.remove()
        for first, second in pairs:
            depthwise, pointwise = module.get_submodule(first), module.get_submodule(second)
            assert isinstance(depthwise, nn.Conv2d)
            assert isinstance(pointwise, nn.Conv2d)
            spread = ranges[first].double()
            used = spread > 0  # a channel that is always zero has no range to bring anywhere
            scale = torch.ones_like(spread)
            scale[used] = (spread[used] / spread[used].mean()) ** _SHARE
            _rescale(depthwise.weight, 1 / scale[:, None, None, None])
            if depthwise.bias is not None:
                _rescale(depthwise.bias, 1 / scale)
            _rescale(pointwise.weight, scale[None, :, None, None])
    return pairs


def _rescale(parameter: Tensor, factor: Tensor) -> None:
    parameter.copy_((parameter.double() * factor).to(parameter.dtype))


def _is_depthwise(child: nn.Module) -> bool:
    return is_plain_convolution(child) and isinstance(child, nn.Conv2d) and 1 < child.groups == child.out_channels


def _is_pointwise(child: nn.Module) -> bool:
    return (
        is_plain_convolution(child)
        and isinstance(child, nn.Conv2d)
        and child.kernel_size == (1, 1)
        and child.groups == 1
    )
