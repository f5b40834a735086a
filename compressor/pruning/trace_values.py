"""What operations on values do to channels: those that move elements, and those in which channels meet.

Invariant: labels go where the elements go; channels that meet in one number are joined, or some of them must stay.

Each public function is the rule of some operations. Those that take labels are given those of the first argument; all
return labels of the result, None where it carries none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.pruning.channels import compact_pair, split_axes, varies
from compressor.pruning.trace_state import CONSTANT, PARAMETER, WEIGHS, Call, TraceState, not_prunable, spread


def move(_state: TraceState, call: Call, labels: Tensor) -> Any:
    return call.func(labels, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "memory_format"})


def view(state: TraceState, call: Call, labels: Tensor) -> Tensor:
    """A view; where it splits an axis of channels, the factor that stays is joined (`view(n, 2, c // 2, h, w)`)."""
    shape = call.result.shape
    out = labels.reshape(tuple(shape))
    for axes in split_axes(labels.shape, shape):
        varying = [axis for axis in axes if varies(out, axis)]
        if len(varying) > 1:
            # The code says which factor is fixed only in a way that cannot be seen here; it is the smaller one in
            # all that we know (groups, radix, cardinality), and the oracle judges.
            free = max(reversed(varying), key=lambda axis: out.shape[axis])
            state.join_along(out, [axis for axis in varying if axis != free])
    return out


def restriding(state: TraceState, call: Call, labels: Tensor) -> Any:
    if labels.shape == call.result.shape and max(labels.shape[2:]) == 1:
        return labels  # global pooling of channels_last values: the same numbers, other strides of axes of length one
    return unknown(state, call)


def concatenation(state: TraceState, call: Call) -> Tensor:
    values = [value for value in call.args[0] if value.dim() > 1 or value.numel()]
    axis = call.argument(1, "dim", 0) % values[0].dim()
    parts = []
    for value in values:
        labels = state.labels_of(value)
        if labels is None:
            labels = spread(state.channels.fixed(CONSTANT, value.shape[axis]), value.shape, axis)
        parts.append(labels)
    return torch.cat(parts, axis)


def stacking(state: TraceState, call: Call) -> Tensor:
    values = call.args[0]
    # Stacked parts must stay equally long: the same place in each of them goes as one.
    whole = _combined(state, values, values[0].shape)
    return torch.stack(
        [whole if (own := state.labels_of(value)) is None else own for value in values], call.argument(1, "dim", 0)
    )


def slicing(state: TraceState, call: Call, labels: Tensor) -> Tensor:
    part: Tensor = call.func(labels, *call.args[1:], **call.kwargs)
    axis = call.argument(1, "dim", 0) % labels.dim()
    size = labels.shape[axis]
    if part.shape[axis] == size or not varies(labels, axis):
        return part
    start = call.args[2] if len(call.args) > 2 and call.args[2] is not None else 0
    end = call.args[3] if len(call.args) > 3 and call.args[3] is not None else size
    for bound in (start, end):
        if 0 < bound % size < size and abs(bound) <= size:
            _keep_sizes(state, labels, axis, bound % size)
    return part


def splitting(state: TraceState, call: Call, labels: Tensor) -> Any:
    parts = call.func(labels, *call.args[1:], **call.kwargs)
    axis = call.argument(2, "dim", 0) % labels.dim()
    if len(parts) < 2 or not varies(labels, axis):
        return parts
    sizes = [part.shape[axis] for part in parts]
    if call.name == "split_with_sizes":
        _keep_sizes(state, labels, axis, sizes)
    elif len(set(sizes)) == 1:
        for part in parts[1:]:  # equal parts must stay equal
            state.channels.join_all(parts[0], part)
        _keep_sizes(state, labels, axis, sizes[0])
    return parts


def _keep_sizes(state: TraceState, labels: Tensor, axis: int, value: int | list[int]) -> None:
    """Where a module that is running keeps what it splits at, or the whole width, that must follow the channels."""
    width = labels.shape[axis]
    if _follow_attribute(state, labels, axis, value, 0, width if isinstance(value, list) else value):
        return
    if isinstance(value, list):
        starts = [sum(value[:i]) for i in range(len(value))]
        found = [_follow_attribute(state, labels, axis, n, at, n) for at, n in zip(starts, value, strict=True)]
        if any(found):
            return
    _follow_attribute(state, labels, axis, width, 0, width)


def _follow_attribute(
    state: TraceState, labels: Tensor, axis: int, value: int | list[int], start: int, count: int
) -> bool:
    """Couple attributes that equal `value` to the channels they count; False if there is none."""
    for where, layer in reversed(state.running):
        names = [name for name, kept in vars(layer).items() if not name.startswith("_") and _holds(kept, value)]
        if names:
            reads = state.per_channel(labels.narrow(axis, start, count), axis)
            for name in names:
                state.couple(where, f"sizes:{name}", reads)
            return True
    return False


def _holds(kept: object, wanted: int | list[int]) -> bool:
    if isinstance(wanted, int):
        return isinstance(kept, int) and not isinstance(kept, bool) and kept == wanted
    return isinstance(kept, list | tuple) and list(kept) == wanted


def padding(state: TraceState, call: Call, labels: Tensor) -> Tensor | None:
    pads = call.args[1]
    if min(pads) < 0:
        state.forbid(labels, "it is cropped by a negative padding")
        return None
    for position in range(0, len(pads), 2):
        axis = labels.dim() - 1 - position // 2
        before, after = pads[position : position + 2]
        if not before and not after:
            continue
        shape = list(labels.shape)
        if not varies(labels, axis):
            shape[axis] += before + after
            labels = labels.narrow(axis, 0, 1).expand(shape)
            continue
        parts = [labels]
        for count, place in ((before, 0), (after, 2)):  # in front, behind
            if count:
                shape[axis] = count
                parts.insert(place, spread(state.channels.fixed(CONSTANT, count), shape, axis))
        labels = torch.cat(parts, axis)
    return labels


def windows(state: TraceState, call: Call, labels: Tensor) -> Any:
    return call.labels_of_first(spread(state.per_channel(labels), call.first_result.shape))


def softmax(state: TraceState, call: Call, labels: Tensor) -> Tensor:
    state.join_along(labels, [call.args[1]])
    return labels


def reduction(state: TraceState, call: Call, labels: Tensor) -> Any:
    # The norms take their order before the axes.
    axes = call.argument(2 if "norm" in call.name else 1, "dim")
    if isinstance(axes, float) or axes is None:
        axes = []
    numbers = [axes] if isinstance(axes, int) else list(axes)
    chosen = sorted({axis % labels.dim() for axis in numbers} if numbers else set(range(labels.dim())))
    state.join_along(labels, chosen)
    reduced = labels
    for axis in chosen:
        reduced = reduced.narrow(axis, 0, 1)
    if call.first_result.dim() != labels.dim():
        for axis in reversed(chosen):
            reduced = reduced.squeeze(axis)
    return reduced if isinstance(call.result, Tensor) else [reduced for _ in call.result]


def pointwise(state: TraceState, call: Call) -> Tensor:
    values = [leaf for leaf in tree_leaves(call.args) if isinstance(leaf, Tensor)]
    return _combined(state, values, call.first_result.shape)


def _combined(state: TraceState, values: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Values of broadcastable shapes, combined element by element."""
    known = [(value, labels) for value in values if (labels := state.labels_of(value)) is not None]
    total: Tensor | None = None
    for value, labels in known:
        wide = labels.expand(tuple(shape)) if labels.dim() <= len(shape) else labels
        if total is None:
            total, total_shape = wide, list(value.shape)
            continue
        total_shape = [1] * (len(shape) - len(total_shape)) + total_shape
        own_shape = [1] * (len(shape) - value.dim()) + list(value.shape)
        # One channel that is spread over many scales them all and cannot go with any one of them.
        own_single = any(own_shape[i] == 1 < total_shape[i] and varies(total, i) for i in range(len(shape)))
        total_single = any(total_shape[i] == 1 < own_shape[i] and varies(wide, i) for i in range(len(shape)))
        if own_single and total_single:
            state.forbid(wide, "it is combined with all channels of another layer")
            state.forbid(total, "it is combined with all channels of another layer")
        elif own_single:
            state.forbid(wide, WEIGHS)
        elif total_single:
            state.forbid(total, WEIGHS)
            total = wide
        else:
            small_total, small_wide = compact_pair(total, wide)
            state.channels.join_all(small_total, small_wide)
            total = torch.maximum(small_total, small_wide).expand(tuple(shape))
        total_shape = [max(a, b) for a, b in zip(total_shape, own_shape, strict=True)]
    assert total is not None
    for value in values:
        if state.labels_of(value) is None and value.dim():
            own_shape = [1] * (len(shape) - value.dim()) + list(value.shape)
            if any(size > 1 and varies(total, axis) for axis, size in enumerate(own_shape)):
                state.forbid(total, PARAMETER if state.parameter(value) is not None else CONSTANT)
    return total


def unknown(state: TraceState, call: Call) -> Any:
    """Everything read must stay. What comes out in the same shape goes on under the same names."""
    where, layer = state.running[-1]
    is_leaf = not isinstance(layer, nn.Sequential) and next(layer.children(), None) is None
    applied = f"'{where}' applies {call.name} to it, which cannot be traced"
    reason = not_prunable(where, layer) if where and is_leaf else applied
    for leaf in tree_leaves((call.args, call.kwargs)):
        state.forbid(state.labels_of(leaf), reason)
    kept = state.labels_of(call.args[0]) if call.args else None
    out = call.first_result
    if kept is None or not isinstance(out, Tensor) or out.shape != kept.shape:
        return None
    return call.labels_of_first(kept)
