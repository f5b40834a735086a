"""Following every channel of a network through one forward pass.

Invariant: whatever an operation is not known to do to channels is recorded as a problem of all channels it reads, so
that nothing is ever taken for independent because it was not understood.

Each value carries a tensor of labels of its own shape: which channel each of its elements belongs to. Operations that
only move data (views, concatenation, shuffles, slices) are applied to the labels as they are, and are thereby exact;
element-wise operations join the labels that meet; layers join what they read and write to their own channels. The idea
of grouping coupled channels is DepGraph's (arXiv 2301.12900).
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.errors import UnsupportedModelError
from compressor.pruning.channels import Channels, compact, compact_pair, split_axes, varies

OUTPUT = "its channels are outputs of the network"
INPUT = "it is combined with the network's input"
CONSTANT = "a tensor of fixed size is combined with it"
PARAMETER = "a parameter outside the standard layers is coupled to it"

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    tracer = _Tracer(twin, channels)
    x = torch.randn(example.shape, dtype=example.dtype, device=example.device)
    try:
        with torch.no_grad(), tracer.watching(), tracer:
            tracer.start(x)
            outputs = [leaf for leaf in tree_leaves(twin(x)) if isinstance(leaf, Tensor)]
            if not outputs:
                raise TypeError("forward returned no tensor")
    except Exception as error:  # the network is foreign code: whatever it raises means that it cannot be traced
        raise UnsupportedModelError(
            f"{type(module).__name__}: tracing its channels failed with {type(error).__name__}: {error}; pruning needs "
            f"a network whose forward takes one tensor of shape {tuple(example.shape)}"
        ) from error
    for output in outputs:
        tracer.forbid(tracer.labels_of(output), OUTPUT)
    return channels


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below the modules, with its real arguments."""

    def __init__(self, module: nn.Module, channels: Channels):
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module
        self._channels = channels
        self._labels: Any = WeakTensorKeyDictionary()
        self._aliases: Any = WeakTensorKeyDictionary()  # views of parameters -> the parameter
        self._running: list[tuple[str, nn.Module]] = [
            ("", module)
        ]  # modules whose forward is under way, innermost last
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for name, layer in module.named_modules():
            for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                self._owners.setdefault(id(value), (name, layer))

    def watching(self) -> ExitStack:
        """Know, while the block runs, which module each operation belongs to."""
        stack = ExitStack()
        for name, layer in self._module.named_modules():
            before = layer.register_forward_pre_hook(lambda m, _i, name=name: self._running.append((name, m)))
            after = layer.register_forward_hook(lambda *_: self._running.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def start(self, x: Tensor) -> None:
        labels = self._channels.fixed(INPUT, x.shape[1])
        self._labels[x] = labels.reshape(1, -1, *[1] * (x.dim() - 2)).expand(x.shape)

    def labels_of(self, value: object) -> Tensor | None:
        return self._labels.get(value) if isinstance(value, Tensor) else None

    def forbid(self, labels: Tensor | None, reason: str) -> None:
        """None of these channels may go."""
        if labels is None:
            return
        for number in torch.unique(compact(labels)).tolist():
            if number:
                self._channels.join(number, int(self._channels.fixed(reason)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].removesuffix("_") or func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf in self._labels for leaf in tensors) or self._is_layer(name, args):
            labels = self._follow(name, func, args, kwargs, result)
            self._attach(result, labels)
        elif tensors and isinstance(result, Tensor) and name in _MOVES | _VIEWS:
            source = self._parameter(tensors[0])
            if source is not None:
                self._aliases[result] = source
        return result

    def _is_layer(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether an operation uses a layer's weight; it writes channels even where it is not known what it reads."""
        position = {"convolution": 1, "addmm": 2, "mm": 1}.get(name)
        return position is not None and self._parameter(args[position]) is not None

    def _attach(self, result: Any, labels: Any) -> None:
        if isinstance(result, Tensor):
            if isinstance(labels, Tensor):
                assert labels.shape == result.shape, "labels have the shape of their value"
                self._labels[result] = labels
        elif isinstance(result, list | tuple) and isinstance(labels, list | tuple):
            for part, label in zip(result, labels, strict=False):
                self._attach(part, label)

    def _follow(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Labels of the result, and what the operation couples."""
        first = self.labels_of(args[0]) if args else None
        if name == "convolution":
            return self._convolution(args, result)
        if name in ("addmm", "mm", "linear"):
            return self._linear(name, args, result)
        if name in ("bmm", "baddbmm"):
            a, b = args[-2:] if name == "bmm" else args[1:3]
            return self._product(a, b, result)
        if name in ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"):
            return [self._batchnorm(args), None, None]
        if name in ("prelu", "_prelu_kernel"):
            return self._prelu(args)
        if name == "cat":
            return self._concatenation(args, kwargs)
        if name == "stack":
            return self._stack(args, kwargs)
        if first is None and name not in _CREATIONS and not _is_pointwise(name, func):
            return self._unknown(name, args, kwargs, result)
        if name in _VIEWS:
            assert first is not None
            return self._view(first, result.shape)
        if name in ("split", "split_with_sizes", "chunk", "tensor_split", "slice"):
            assert first is not None
            return self._part(name, func, first, args, kwargs)
        if name in _MOVES:
            return func(first, *args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
        if name == "as_strided" and first is not None and first.shape == result.shape and max(first.shape[2:]) == 1:
            return (
                first  # global pooling of channels_last values: the same numbers, other strides of axes of length one
            )
        if name == "constant_pad_nd":
            assert first is not None
            return self._pad(first, args[1])
        if name.startswith(_SPATIAL):
            assert first is not None
            pooled = result if isinstance(result, Tensor) else result[0]
            spread = self._per_channel(first).reshape(1, -1, *[1] * (pooled.dim() - 2)).expand(pooled.shape)
            return spread if isinstance(result, Tensor) else [spread, *[None] * (len(result) - 1)]
        if name in _SOFTMAX:
            assert first is not None
            self._mixed(first, [args[1]])
            return first
        if name in _REDUCTIONS:
            assert first is not None
            # The norms take their order before the axes.
            place = 2 if "norm" in name else 1
            return self._reduction(first, args[place] if len(args) > place else kwargs.get("dim"), result)
        if name in _CREATIONS:
            return None
        if _is_pointwise(name, func):
            out = result if isinstance(result, Tensor) else result[0]
            return self._pointwise([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], out.shape)
        return self._unknown(name, args, kwargs, result)

    def _unknown(self, name: str, args: Any, kwargs: Any, result: Any) -> Any:
        """Everything read must stay. What comes out in the same shape goes on under the same names."""
        where, layer = self._running[-1]
        inside = f"'{where}' is a {type(layer).__name__}, which cannot be pruned" if where else ""
        known = not isinstance(layer, nn.Sequential) and next(layer.children(), None) is None
        reason = inside if inside and known else f"'{where}' applies {name} to it, which cannot be traced"
        for leaf in tree_leaves((args, kwargs)):
            self.forbid(self.labels_of(leaf), reason)
        kept = self.labels_of(args[0]) if args else None
        same = kept is not None and isinstance(_first(result), Tensor) and _first(result).shape == kept.shape
        if not same:
            return None
        return kept if isinstance(result, Tensor) else [kept, *[None] * (len(result) - 1)]

    def _parameter(self, value: object) -> Tensor | None:
        """The parameter or buffer that a tensor is or views."""
        if not isinstance(value, Tensor):
            return None
        return value if id(value) in self._owners else self._aliases.get(value)

    def _per_channel(self, labels: Tensor, axis: int = 1) -> Tensor:
        """The channel at each index of an axis, `(C,)`; where several meet at one index, they are joined."""
        rows = compact(labels, keep=axis).movedim(axis, 0).flatten(1)
        highest = rows.amax(1)
        if rows.shape[1] > 1:
            self._channels.join_all(rows, highest[:, None].expand_as(rows))
        return highest

    def _reads(self, value: Tensor, axis: int) -> Tensor:
        """What a layer reads at each index of an axis; where that could not be followed, channels that must stay."""
        labels = self.labels_of(value)
        if labels is None:
            return self._channels.fixed(CONSTANT, value.shape[axis])
        return self._per_channel(labels, axis)

    def _layer(
        self, weight: object, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
    ) -> tuple[str, nn.Module, str]:
        """Owner of a weight, and what forbids cutting it ("" = nothing)."""
        parameter = self._parameter(weight)
        where, running = self._running[-1]
        if parameter is None:
            return where, running, f"'{where}' is a {type(running).__name__}, which computes its weights"
        name, layer = self._owners[id(parameter)]
        if not isinstance(layer, kinds) or getattr(layer, "weight", None) is not parameter:
            return name, layer, f"'{name}' is a {type(layer).__name__}, which cannot be pruned"
        return name, layer, ""

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        self.forbid(self.labels_of(weight), "it is used as a weight")
        reads = self._reads(x, 1)
        shape = (1, -1, *[1] * (result.dim() - 2))
        fixed = not isinstance(self._parameter(weight), nn.Parameter)
        if fixed and groups == x.shape[1] == result.shape[1]:
            # A fixed filter for each channel, as in anti-aliased pooling, unless a layer made it of its own weights.
            _, layer, problem = self._layer(weight, nn.Conv2d)
            self.forbid(reads if next(layer.parameters(recurse=False), None) is not None else None, problem)
            return reads.reshape(shape).expand(result.shape)
        name, layer, problem = self._layer(weight, nn.Conv2d)
        if not problem and transposed:
            problem = f"'{name}' is a {type(layer).__name__}, which cannot be pruned"
        if not problem and isinstance(layer, nn.Conv2d) and 1 < groups == layer.out_channels != layer.in_channels:
            problem = f"'{name}' is a grouped convolution with one filter a group and several inputs"
        if not problem and 1 < groups == x.shape[1] == result.shape[1]:
            own = self._channels.number(name, "depthwise", groups)
            self._channels.join_all(own, reads)
            return torch.where(reads > 0, reads, own).reshape(shape).expand(result.shape)
        self._channels.join_all(self._channels.number(name, "in", len(reads)), reads)
        written = self._channels.number(name, "out", result.shape[1])
        self.forbid(torch.cat([reads, written]) if problem else None, problem)
        return written.reshape(shape).expand(result.shape)

    def _linear(self, name: str, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        x, weight = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
        if self._parameter(weight) is None:
            return self._product(x, weight, result)
        owner, _, problem = self._layer(weight, nn.Linear)
        reads = self._reads(x, x.dim() - 1)
        self._channels.join_all(self._channels.number(owner, "in", len(reads)), reads)
        written = self._channels.number(owner, "out", result.shape[-1])
        self.forbid(torch.cat([reads, written]) if problem else None, problem)
        return written.expand(result.shape)

    def _product(self, a: Tensor, b: Tensor, result: Tensor) -> Tensor | None:
        """Matrix product of two values (..., n, k) x (..., k, m); channels may lie along n or m, not along k."""
        left, right = self.labels_of(a), self.labels_of(b)
        if left is not None:
            self._mixed(left, [-1])
            left = left[..., :1].expand(result.shape)
        if right is not None:
            self._mixed(right, [-2])
            right = right[..., :1, :].expand(result.shape)
        if left is None or right is None:
            return left if right is None else right
        return self._meet(left, right, a.shape[-2] == 1, b.shape[-1] == 1)

    def _meet(self, left: Tensor, right: Tensor, left_single: bool, right_single: bool) -> Tensor:
        if right_single and not left_single:
            self.forbid(right, "it weighs other channels")
            return left
        if left_single and not right_single:
            self.forbid(left, "it weighs other channels")
            return right
        self._channels.join_all(left, right)
        return torch.maximum(left, right)

    def _batchnorm(self, args: tuple[Any, ...]) -> Tensor | None:
        labels = self.labels_of(args[0])
        if labels is None:
            return None
        known = next((value for value in (args[1], args[3]) if value is not None), None)
        name, layer, problem = self._norm_layer(known)
        if not problem and not isinstance(layer, NORMS):
            problem = f"'{name}' is a {type(layer).__name__}, which cannot be pruned"
        reads = self._per_channel(labels)
        own = self._channels.number(name, "norm", len(reads))
        self._channels.join_all(own, reads)
        self.forbid(own if problem else None, problem)
        return labels

    def _norm_layer(self, value: object) -> tuple[str, nn.Module, str]:
        parameter = self._parameter(value)
        if parameter is None:
            where, layer = self._running[-1]
            return where, layer, f"'{where}' is a {type(layer).__name__}, which cannot be pruned"
        return (*self._owners[id(parameter)], "")

    def _prelu(self, args: tuple[Any, ...]) -> Tensor | None:
        labels = self.labels_of(args[0])
        parameter = self._parameter(args[1])
        if labels is None or args[1].numel() == 1:
            return labels
        if parameter is None or not isinstance(self._owners[id(parameter)][1], nn.PReLU):
            self.forbid(labels, PARAMETER)
            return labels
        reads = self._per_channel(labels)
        self._channels.join_all(self._channels.number(self._owners[id(parameter)][0], "activation", len(reads)), reads)
        return labels

    def _concatenation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        values = [value for value in args[0] if value.dim() > 1 or value.numel()]
        axis = axis % values[0].dim()
        parts = []
        for value in values:
            labels = self.labels_of(value)
            if labels is None:
                shape = [1] * value.dim()
                shape[axis] = value.shape[axis]
                labels = self._channels.fixed(CONSTANT, value.shape[axis]).reshape(shape).expand(value.shape)
            parts.append(labels)
        return torch.cat(parts, axis)

    def _stack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        # Stacked parts must stay equally long: the same place in each of them goes as one.
        whole = self._pointwise(args[0], args[0][0].shape)
        assert whole is not None
        return torch.stack([whole if (own := self.labels_of(value)) is None else own for value in args[0]], axis)

    def _view(self, labels: Tensor, shape: Sequence[int]) -> Tensor:
        """A view; where it splits an axis of channels, the factor that stays is joined (`view(n, 2, c // 2, h, w)`)."""
        out = labels.reshape(tuple(shape))
        for axes in split_axes(labels.shape, shape):
            varying = [axis for axis in axes if varies(out, axis)]
            if len(varying) > 1:
                # The code says which factor is fixed only in a way that cannot be seen here; it is the smaller one in
                # all that we know (groups, radix, cardinality), and the oracle judges.
                free = max(reversed(varying), key=lambda axis: out.shape[axis])
                for axis in varying:
                    if axis != free:
                        self._channels.join_all(out, out.narrow(axis, 0, 1).expand(out.shape))
        return out

    def _part(self, name: str, func: Any, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = func(labels, *args[1:], **kwargs)
        if name == "slice":
            axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % labels.dim()
            size = labels.shape[axis]
            if parts.shape[axis] == size or not varies(labels, axis):
                return parts
            start = args[2] if len(args) > 2 and args[2] is not None else 0
            end = args[3] if len(args) > 3 and args[3] is not None else size
            bounds = [bound % size for bound in (start, end) if 0 < bound % size < size and abs(bound) <= size]
            for bound in bounds:
                self._keep_sizes(labels, axis, bound)
            return parts
        axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % labels.dim()
        if len(parts) < 2 or not varies(labels, axis):
            return parts
        sizes = [part.shape[axis] for part in parts]
        if name != "split_with_sizes" and len(set(sizes)) == 1:
            for part in parts[1:]:  # equal parts must stay equal
                self._channels.join_all(parts[0], part)
            self._keep_sizes(labels, axis, sizes[0])
        elif name == "split_with_sizes":
            self._keep_sizes(labels, axis, sizes)
        return parts

    def _keep_sizes(self, labels: Tensor, axis: int, value: int | list[int]) -> None:
        """Where a module that is running keeps what it splits at, or the whole width, that must follow the channels."""
        width = labels.shape[axis]
        if self._follow_attribute(labels, axis, value, 0, width if isinstance(value, list) else value):
            return
        if isinstance(value, list):
            starts = [sum(value[:i]) for i in range(len(value))]
            found = [self._follow_attribute(labels, axis, n, at, n) for at, n in zip(starts, value, strict=True)]
            if any(found):
                return
        self._follow_attribute(labels, axis, width, 0, width)

    def _follow_attribute(self, labels: Tensor, axis: int, value: int | list[int], start: int, count: int) -> bool:
        """Couple attributes that equal `value` to the channels they count; False if there is none."""
        for where, layer in reversed(self._running):
            names = [name for name, kept in vars(layer).items() if not name.startswith("_") and _holds(kept, value)]
            if names:
                reads = self._per_channel(labels.narrow(axis, start, count), axis)
                for name in names:
                    self._channels.join_all(self._channels.number(where, f"sizes:{name}", count), reads)
                return True
        return False

    def _pad(self, labels: Tensor, pads: Sequence[int]) -> Tensor | None:
        if min(pads) < 0:
            self.forbid(labels, "it is cropped by a negative padding")
            return None
        for position in range(0, len(pads), 2):
            axis = labels.dim() - 1 - position // 2
            before, after = pads[position : position + 2]
            if not before and not after:
                continue
            size = labels.shape[axis]
            if not varies(labels, axis):
                shape = list(labels.shape)
                shape[axis] = size + before + after
                labels = labels.narrow(axis, 0, 1).expand(shape)
                continue
            parts = [labels]
            for count, place in ((before, 0), (after, 2)):
                if count:
                    shape = [1] * labels.dim()
                    shape[axis] = count
                    whole = [count if i == axis else n for i, n in enumerate(labels.shape)]
                    fixed = self._channels.fixed(CONSTANT, count).reshape(shape).expand(whole)
                    parts.insert(0 if place == 0 else len(parts), fixed)
            labels = torch.cat(parts, axis)
        return labels

    def _mixed(self, labels: Tensor, axes: Iterable[int]) -> None:
        """Everything along these axes meets in one number, so what lies along them goes as one."""
        for axis in axes:
            if varies(labels, axis):
                self._channels.join_all(labels, labels.narrow(axis, 0, 1).expand(labels.shape))

    def _reduction(self, labels: Tensor, axes: Any, result: Any) -> Any:
        out = result if isinstance(result, Tensor) else result[0]
        if isinstance(axes, float) or axes is None:
            axes = []
        numbers = [axes] if isinstance(axes, int) else list(axes)
        chosen = sorted({axis % labels.dim() for axis in numbers} if numbers else set(range(labels.dim())))
        self._mixed(labels, chosen)
        reduced = labels
        for axis in chosen:
            reduced = reduced.narrow(axis, 0, 1)
        if out.dim() != labels.dim():
            for axis in reversed(chosen):
                reduced = reduced.squeeze(axis)
        return reduced if isinstance(result, Tensor) else [reduced for _ in result]

    def _pointwise(self, values: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
        """Values of broadcastable shapes, combined element by element."""
        known = [(value, labels) for value in values if (labels := self.labels_of(value)) is not None]
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
                self.forbid(wide, "it is combined with all channels of another layer")
                self.forbid(total, "it is combined with all channels of another layer")
            elif own_single:
                self.forbid(wide, "it weighs other channels")
            elif total_single:
                self.forbid(total, "it weighs other channels")
                total = wide
            else:
                small_total, small_wide = compact_pair(total, wide)
                self._channels.join_all(small_total, small_wide)
                total = torch.maximum(small_total, small_wide).expand(tuple(shape))
            total_shape = [max(a, b) for a, b in zip(total_shape, own_shape, strict=True)]
        assert total is not None
        for value in values:
            if self.labels_of(value) is None and value.dim():
                own_shape = [1] * (len(shape) - value.dim()) + list(value.shape)
                if any(size > 1 and varies(total, axis) for axis, size in enumerate(own_shape)):
                    self.forbid(total, PARAMETER if self._parameter(value) is not None else CONSTANT)
        return total


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, list | tuple) and result else result


def _holds(kept: object, wanted: int | list[int]) -> bool:
    if isinstance(wanted, int):
        return isinstance(kept, int) and not isinstance(kept, bool) and kept == wanted
    return isinstance(kept, list | tuple) and list(kept) == wanted


def _is_pointwise(name: str, func: Any) -> bool:
    return name in _POINTWISE or torch.Tag.pointwise in func.tags
