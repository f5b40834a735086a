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
    first, step = _grid(low.reshape(-1, 1), span.reshape(-1, 1), levels)
    inverse, scale = _factor(step.reciprocal()), _factor(step)
    clamp = _clamp_to(first, first + (levels - 1))
    for rows, (x_piece, out_piece), (values,) in _pieces(low, 1, x, out):
        values.copy_(x_piece).mul_(inverse(rows)).round_()
        out_piece.copy_(clamp(values, rows).mul_(scale(rows)))
    return out


def fake_quantize_gradients(
    grad: Tensor,
    x: Tensor,
    rounded: Tensor,
    low: Tensor,
    span: Tensor,
    level_low: int,
    level_high: int,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the input, by `low` and by `span` (for a symmetric quantiser: by its scale).

    Straight-through inside the range, learned ranges in the manner of LSQ (arXiv 1902.08153), as NNCF has them.
    Outside it `rounded` has one of two values, so that two sums over what was stopped there tell its two sides apart.

    Args:
        grad: By the result.
        x: As given to `fake_quantize`, with `low` and `span`.
        rounded: Its result, which the layer that reads it keeps as well.
    """
    if axis := _channel_axis(low):
        g, v, r, lowest, width = (_swapped(value, axis) for value in (grad, x, rounded, low, span))
        found, found_low, found_span = fake_quantize_gradients(g, v, r, lowest, width, level_low, level_high, levels)
        grad_x = torch.empty_like(x).copy_(found.transpose(0, axis))
        return grad_x, found_low.transpose(0, axis), found_span.transpose(0, axis)
    shape = low.shape
    low, span = low.reshape(-1, 1), span.reshape(-1, 1)
    grad_x = torch.empty_like(x)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    within, dot = _within(low, low + span), _dot_of_rows if low.numel() > 1 else _dot
    sums: list[Tensor] = []  # of each row, or of each part of the only one: what is stopped, its ends, what is inside
    for rows, pieces, (values, upstream, passed, result) in _pieces(low, 4, grad, x, rounded, grad_x):
        grad_piece, x_piece, rounded_piece, grad_x_piece = pieces
        within(upstream.copy_(grad_piece), values.copy_(x_piece), rows, passed)
        grad_x_piece.copy_(passed)
        stopped, difference = upstream.sub_(passed), torch.sub(result.copy_(rounded_piece), values, out=values)
        sums.append(torch.cat([stopped.sum(1, keepdim=True), dot(stopped, result), dot(passed, difference)], 1))
    outside, ends, inside = torch.cat(sums).view(low.numel(), -1, 3).sum(1, keepdim=True).unbind(2)
    first, step = _grid(low, span, levels)
    least, most = ((end * step).to(rounded.dtype).to(low.dtype) for end in (first, first + (levels - 1)))
    above = (ends - least * outside) / (most - least)
    grad_span = inside / span + above + (outside - above) * (level_low / level_high)
    return grad_x, outside.reshape(shape), grad_span.reshape(shape)


def _grid(low: Tensor, span: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """First of the steps, an integer so that zero is on the grid, and their size."""
    step = span / (levels - 1)
    return torch.round(low / step), step


def _factor(value: Tensor) -> Callable[[slice], Tensor | float]:
    """What rows are multiplied by: a number costs less than a tensor of one."""
    if _one_range(value):
        number = value.item()
        return lambda rows: number
    return lambda rows: value[rows]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two (1, K), as (1, 1)."""
    return torch.dot(a.view(-1), b.view(-1)).reshape(1, 1)


def _dot_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Sums of the products along the rows of two (R, K), as (R, 1); overwrites `b`."""
    return b.mul_(a).sum(1, keepdim=True)


def _clamp_to(low: Tensor, high: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """In-place clamp of rows, (R, K), to ranges (R, 1).

    With tensors as bounds `clamp_` is not vectorised on CPUs (torch 2.13); with numbers it is. The rows of a symmetric
    quantiser share their bounds, counted in steps.
    """
    if low.device.type == "cpu" and bool((low == low[0]).all() & (high == high[0]).all()):
        least, most = low[0].item(), high[0].item()
        return lambda values, rows: values.clamp_(least, most)
    return lambda values, rows: torch.minimum(torch.maximum(values, low[rows], out=values), high[rows], out=values)


def _within(low: Tensor, high: Tensor) -> Callable[[Tensor, Tensor, slice, Tensor], Tensor]:
    """Writes to its last argument what passes of the rows of `upstream`: where `low <= values <= high`, else 0."""
    operation = torch.ops.aten.hardtanh_backward.grad_input  # which leaves its bounds out
    infinity = torch.full_like(low, torch.inf)
    if _one_range(low):
        least, most = torch.nextafter(low, -infinity).item(), torch.nextafter(high, infinity).item()
        return lambda upstream, values, rows, out: operation(upstream, values, least, most, grad_input=out)
    if low.device.type == "cpu" and torch.equal(low, -high):
        beyond_one = torch.nextafter(torch.ones((), dtype=low.dtype), infinity.view(-1)[0]).item()
        # The quotient is at most one, rounded, where the dividend is at most the divisor: the fused operation again.
        return lambda upstream, values, rows, out: operation(
            upstream, torch.div(values, high[rows], out=out), -beyond_one, beyond_one, grad_input=out
        )
    clamp = _clamp_to(low, high)
    return lambda upstream, values, rows, out: clamp(out.copy_(values), rows).eq_(values).mul_(upstream)


def _one_range(low: Tensor) -> bool:
    """Whether bounds can be plain numbers, which on a CPU are free to read."""
    return low.numel() == 1 and low.device.type == "cpu"


def _channel_axis(low: Tensor) -> int:
    """The axis along which ranges differ; 0 also where there is one range."""
    return next((axis for axis, size in enumerate(low.shape) if size > 1), 0)


def _swapped(x: Tensor, axis: int) -> Tensor:
    return x.transpose(0, axis).contiguous()


def _pieces(low: Tensor, scratch: int, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...], list[Tensor]]]:
    """Cut tensors of one shape and memory layout into (R, K) views that stay in a core's cache from pass to pass.

    Args:
        low: Of one value, or of as many as the first dimension of `tensors`, whose indices have a range each.
        scratch: How many tensors to work in are wanted, of the dtype of `low`; the same memory for every piece.

    Yields:
        Which rows; those rows (or a part of the only one) of every tensor; the scratch tensors, of the same shape.
    """
    count = low.numel()
    flat = [_in_memory_order(tensor).view(count, -1) for tensor in tensors]
    width = flat[0].shape[1]
    height = -(-count // -(-count * width // PIECE))  # rows of a piece, as even as can be
    size, axis = (PIECE, 1) if count == 1 else (height, 0)
    cut = [view.split(size, axis) for view in flat]  # type: ignore[no-untyped-call]
    work = [torch.empty_like(cut[0][0], dtype=low.dtype) for _ in range(scratch)]
    for start, pieces in zip(itertools.count(0, height), zip(*cut, strict=True)):
        if pieces[0].shape != work[0].shape:  # the last
            work = [values.view(-1)[: pieces[0].numel()].view(pieces[0].shape) for values in work]
        yield slice(None) if count == 1 else slice(start, start + height), pieces, work


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
        ctx.save_for_backward(x, low, scale - low)
        ctx.levels = (level_low, level_high, levels)
        _keep(ctx, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input and the scale."""
        x, low, span = ctx.saved_tensors
        rounded = _kept(ctx, x, low, span)
        grad_x, _, grad_scale = fake_quantize_gradients(grads[0], x, rounded, low, span, *ctx.levels)
        return grad_x, grad_scale, None, None, None


class AsymmetricQuantize(torch.autograd.Function):
    """In the place of NNCF 3.4's `QuantizeAsymmetric`, whose arguments these are: a lowest value and a range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, span: Tensor, level_low: int, level_high: int, levels: int) -> Tensor:
        """Quantise `x`, see `fake_quantize`."""
        x = _dense(x)
        rounded = fake_quantize(x, low, span, levels)
        ctx.save_for_backward(x, low, span)
        ctx.levels = (level_low, level_high, levels)
        _keep(ctx, rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the input, the lowest value and the range."""
        x, low, span = ctx.saved_tensors
        rounded = _kept(ctx, x, low, span)
        return *fake_quantize_gradients(grads[0], x, rounded, low, span, *ctx.levels), None, None, None


def _keep(ctx: Any, rounded: Tensor) -> None:
    """Keep the output for the backward pass, unless the network changes it in place (`x += shortcut`, as ResNets do).

    Autograd would refuse that of a tensor in `save_for_backward`. Detached, since the output holds its own node.
    """
    ctx.rounded, ctx.version = rounded.detach(), rounded._version


def _kept(ctx: Any, x: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """The output as it was; computed again where it has been changed since."""
    rounded: Tensor = ctx.rounded
    del ctx.rounded  # nodes live on after their backward pass, and would hold the memory
    return rounded if rounded._version == ctx.version else fake_quantize(x, low, span, ctx.levels[-1])


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
