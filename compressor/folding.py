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
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.errors import UnsupportedModelError, did_you_mean

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Exponent of the channel ranges: 1 makes all of them equal and moves the whole spread into the next weights, 0 does
# nothing; the square root shares it between the two, as arXiv 1906.04721 does.
_SHARE = 0.5
_TOLERANCE = (
    1e-2  # of the output's range; a wrong fold changes it by about the range, rounding in deep networks by less
)


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
    computed weights, no running statistics, a convolution whose output something else reads too) are left as they are.
    Of a norm that does more than normalise (timm's norms with their activation inside) the rest stays in its place.

    Args:
        module: Any convolutional network.
        example: Valid input, (N, C, H, W).

    Returns:
        Names `(convolution, norm)` in the order of execution, for `apply_fold` to repeat the structural part.

    Raises:
        UnsupportedModelError: The folded network gives other outputs; the network is then left folded.
    """
    with _evaluating(module):
        before = tensors_in(module(example))
    pairs = _find_pairs(module, example)
    folded: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for conv_name, norm_name in pairs:
            conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
            assert isinstance(conv, _CONVOLUTIONS)
            assert isinstance(norm, _NORMS)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                factor = factor * norm.weight.double()
            shift = (
                -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
            )
            bias = shift * factor if norm.bias is None else shift * factor + norm.bias.double()
            weight = conv.weight.double() * factor.reshape(-1, *[1] * (conv.weight.dim() - 1))
            folded[conv_name] = weight, bias
        apply_fold(module, pairs)
        for conv_name, (weight, bias) in folded.items():
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, _CONVOLUTIONS)
            assert conv.bias is not None
            conv.weight.copy_(weight)
            conv.bias.copy_(bias)
    with _evaluating(module):
        after = tensors_in(module(example))
    if not all(map(_close, after, before)):
        raise UnsupportedModelError(
            f"fold_bn: {type(module).__name__} gives other outputs after its BatchNorms are folded; something reads "
            "them in a way that cannot be seen"
        )
    return pairs


def tensors_in(output: object) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(after: Tensor, before: Tensor) -> bool:
    return float((after - before).abs().max()) <= _TOLERANCE * max(float(before.abs().max()), 1e-12)


def apply_fold(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give each convolution a (zero) bias and replace its norm by what it holds beside, in place, so that a state dict
    loads: nothing (an identity), or an activation.

    Raises:
        UnsupportedModelError: A name is not a convolution or a norm of this module.
    """
    for conv_name, norm_name in pairs:
        conv = _submodule(module, conv_name, _CONVOLUTIONS, "convolution")
        _submodule(module, norm_name, _NORMS, "BatchNorm")
        if conv.bias is None:
            weight = cast(Tensor, conv.weight)
            conv.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        parent, _, leaf = norm_name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, _rest_of(module.get_submodule(norm_name)))


def _rest_of(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising, by its children; under their own names, so that state dicts fit."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children).train(norm.training) if children else nn.Identity()


def _submodule(module: nn.Module, name: str, kinds: tuple[type[nn.Module], ...], noun: str) -> nn.Module:
    named = dict(module.named_modules())
    if not isinstance(named.get(name), kinds):
        found = type(named[name]).__name__ if name in named else "nothing"
        near = did_you_mean(name, [key for key, value in named.items() if isinstance(value, kinds)])
        raise UnsupportedModelError(f"fold_bn: '{name}' is {found}, not a {noun}{near}")
    return cast(nn.Module, named[name])


def _find_pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Convolutions and the BatchNorm that alone reads each one's output."""
    return [
        (conv, norm)
        for conv, norm in _direct_pairs(module, example, _is_foldable_conv, _is_foldable_norm)
        if _is_plain_norm(module.get_submodule(norm)) and _is_plain_conv(module.get_submodule(conv))
    ]


def _direct_pairs(
    module: nn.Module, example: Tensor, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> list[tuple[str, str]]:
    """Modules that run once, own their parameters, and hand their output to exactly one reader, the second module."""
    calls: dict[str, int] = {}
    produced: dict[int, str] = {}
    read_by: list[tuple[str, int]] = []
    handles = []

    def after(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        produced[id(output)] = name

    def before(name: str, value: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        read_by.append((name, id(value)))

    for name, child in module.named_modules():
        if is_first(child):
            handles.append(child.register_forward_hook(lambda _m, _i, out, name=name: after(name, out)))
        if is_second(child):
            handles.append(child.register_forward_pre_hook(lambda _m, args, name=name: before(name, args[0])))
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
    for second, tensor in read_by:
        first = produced.get(tensor)
        if first is None or counter.uses.get(tensor) != 1 or calls[first] != 1 or calls[second] != 1:
            continue
        if all(owners[id(parameter)] == 1 for parameter in module.get_submodule(first).parameters()):
            pairs.append((first, second))
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
    pairs = [
        pair
        for pair in _direct_pairs(module, batches[0], _is_depthwise, _is_pointwise)
        if all(_is_plain_conv(module.get_submodule(name)) for name in pair)
    ]
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


def _is_foldable_norm(child: nn.Module) -> bool:
    return isinstance(child, _NORMS) and child.running_mean is not None


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether a norm normalises and then does what its children do, and nothing else; classes are not trusted."""
    assert isinstance(norm, _NORMS)
    if type(norm) in _NORMS:
        return True
    axes = 1 + next(i for i, kind in enumerate(_NORMS) if isinstance(norm, kind))
    shape = (2, norm.num_features, *[3] * axes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(norm.running_mean)
    with _evaluating(norm), contextlib.suppress(RuntimeError, TypeError, ValueError):
        plain = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return bool(torch.allclose(norm(x.clone()), _rest_of(norm)(plain), rtol=1e-4, atol=1e-5))
    return False


def _is_plain_conv(conv: nn.Module) -> bool:
    """Whether scaling a filter and its bias scales its output, which it does not where a layer computes its weights."""
    assert isinstance(conv, _CONVOLUTIONS)
    if type(conv) in _CONVOLUTIONS:
        return True
    generator = torch.Generator().manual_seed(0)
    sides = [4 + (size - 1) * gap for size, gap in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = torch.randn((1, conv.in_channels, *sides), generator=generator).to(conv.weight)
    factor = (0.5 + torch.rand(conv.out_channels, generator=generator)).to(conv.weight)
    across = factor.reshape(-1, *[1] * len(sides))
    twin = copy.deepcopy(conv)
    twin.bias = nn.Parameter(1 + (0 if conv.bias is None else conv.bias.detach() * factor) * torch.ones_like(factor))
    with _evaluating(conv), _evaluating(twin), contextlib.suppress(RuntimeError, TypeError, ValueError):
        twin.weight.mul_(across[:, None])
        return bool(torch.allclose(twin(x), conv(x) * across + 1, rtol=1e-3, atol=1e-4))
    return False


def _is_foldable_conv(child: nn.Module) -> bool:
    return isinstance(child, _CONVOLUTIONS) and not parametrize.is_parametrized(child)
