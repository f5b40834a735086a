"""What layers do to channels, which read some and write their own, and what matrix products of values do.

Invariant: a layer that is not one of those known, or whose weights are computed, forbids what it reads and writes.

Each public function is the rule of some operations and returns labels of the result, None where it carries none.
"""

import torch
from torch import Tensor, nn

from compressor.pruning.trace_state import PARAMETER, WEIGHS, Call, TraceState, not_prunable, spread

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def convolution(state: TraceState, call: Call) -> Tensor:
    x, weight, transposed, groups = call.args[0], call.args[1], call.args[6], call.args[8]
    shape = call.result.shape
    state.forbid(state.labels_of(weight), "it is used as a weight")
    reads = state.reads(x, 1)
    name, layer, problem = _layer(state, weight, nn.Conv2d)
    fixed = not isinstance(state.parameter(weight), nn.Parameter)
    if fixed and groups == x.shape[1] == shape[1]:
        # A fixed filter for each channel, as in anti-aliased pooling, unless a layer made it of its own weights.
        state.forbid(reads if next(layer.parameters(recurse=False), None) is not None else None, problem)
        return spread(reads, shape)
    if not problem and transposed:
        problem = not_prunable(name, layer)
    if not problem and isinstance(layer, nn.Conv2d) and 1 < groups == layer.out_channels != layer.in_channels:
        problem = f"'{name}' is a grouped convolution with one filter a group and several inputs"
    if not problem and 1 < groups == x.shape[1] == shape[1]:
        own = state.couple(name, "depthwise", reads)
        return spread(torch.where(reads > 0, reads, own), shape)
    return spread(_written(state, name, reads, shape[1], problem), shape)


def linear(state: TraceState, call: Call) -> Tensor | None:
    x, weight = call.args[1:3] if call.name == "addmm" else call.args[:2]
    if state.parameter(weight) is None:
        return _product(state, x, weight, call.result.shape)
    name, _, problem = _layer(state, weight, nn.Linear)
    reads = state.reads(x, x.dim() - 1)
    return _written(state, name, reads, call.result.shape[-1], problem).expand(call.result.shape)


def batched_product(state: TraceState, call: Call) -> Tensor | None:
    a, b = call.args[-2:] if call.name == "bmm" else call.args[1:3]
    return _product(state, a, b, call.result.shape)


def _product(state: TraceState, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor | None:
    """Matrix product of two values (..., n, k) x (..., k, m); channels may lie along n or m, not along k."""
    left, right = state.labels_of(a), state.labels_of(b)
    if left is not None:
        state.join_along(left, [-1])
        left = left[..., :1].expand(shape)
    if right is not None:
        state.join_along(right, [-2])
        right = right[..., :1, :].expand(shape)
    if left is None or right is None:
        return left if right is None else right
    left_single, right_single = a.shape[-2] == 1, b.shape[-1] == 1
    if right_single and not left_single:
        state.forbid(right, WEIGHS)
        return left
    if left_single and not right_single:
        state.forbid(left, WEIGHS)
        return right
    state.channels.join_all(left, right)
    return torch.maximum(left, right)


def batchnorm(state: TraceState, call: Call) -> list[Tensor | None] | None:
    labels = state.labels_of(call.args[0])
    if labels is None:
        return None
    known = next((value for value in (call.args[1], call.args[3]) if value is not None), None)
    parameter = state.parameter(known)
    name, layer = state.running[-1] if parameter is None else state.owner(parameter)
    own = state.couple(name, "norm", state.per_channel(labels))
    if parameter is None or not isinstance(layer, NORMS):
        state.forbid(own, not_prunable(name, layer))
    return [labels, None, None]


def prelu(state: TraceState, call: Call) -> Tensor | None:
    labels = state.labels_of(call.args[0])
    parameter = state.parameter(call.args[1])
    if labels is None or call.args[1].numel() == 1:
        return labels
    if parameter is None or not isinstance(state.owner(parameter)[1], nn.PReLU):
        state.forbid(labels, PARAMETER)
        return labels
    state.couple(state.owner(parameter)[0], "activation", state.per_channel(labels))
    return labels


def _layer(state: TraceState, weight: object, kind: type[nn.Module]) -> tuple[str, nn.Module, str]:
    """Owner of a weight, and what forbids cutting it ("" = nothing)."""
    parameter = state.parameter(weight)
    where, running = state.running[-1]
    if parameter is None:
        return where, running, f"'{where}' is a {type(running).__name__}, which computes its weights"
    name, layer = state.owner(parameter)
    if not isinstance(layer, kind) or getattr(layer, "weight", None) is not parameter:
        return name, layer, not_prunable(name, layer)
    return name, layer, ""


def _written(state: TraceState, name: str, reads: Tensor, width: int, problem: str) -> Tensor:
    """The channels that a layer writes, `(width,)`, with what it reads joined to its inputs."""
    state.couple(name, "in", reads)
    written = state.channels.number(name, "out", width)
    state.forbid(torch.cat([reads, written]) if problem else None, problem)
    return written
