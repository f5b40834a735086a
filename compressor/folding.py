"""Weight edits that keep the function and help quantisation: BatchNorm folding and channel equalisation.

Invariant: in evaluation mode the network computes the same function before and after, up to rounding.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.errors import UnsupportedModelError, did_you_mean

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Exponent of the channel ranges: 1 makes all of them equal and moves the whole spread into the next weights, 0 does
# nothing; the square root shares it between the two, as arXiv 1906.04721 does.
_SHARE = 0.5
# What norms that end in an activation (timm's `BatchNormAct2d`) call its parts, in the order in which they run.
_AFTER_NORM = ("drop", "act")
_SAMPLE = 8192  # values of an output that are compared
_TOLERANCE, _ROUNDING = 1e-2, 1e-5  # of the range, of the largest value; deep random networks amplify rounding


class _UseCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how many operations read each tensor; modules' hooks alone would miss functional reads such as `x + y`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[int, int] = {}
        self._alive: list[object] = []  # identities stay unique only while the tensors live

    def count(self, values: object) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.uses[id(leaf)] = self.uses.get(id(leaf), 0) + 1
                self._alive.append(leaf)

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.count((args, kwargs))
        return func(*args, **(kwargs or {}))


def fold_batchnorm(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Fold every BatchNorm that alone reads one convolution's output into that convolution, in place.

    The pairs are found in the data flow of one evaluation pass, so names and registration order do not matter. Products
    are formed in float64 and stored in the convolution's own type. Pairs that cannot be folded (shared, parametrised or
    standardised weights, no running statistics, a convolution whose output something else reads too, a class of norm
    that computes something of its own) are left as they are; a norm's own activation stays in its place.

    Args:
        module: Any convolutional network.
        example: Valid input, (N, C, H, W).

    Returns:
        Names `(convolution, norm)` in the order of execution, for `apply_fold` to repeat the structural part.

    Raises:
        UnsupportedModelError: After folding, the example gave other values; the network is as it was before.
    """
    pairs = _find_pairs(module, example)
    before = _values_after(module, example, [norm for _, norm in pairs])
    norms = {norm: module.get_submodule(norm) for _, norm in pairs}
    folded: dict[str, tuple[Tensor, Tensor]] = {}
    originals: dict[str, tuple[Tensor, Any]] = {}
    with torch.no_grad():
        for conv_name, norm_name in pairs:
            conv, norm = module.get_submodule(conv_name), norms[norm_name]
            assert isinstance(conv, _CONVOLUTIONS)
            assert isinstance(norm, _NORMS)
            folded[conv_name] = _folded(conv, norm)
            originals[conv_name] = conv.weight.clone(), conv.bias
        apply_fold(module, pairs)
        for conv_name, (weight, bias) in folded.items():
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, _CONVOLUTIONS)
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        after = _values_after(module, example, [norm for _, norm in pairs])
        different = next((name for name in before if not _close(after.get(name), before[name])), None)
        if different is None:
            return pairs
        for conv_name, norm_name in pairs:
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, _CONVOLUTIONS)
            weight, old_bias = originals[conv_name]
            conv.weight.copy_(weight)
            conv.bias = old_bias
            replacement = module.get_submodule(norm_name)
            for path in _paths(module, replacement):
                _put(module, path, norms[norm_name])
    place = f"'{different}'" if different else "the network"
    raise UnsupportedModelError(
        f"fold_bn: folding BatchNorm changes what {place} computes, so nothing was folded; a layer's weights or "
        "attributes are read outside its own forward pass; let the network call its layers as modules"
    )


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of the convolution that does the work of both."""
    assert isinstance(conv, _CONVOLUTIONS)
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = shift * factor if norm.bias is None else shift * factor + norm.bias.double()
    return conv.weight.double() * _along(0, factor, conv.weight), bias


def apply_fold(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give each convolution a (zero) bias and take out its norm, in place, so that a state dict loads.

    An identity takes the norm's place, or where its class ends in an activation, that.

    Raises:
        UnsupportedModelError: A name is not a convolution or a norm of this module.
    """
    for conv_name, norm_name in pairs:
        conv = _submodule(module, conv_name, _CONVOLUTIONS, "convolution")
        norm = _submodule(module, norm_name, _NORMS, "BatchNorm")
        rest = _rest_of(norm)
        if rest is None:
            raise UnsupportedModelError(
                f"fold_bn: '{norm_name}' is {type(norm).__name__}, with parts {sorted(dict(norm.named_children()))}; "
                f"a norm can be taken out whose parts are called {' and '.join(_AFTER_NORM)}"
            )
        if conv.bias is None:
            weight = cast(Tensor, conv.weight)
            conv.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        for path in _paths(module, norm):
            _put(module, path, rest)


def _paths(module: nn.Module, child: nn.Module) -> list[str]:
    """All names of a submodule: the network may call it by another one than the first."""
    return [name for name, found in module.named_modules(remove_duplicate=False) if found is child]


def _put(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)


def _submodule(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...], noun: str) -> nn.Module:
    named = dict(module.named_modules())
    if not isinstance(named.get(name), kinds):
        found = type(named[name]).__name__ if name in named else "nothing"
        near = did_you_mean(name, [key for key, value in named.items() if isinstance(value, kinds)])
        raise UnsupportedModelError(f"fold_bn: '{name}' is {found}, not a {noun}{near}")
    return cast(nn.Module, named[name])


def _rest_of(norm: nn.Module) -> nn.Module | None:
    """What a norm does after normalising; None where its parts are not known."""
    children = dict(norm.named_children())
    if type(norm) in _NORMS or not children:
        return nn.Identity()
    if set(children) <= set(_AFTER_NORM):
        return nn.Sequential(OrderedDict((name, children[name]) for name in _AFTER_NORM if name in children))
    return None


def _values_after(module: nn.Module, example: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """A sample of what each named module gives for the example, and the outputs of the network, by the name ''."""
    values: dict[str, Tensor] = {}

    def sampled(output: object) -> Tensor:
        leaves = [leaf.detach().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return torch.cat([leaf[:: max(1, leaf.numel() // _SAMPLE)].double().cpu() for leaf in leaves])

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: values.__setitem__(name, sampled(out))
        )
        for name in names
    ]
    with _evaluating(module):
        try:
            output = module(example)
        finally:
            for handle in handles:
                handle.remove()
    return {**values, "": sampled(output)}


def _close(found: Tensor | None, expected: Tensor) -> bool:
    """Whether values agree as well as a rearranged sum in float32 does, seen over many layers."""
    if found is None or found.shape != expected.shape or not expected.numel():
        return found is not None and found.shape == expected.shape
    allowed = _TOLERANCE * (expected.max() - expected.min()) + _ROUNDING * expected.abs().max()
    return bool(((found - expected).abs() <= allowed).all())


def _find_pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Convolutions and the BatchNorm that alone reads each one's output."""
    pairs = _direct_pairs(module, example, _is_foldable_conv, _is_foldable_norm)
    if not pairs:
        return pairs
    with _evaluating(module):
        return [
            (conv, norm)
            for conv, norm in pairs
            if _scales_with_weight(module.get_submodule(conv)) and _is_norm_and_rest(module.get_submodule(norm))
        ]


def _is_foldable_norm(child: nn.Module) -> bool:
    return isinstance(child, _NORMS) and child.running_mean is not None and not _has_hooks(child)


def _has_hooks(child: nn.Module) -> bool:
    """Whether something runs around the forward pass: `torch.nn.utils.weight_norm` makes the weight anew there."""
    return bool(child._forward_pre_hooks or child._forward_hooks)


def _is_norm_and_rest(norm: nn.Module) -> bool:
    """Whether a class derived from BatchNorm computes plain batch norm and then what `_rest_of` says."""
    assert isinstance(norm, _NORMS)
    if type(norm) in _NORMS:
        return True
    rest = _rest_of(norm)
    if rest is None or norm.running_mean is None or norm.running_var is None:
        return False
    axes = next(axes for kind, axes in zip(_NORMS, (1, 2, 3), strict=True) if isinstance(norm, kind))
    x = _noise(norm.running_mean, 4, norm.num_features, *[5] * axes)
    # Within the norm's own range, so that an activation after it meets both signs.
    x = x * _along(1, norm.running_var.sqrt() * 3, x) + _along(1, norm.running_mean, x)
    plain = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return _same(lambda: norm(x.clone()), lambda: rest(plain))


def _scales_with_weight(conv: nn.Module) -> bool:
    """Whether scaled weights and a bias give a scaled and shifted output, and scaled inputs meet their own columns.

    That is all that folding asks of a class derived from convolution: one that pads in its own way does it, one that
    standardises its weights does not.
    """
    assert isinstance(conv, _CONVOLUTIONS)
    if type(conv) in _CONVOLUTIONS:
        return True
    weight = conv.weight
    scaled = copy.deepcopy(conv)
    factor, shift = _noise(weight, conv.out_channels), _noise(weight, conv.out_channels)
    columns = torch.ones(1, device=weight.device) if conv.groups > 1 else 1 + _noise(weight, conv.in_channels).abs()
    span = max(size * step for size, step in zip(conv.kernel_size, conv.dilation, strict=True))
    x = _noise(weight, 2, conv.in_channels, *[2 * span + 3] * (weight.dim() - 2))
    scaled.weight.copy_(weight * _along(0, factor, weight) * _along(1, columns, weight))
    bias = shift if conv.bias is None else conv.bias * factor + shift
    scaled.bias = nn.Parameter(bias)
    return _same(
        lambda: scaled(x / _along(1, columns, x)),
        lambda: conv(x) * _along(1, factor, x) + _along(1, shift, x),
    )


def _same(found: Callable[[], Tensor], expected: Callable[[], Tensor]) -> bool:
    """Whether two computations agree; one that fails on input it does not expect has not shown it."""
    try:
        a, b = found(), expected()
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError):
        return False
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _close(a.double(), b.double())


def _noise(like: Tensor, *shape: int) -> Tensor:
    """Normal values, the same each time and without touching the process's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _along(axis: int, values: Tensor, like: Tensor) -> Tensor:
    """Values of one axis, shaped to be broadcast against `like`."""
    return values.reshape(*[1] * axis, -1, *[1] * (like.dim() - axis - 1))


def _direct_pairs(
    module: nn.Module, example: Tensor, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> list[tuple[str, str]]:
    """Modules that run once, own their parameters, and hand their output to exactly one reader, the second module."""
    calls: dict[str, int] = {}
    produced: dict[int, str] = {}
    read_by: list[tuple[str, int]] = []
    handles = []
    alive: list[object] = []  # an output that nothing reads would be freed, and its identity go to another tensor

    def after(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        produced[id(output)] = name
        alive.append(output)

    def before(name: str, args: tuple[object, ...]) -> None:
        calls[name] = calls.get(name, 0) + 1
        if args:
            read_by.append((name, id(args[0])))

    for name, child in module.named_modules():
        first, second = is_first(child), is_second(child)
        if first:
            handles.append(child.register_forward_hook(lambda _m, _i, out, name=name: after(name, out)))
        if second:
            handles.append(child.register_forward_pre_hook(lambda _m, args, name=name: before(name, args)))
    with _evaluating(module):
        try:
            with _UseCounter() as counter:
                counter.count(module(example))
        finally:
            for handle in handles:
                handle.remove()
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    pairs = []
    for reader, tensor in read_by:
        maker = produced.get(tensor)
        if maker is None or counter.uses.get(tensor) != 1 or calls[maker] != 1 or calls[reader] != 1:
            continue
        if all(owners[id(parameter)] == 1 for parameter in module.get_submodule(maker).parameters()):
            pairs.append((maker, reader))
    return pairs


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training


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
    pairs = _direct_pairs(module, batches[0], _is_depthwise, _is_pointwise)
    with _evaluating(module):
        pairs = [pair for pair in pairs if all(_scales_with_weight(module.get_submodule(name)) for name in pair)]
    ranges: dict[str, Tensor] = {}

    def observe(name: str, output: Tensor) -> None:
        largest = output.abs().amax((0, 2, 3))  # (C,)
        ranges[name] = torch.maximum(ranges[name], largest) if name in ranges else largest

    handles = [
        module.get_submodule(first).register_forward_hook(lambda _m, _i, out, name=first: observe(name, out))
        for first, _ in pairs
    ]
    with _evaluating(module):
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
    return _is_foldable_conv(child) and isinstance(child, nn.Conv2d) and 1 < child.groups == child.out_channels


def _is_pointwise(child: nn.Module) -> bool:
    return (
        _is_foldable_conv(child) and isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1) and child.groups == 1
    )


def _is_foldable_conv(child: nn.Module) -> bool:
    return isinstance(child, _CONVOLUTIONS) and not parametrize.is_parametrized(child) and not _has_hooks(child)
