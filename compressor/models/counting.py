"""Multiply-accumulates and parameters of a network.

Invariant: figures are exact integers for one sample; FLOPs would be twice the MACs.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from compressor.modes import evaluating

_QUANTIZER = "__nncf_hooks"  # NNCF 3.4 keeps its quantizers' parameters below this name


@dataclass(frozen=True)
class Counts:
    """What one sample costs.

    Attributes:
        macs: Multiply-accumulates of convolutions and linear layers. BatchNorm, activations, pooling and additions are
            not counted: deployed, BatchNorm is folded and the others are bound by memory.
        params: Elements of all parameters, a shared one counted once; the ranges of fake quantizers are not counted.
        per_layer: MACs by layer name, in order of execution; a layer that runs twice counts twice.
    """

    macs: int
    params: int
    per_layer: dict[str, int]


def count(module: nn.Module, example: Tensor) -> Counts:
    """Count by one forward pass with hooks; the network's mode and parameters are left as they were.

    Args:
        module: Network whose forward takes one tensor.
        example: Input `(N, C, H, W)`; the figures are for one sample, whatever N is.
    """
    batch = example.shape[0]
    per_layer: dict[str, int] = {}
    hooks = [
        layer.register_forward_hook(_hook(name, batch, per_layer))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    ]
    try:
        with evaluating(module):  # a pass in training mode would move BatchNorm's statistics
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    params = sum(value.numel() for name, value in module.named_parameters() if _QUANTIZER not in name)
    return Counts(sum(per_layer.values()), params, per_layer)


def _hook(name: str, batch: int, per_layer: dict[str, int]):  # type: ignore[no-untyped-def]
    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            macs = output.numel() * layer.in_features
        else:
            assert isinstance(layer, nn.modules.conv._ConvNd)
            # A convolution does one product per weight of a filter and output position; a transposed one per weight of
            # an input channel and input position.
            positions = inputs[0] if layer.transposed else output
            macs = positions.numel() * layer.weight[0].numel()
        per_layer[name] = per_layer.get(name, 0) + macs // batch

    return record
