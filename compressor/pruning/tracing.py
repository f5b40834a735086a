"""Following every channel of a network through one forward pass.

Invariant: whatever an operation is not known to do to channels is recorded as a problem of all channels it reads, so
that nothing is ever taken for independent because it was not understood.

Each value carries a tensor of labels of its own shape: which channel each of its elements belongs to. Operations that
only move data (views, concatenation, shuffles, slices) are applied to the labels as they are, and are thereby exact;
element-wise operations join the labels that meet; layers join what they read and write to their own channels. The idea
of grouping coupled channels is DepGraph's (arXiv 2301.12900).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.errors import UnsupportedModelError
from compressor.pruning.channels import Channels
from compressor.pruning.trace_layers import batched_product, batchnorm, convolution, linear, prelu
from compressor.pruning.trace_state import Call, TraceState
from compressor.pruning.trace_values import (
    concatenation,
    move,
    padding,
    pointwise,
    reduction,
    restriding,
    slicing,
    softmax,
    splitting,
    stacking,
    unknown,
    view,
    windows,
)

OUTPUT = "its channels are outputs of the network"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that return (parts of) their first argument rearranged: they do to the labels what they do to the values.
_MOVES = _names(
    "alias channel_shuffle clone contiguous detach diagonal expand flip index index_select lift_fresh "
    "movedim native_channel_shuffle permute pixel_shuffle pixel_unshuffle repeat roll select squeeze t "
    "transpose unbind unfold unsqueeze"
)
_VIEWS = _names("view _unsafe_view reshape _reshape_alias")
# Same shape, element by element; others are known by torch's own tag.
_POINTWISE = _names(
    "_to_copy celu copy dropout elu gelu glu_backward hardshrink hardsigmoid hardswish hardtanh leaky_relu "
    "log_sigmoid mish native_dropout prelu relu relu6 rrelu_with_noise selu silu softplus softshrink "
    "sigmoid tanh threshold"
)
# Operations on windows of the positions of each channel by itself: (N, C, positions) to (N, C, other positions).
_SPATIAL = (
    "_adaptive_avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "max_pool",
    "mkldnn_max_pool",
    "reflection_pad",
    "replication_pad",
    "upsample_",
    "_upsample_",
    "grid_sampler",
)
_REDUCTIONS = _names("mean sum amax amin max min prod var std var_mean std_mean logsumexp norm linalg_vector_norm")
_SOFTMAX = _names("_softmax _log_softmax softmax log_softmax cumsum")
_CREATIONS = _names("empty empty_like zeros zeros_like ones ones_like full full_like new_zeros new_ones")

# What operations do whether or not it is known which channels their first argument carries.
_RULES: dict[str, Callable[[TraceState, Call], Any]] = {
    "convolution": convolution,
    **dict.fromkeys(("addmm", "mm", "linear"), linear),
    **dict.fromkeys(("bmm", "baddbmm"), batched_product),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"), batchnorm
    ),
    **dict.fromkeys(("prelu", "_prelu_kernel"), prelu),
    "cat": concatenation,
    "stack": stacking,
}
# What operations do to the labels of their first argument.
_RULES_OF_LABELS: dict[str, Callable[[TraceState, Call, Tensor], Any]] = {
    **dict.fromkeys(_VIEWS, view),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), splitting),
    "slice": slicing,
    **dict.fromkeys(_MOVES, move),
    "as_strided": restriding,
    "constant_pad_nd": padding,
    **dict.fromkeys(_SOFTMAX, softmax),
    **dict.fromkeys(_REDUCTIONS, reduction),
}


def trace_channels(module: nn.Module, example: Tensor) -> Channels:
    """Run the network once and return which channels of its layers can only be removed together.

    Layer sides are `out` (filters of a convolution or linear layer), `in` (the weights that read a channel), `norm`
    (BatchNorm), `depthwise` (both sides of a depthwise convolution), `activation` (per-channel PReLU) and
    `sizes:ATTRIBUTE` (positions along an axis that a container splits at the number or numbers it keeps there).

    Args:
        module: Network whose forward takes one tensor; left untouched.
        example: Input `(N, C, H, W)`; only its shape matters.

    Raises:
        UnsupportedModelError: The forward pass failed, or returned no tensor.
    """
    twin = copy.deepcopy(module).eval()
    channels = Channels()
    state = TraceState(twin, channels)
    x = torch.randn(example.shape, dtype=example.dtype, device=example.device)
    try:
        with torch.no_grad(), state.watching(), _Tracer(state):
            state.start(x)
            outputs = [leaf for leaf in tree_leaves(twin(x)) if isinstance(leaf, Tensor)]
            if not outputs:
                raise TypeError("forward returned no tensor")
    except Exception as error:  # the network is foreign code: whatever it raises means that it cannot be traced
        raise UnsupportedModelError(
            f"{type(module).__name__}: tracing its channels failed with {type(error).__name__}: {error}; pruning needs "
            f"a network whose forward takes one tensor of shape {tuple(example.shape)}"
        ) from error
    for output in outputs:
        state.forbid(state.labels_of(output), OUTPUT)
    return channels


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below the modules, with its real arguments."""

    def __init__(self, state: TraceState):
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].removesuffix("_") or func._schema.name
        call = Call(name, func, args, kwargs, result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self._state.labels_of(leaf) is not None for leaf in tensors) or _is_layer(self._state, call):
            self._state.attach(result, _follow(self._state, call))
        elif tensors and isinstance(result, Tensor) and name in _MOVES | _VIEWS:
            self._state.note_view(result, tensors[0])
        return result


def _is_layer(state: TraceState, call: Call) -> bool:
    """Whether an operation uses a layer's weight; it writes channels even where it is not known what it reads."""
    position = {"convolution": 1, "addmm": 2, "mm": 1}.get(call.name)
    return position is not None and state.parameter(call.args[position]) is not None


def _follow(state: TraceState, call: Call) -> Any:
    """Labels of the result, and what the operation couples."""
    if call.name in _RULES:
        return _RULES[call.name](state, call)
    if call.name in _CREATIONS:
        return None
    first = state.labels_of(call.args[0]) if call.args else None
    is_pointwise = call.name in _POINTWISE or torch.Tag.pointwise in call.func.tags
    if first is None and not is_pointwise:
        return unknown(state, call)
    rule = _RULES_OF_LABELS.get(call.name, windows if call.name.startswith(_SPATIAL) else None)
    if rule is not None:
        assert first is not None
        return rule(state, call, first)
    return pointwise(state, call) if is_pointwise else unknown(state, call)
