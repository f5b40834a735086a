"""Fake quantisation for NNCF in plain PyTorch operations, in the place of the C++ extension it would compile.

Invariant: same function and same gradients as NNCF's reference kernels in float32, up to rounding of exact ties.
Ranges, grid and sums are float32 even where activations are bf16: in bf16, which is what NNCF would cast the ranges to,
the grid moves by up to a step and a range's gradient is mostly rounding noise.
"""

import logging
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def install_kernels() -> None:
    """Let NNCF's quantisers use `SymmetricQuantize` and `AsymmetricQuantize` in this process.

    NNCF compiles C++ at first use: a minute and more on a busy edge device, a compiler needed, a lock file that hangs
    later runs when killed.
    """
    from nncf.torch.quantization import quantize_functions

    for name, function in (("QuantizeSymmetric", SymmetricQuantize), ("QuantizeAsymmetric", AsymmetricQuantize)):
        if hasattr(quantize_functions, name):
            setattr(quantize_functions, name, function)
        else:
            log.warning("this NNCF has no %s to replace; it compiles its own kernels at first use", name)


def fake_quantize(x: Tensor, low: Tensor, span: Tensor, levels: int) -> Tensor:
    """Round `x` to the grid of `levels` steps from `low` to `low + span`, both float32 and broadcast against `x`.

    Returns:
        The shape of `x`, in float32 for half inputs: the caller casts.
    """
    step = span / (levels - 1)
    first = torch.round(low / step)  # an integer multiple of the step, so that zero is on the grid
    return torch.mul(x, step.reciprocal()).round_().clamp_(first, first + (levels - 1)).mul_(step)


def fake_quantize_gradients(
    grad: Tensor, x: Tensor, low: Tensor, span: Tensor, levels: int, level_low: int, level_high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the input, by `low` and by `span` (for a symmetric quantiser: by its scale).

    Straight-through inside the range, learned ranges in the manner of LSQ (arXiv 1902.08153), as NNCF has them.
    """

    def total(values: Tensor) -> Tensor:
        if low.numel() == 1:
            return values.sum(dtype=low.dtype).reshape(low.shape)
        return values.sum(dim=[d for d in range(x.dim()) if low.shape[d] == 1], keepdim=True, dtype=low.dtype)

    high = low + span
    grad_x = torch.clamp(x, low, high).eq_(x).mul_(grad)
    inside = total(fake_quantize(x, low, span, levels).sub_(x).mul_(grad_x)) / span
    outside = total(grad) - total(grad_x)
    above = total((x > high).to(grad_x.dtype).mul_(grad))
    grad_span = inside + above + (outside - above) * (level_low / level_high)
    return grad_x.to(x.dtype), outside, grad_span


class SymmetricQuantize(torch.autograd.Function):
    """In the place of NNCF 3.4's `QuantizeSymmetric`, whose arguments these are: one scale for both sides of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, level_low: int, level_high: int, levels: int) -> Tensor:
        """Quantise `x`; its dtype and shape are kept."""
        low = scale * (level_low / level_high)
        ctx.save_for_backward(x, low, scale - low)
        ctx.levels = (levels, level_low, level_high)
        return fake_quantize(x, low, scale - low, levels).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input and the scale."""
        grad_x, _, grad_scale = fake_quantize_gradients(grads[0], *ctx.saved_tensors, *ctx.levels)
        return grad_x, grad_scale, None, None, None


class AsymmetricQuantize(torch.autograd.Function):
    """In the place of NNCF 3.4's `QuantizeAsymmetric`, whose arguments these are: a lowest value and a range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, span: Tensor, level_low: int, level_high: int, levels: int) -> Tensor:
        """Quantise `x`; its dtype and shape are kept."""
        ctx.save_for_backward(x, low, span)
        ctx.levels = (levels, level_low, level_high)
        return fake_quantize(x, low, span, levels).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input, the lowest value and the range."""
        return *fake_quantize_gradients(grads[0], *ctx.saved_tensors, *ctx.levels), None, None, None
