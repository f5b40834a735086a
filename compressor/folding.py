"""BatchNorm folded into the convolution before it.

Invariant: in evaluation mode the network computes the same function before and after, up to rounding.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from compressor.errors import UnsupportedModelError, did_you_mean
from compressor.layer_pairs import (
    CONVOLUTIONS,
    along,
    close,
    direct_pairs,
    has_hooks,
    is_plain_convolution,
    noise,
    same,
    scales_with_weight,
)
from compressor.modes import evaluating

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What norms that end in an activation (timm's `BatchNormAct2d`) call its parts, in the order in which they run.
_AFTER_NORM = ("drop", "act")
_SAMPLE = 8192  # values of an output that are compared


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
            assert isinstance(conv, CONVOLUTIONS)
            assert isinstance(norm, _NORMS)
            folded[conv_name] = _folded(conv, norm)
            originals[conv_name] = conv.weight.clone(), conv.bias
        apply_fold(module, pairs)
        for conv_name, (weight, bias) in folded.items():
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, CONVOLUTIONS)
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        after = _values_after(module, example, [norm for _, norm in pairs])
        different = next((name for name in before if not close(after.get(name), before[name])), None)
        if different is None:
            return pairs
        for conv_name, norm_name in pairs:
            conv = module.get_submodule(conv_name)
            assert isinstance(conv, CONVOLUTIONS)
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
    assert isinstance(conv, CONVOLUTIONS)
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = shift * factor if norm.bias is None else shift * factor + norm.bias.double()
    return conv.weight.double() * along(0, factor, conv.weight), bias


def apply_fold(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give each convolution a (zero) bias and take out its norm, in place, so that a state dict loads.

    An identity takes the norm's place, or where its class ends in an activation, that.

    Raises:
        UnsupportedModelError: A name is not a convolution or a norm of this module.
    """
    for conv_name, norm_name in pairs:
        conv = _submodule(module, conv_name, CONVOLUTIONS, "convolution")
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
    with evaluating(module):
        try:
            output = module(example)
        finally:
            for handle in handles:
                handle.remove()
    return {**values, "": sampled(output)}


def _find_pairs(module: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Convolutions and the BatchNorm that alone reads each one's output."""
    pairs = direct_pairs(module, example, is_plain_convolution, _is_foldable_norm)
    if not pairs:
        return pairs
    with evaluating(module):
        return [
            (conv, norm)
            for conv, norm in pairs
            if scales_with_weight(module.get_submodule(conv)) and _is_norm_and_rest(module.get_submodule(norm))
        ]


def _is_foldable_norm(child: nn.Module) -> bool:
    return isinstance(child, _NORMS) and child.running_mean is not None and not has_hooks(child)


def _is_norm_and_rest(norm: nn.Module) -> bool:
    """Whether a class derived from BatchNorm computes plain batch norm and then what `_rest_of` says."""
    assert isinstance(norm, _NORMS)
    if type(norm) in _NORMS:
        return True
    rest = _rest_of(norm)
    if rest is None or norm.running_mean is None or norm.running_var is None:
        return False
    axes = next(axes for kind, axes in zip(_NORMS, (1, 2, 3), strict=True) if isinstance(norm, kind))
    x = noise(norm.running_mean, 4, norm.num_features, *[5] * axes)
    # Within the norm's own range, so that an activation after it meets both signs.
    x = x * along(1, norm.running_var.sqrt() * 3, x) + along(1, norm.running_mean, x)
    plain = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return same(lambda: norm(x.clone()), lambda: rest(plain))
