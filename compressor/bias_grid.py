"""Biases of quantized layers on the grid on which integer kernels add them.

An INT8 layer sums in steps of (input step x weight step). onnxruntime rounds a float bias to that grid when it opens a
model (its WeightBiasQuantization), so a bias between two steps means one thing in PyTorch and another there. The step
is tiny, but each value near a rounding boundary may fall on the other side of it, layer after layer.

Invariant: every bias moves by half a step of its grid at most, and a bias on its grid does not move.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.modes import evaluating

_LARGEST = 2**31 - 1  # int32, which the grid's numbers are stored as
_NO_GRID = torch.zeros(1)
# Where each operation has its input, weight and bias.
_PLACES = {torch.ops.aten.convolution.default: (0, 1, 2), torch.ops.aten.addmm.default: (1, 2, 0)}


def snap_biases(quantized: nn.Module, example: Tensor) -> list[str]:
    """Round the biases of layers whose input and weights are quantized, in place.

    A layer whose input comes to it changed (pooled, say), or which runs with several input ranges, is left alone.

    Args:
        quantized: Network with NNCF's fake quantizers, on the CPU.
        example: Input `(N, C, H, W)`.

    Returns:
        Names of the parameters that are on their grid now.
    """
    from nncf.torch.quantization.layers import BaseQuantizer

    steps: dict[int, Tensor] = {}  # of quantized tensors, by where they lie; views lie there too
    alive: list[Tensor] = []  # so that no other tensor comes to lie there
    grids: dict[int, list[Tensor]] = {}  # per bias

    def note(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer, BaseQuantizer)
        steps[out.data_ptr()] = layer.get_parameters_for_torch_fq()[2].detach().reshape(-1)
        alive.append(out)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in _PLACES:
                x, weight, bias = (args[place] for place in _PLACES[func])
                if isinstance(bias, Tensor):
                    of_input, of_weight = (steps.get(tensor.data_ptr()) for tensor in (x, weight))
                    grid = _NO_GRID if of_input is None or of_weight is None else of_input * of_weight
                    grids.setdefault(bias.data_ptr(), []).append(grid)
            return out

    hooks = [layer.register_forward_hook(note) for layer in quantized.modules() if isinstance(layer, BaseQuantizer)]
    try:
        with evaluating(quantized), Watch():  # type: ignore[no-untyped-call]
            quantized(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    snapped = []
    for name, parameter in quantized.named_parameters():
        uses = grids.get(parameter.data_ptr(), [])
        if not uses or any(not torch.equal(uses[0], other) for other in uses):
            continue
        if uses[0].numel() in (1, parameter.numel()) and bool((uses[0] > 0).all()):
            with torch.no_grad():
                steps_of = (parameter / uses[0]).round()
                parameter.copy_(torch.where(steps_of.abs() <= _LARGEST, steps_of * uses[0], parameter))
            snapped.append(name)
    return snapped
