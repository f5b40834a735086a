"""Fake quantisation for NNCF in plain PyTorch operations, in the place of the C++ extension it would compile.

Invariant: same function and same gradients as NNCF's reference kernels in float32, up to rounding of exact ties.
Ranges, grid and sums are float32 even where activations are bf16: in bf16, which is what NNCF would cast the ranges to,
the grid moves by up to a step and a range's gradient is mostly rounding noise. Saved for the backward pass: the input,
which the layer before it often keeps, and the result, which the layer after it keeps.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)
PIECE = 1 << 19  # values; a few float32 copies of a piece stay in the caches, and calls of operations few


def install_kernels() -> None:
    """Let NNCF's quantisers use `SymmetricQuantize`, `AsymmetricQuantize` and `TuneRange` in this process.

    NNCF compiles C++ at first use: a minute and more on a busy edge device, a compiler needed, a lock file that hangs
    later runs when killed.
    """
    from nncf.torch.quantization import quantize_functions

    for name, function in KERNELS.items():
        if hasattr(quantize_functions, name):
            setattr(quantize_functions, name, function)
        else:
            log.warning("this NNCF has no %s to replace; it uses its own", name)


def fake_quantize(x: Tensor, low: Tensor, span: Tensor, levels: int) -> Tensor:
    """Round `x` to the grid of `levels` steps from `low` to `low + span`, both float32 and broadcast against `x`.

    Args:
        x: Without gaps in memory, contiguous or channels_last.
        low: One value, or one for each index of a single axis.
        span: As `low`, positive.
        levels: Number of steps and one, 256 for 8 bits.

    Returns:
        Shape and memory format of `x`; its dtype, or under autocast the one that layers compute in, which spares them
        the conversion. One rounding to a half type, at the end.
    """
    if axis := _channel_axis(low):
        rounded = fake_quantize(_swapped(x, axis), _swapped(low, axis), _swapped(span, axis), levels)
        return torch.empty_like(x, dtype=rounded.dtype).copy_(rounded.transpose(0, axis))
    kind = x.device.type
    out = torch.empty_like(x, dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
    step = span.reshape(-1, 1) / (levels - 1)
    first = torch.round(low.reshape(-1, 1) / step)  # an integer multiple of the step, so that zero is on the grid
    clamp = _clamp_to(first, first + (levels - 1))
    inverse = step.reciprocal()
    for rows, (x_piece, out_piece) in _pieces(low.numel(), x, out):
        values = x_piece.to(low.dtype, copy=True).mul_(inverse[rows]).round_()
        out_piece.copy_(clamp(values, rows).mul_(step[rows]))
    return out


def fake_quantize_gradients(
    grad: Tensor,
    x: Tensor,
    rounded: Tensor,
    low: Tensor,
    span: Tensor,
    level_low: int,
    level_high: int,
    *,
    by_low: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients by the input, by `low` (None unless asked for) and by `span` (for a symmetric quantiser: by its scale).

    Straight-through inside the range, learned ranges in the manner of LSQ (arXiv 1902.08153), as NNCF has them.

    Args:
        grad: By the result.
        x: As given to `fake_quantize`, with `low` and `span`.
        rounded: Its result, which the layer that reads it keeps as well.
    """
    if axis := _channel_axis(low):
        g, v, r, lowest, width = (_swapped(value, axis) for value in (grad, x, rounded, low, span))
        found, found_low, found_span = fake_quantize_gradients(
            g, v, r, lowest, width, level_low, level_high, by_low=by_low
        )
        grad_x = torch.empty_like(x).copy_(found.transpose(0, axis))
        return grad_x, None if found_low is None else found_low.transpose(0, axis), found_span.transpose(0, axis)
    shape = low.shape
    low, span = low.reshape(-1, 1), span.reshape(-1, 1)
    high = low + span
    grad_x = torch.empty_like(x)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    within, beyond = _within(low, high), _within(high, None)
    outside, inside, above = (torch.zeros_like(low) for _ in range(3))  # sums over each row
    for rows, (grad_piece, x_piece, rounded_piece, grad_x_piece) in _pieces(low.numel(), grad, x, rounded, grad_x):
        values, upstream = x_piece.to(low.dtype), grad_piece.to(low.dtype)
        passed = within(upstream, values, rows)
        grad_x_piece.copy_(passed)
        if by_low or level_low:
            outside[rows] += upstream.sum(1, keepdim=True) - passed.sum(1, keepdim=True)
        above[rows] += beyond(upstream, values, rows).sum(1, keepdim=True)
        inside[rows] += torch.sub(rounded_piece, values).mul_(passed).sum(1, keepdim=True)
    grad_span = inside / span + above + (outside - above) * (level_low / level_high)
    return grad_x, outside.reshape(shape) if by_low else None, grad_span.reshape(shape)


def _clamp_to(low: Tensor, high: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """In-place clamp of rows, (R, K), to ranges (R, 1).

    With tensors as bounds `clamp_` is not vectorised on CPUs (torch 2.13); with numbers it is.
    """
    if _one_range(low):
        least, most = low.item(), high.item()
        return lambda values, rows: values.clamp_(least, most)
    return lambda values, rows: torch.minimum(torch.maximum(values, low[rows], out=values), high[rows], out=values)


def _within(low: Tensor, high: Tensor | None) -> Callable[[Tensor, Tensor, slice], Tensor]:
    """What passes rows of `upstream` where `low <= values <= high`, or without `high` where `values > low`; else 0."""
    if _one_range(low):
        infinity = torch.full_like(low, torch.inf)
        # The fused operation leaves its bounds out.
        least = low.item() if high is None else torch.nextafter(low, -infinity).item()
        most = torch.inf if high is None else torch.nextafter(high, infinity).item()
        return lambda upstream, values, rows: torch.ops.aten.hardtanh_backward(upstream, values, least, most)
    if high is None:
        return lambda upstream, values, rows: torch.gt(values, low[rows], out=torch.empty_like(values)).mul_(upstream)
    clamp = _clamp_to(low, high)
    return lambda upstream, values, rows: clamp(values.clone(), rows).eq_(values).mul_(upstream)


def _one_range(low: Tensor) -> bool:
    """Whether bounds can be plain numbers, which on a CPU are free to read."""
    return low.numel() == 1 and low.device.type == "cpu"


def _channel_axis(low: Tensor) -> int:
    """The axis along which ranges differ; 0 also where there is one range."""
    return next((axis for axis, size in enumerate(low.shape) if size > 1), 0)


def _swapped(x: Tensor, axis: int) -> Tensor:
    return x.transpose(0, axis).contiguous()


def _pieces(rows: int, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Cut tensors of one shape and memory layout into (R, K) views that stay in a core's cache from pass to pass.

    Args:
        rows: 1, or the size of the first dimension, where each has a range of its own.

    Yields:
        Which rows, and those rows (or a part of the only one) of every tensor.
    """
    flat = [_in_memory_order(tensor).view(rows, -1) for tensor in tensors]
    width = flat[0].shape[1]
    height = max(1, PIECE // width)  # rows of a piece
    size, axis = (PIECE, 1) if rows == 1 else (height, 0)
    cut = [view.split(size, axis) for view in flat]  # type: ignore[no-untyped-call]
    for start, pieces in zip(itertools.count(0, height), zip(*cut, strict=True)):
        yield slice(None) if rows == 1 else slice(start, start + height), pieces


def _dense(x: Tensor) -> Tensor:
    """`x`, or a copy where its values are not side by side in one of the two usual orders."""
    return x if _in_memory_order(x).is_contiguous() else x.contiguous()


def _in_memory_order(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x


class SymmetricQuantize(torch.autograd.Function):
    """In the place of NNCF 3.4's `QuantizeSymmetric`, whose arguments these are: one scale for both sides of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, level_low: int, level_high: int, levels: int) -> Tensor:
        """Quantise `x`, see `fake_quantize`."""
        x, low = _dense(x), scale * (level_low / level_high)
        rounded = fake_quantize(x, low, scale - low, levels)
        ctx.save_for_backward(x, rounded, low, scale - low)
        ctx.levels = (level_low, level_high)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input and the scale."""
        grad_x, _, grad_scale = fake_quantize_gradients(grads[0], *ctx.saved_tensors, *ctx.levels, by_low=False)
        return grad_x, grad_scale, None, None, None


class AsymmetricQuantize(torch.autograd.Function):
    """In the place of NNCF 3.4's `QuantizeAsymmetric`, whose arguments these are: a lowest value and a range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, span: Tensor, level_low: int, level_high: int, levels: int) -> Tensor:
        """Quantise `x`, see `fake_quantize`."""
        x = _dense(x)
        rounded = fake_quantize(x, low, span, levels)
        ctx.save_for_backward(x, rounded, low, span)
        ctx.levels = (level_low, level_high)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input, the lowest value and the range."""
        return *fake_quantize_gradients(grads[0], *ctx.saved_tensors, *ctx.levels), None, None, None


class TuneRange(torch.autograd.Function):
    """In the place of NNCF 3.4's, whose arguments these are: moves one end of a range so that zero is on the grid.

    One range is a matter of a few numbers; as tensor operations it takes as long as quantising a small tensor.
    """

    @staticmethod
    def forward(ctx: Any, low: Tensor, span: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Both ends are moved to take in zero; then the lower or the upper one, whichever leaves the wider range."""
        lows, spans = low.detach().cpu().numpy(), span.detach().cpu().numpy()
        high, lowest = np.maximum(lows + spans, 0), np.minimum(lows, 0)
        n = lows.dtype.type(levels - 1)
        zero = np.round(-lowest * (n / (high - lowest)))  # the step that zero is on
        with np.errstate(divide="ignore", invalid="ignore"):
            other_low = np.where(zero < n, zero / (zero - n) * high, lowest)
            other_high = np.where(zero > 0, (zero - n) / zero * lowest, high)
        lower = high - other_low > other_high - lowest
        tuned = np.where(lower, other_low, lowest)
        span_tuned = np.where(lower, high, other_high) - tuned
        return torch.from_numpy(tuned).to(low), torch.from_numpy(span_tuned).to(span)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Passed on as they are."""
        return *grads, None


# By the names that NNCF 3.4 has for them.
KERNELS = {"QuantizeSymmetric": SymmetricQuantize, "QuantizeAsymmetric": AsymmetricQuantize, "TuneRange": TuneRange}
