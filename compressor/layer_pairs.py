"""Which layer alone reads which layer's output, and whether a layer computes what its class says.

Invariant: found by running the network once, so names and registration order do not matter; whatever is not shown to
hold is taken not to.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.modes import evaluating

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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


def direct_pairs(
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
    with evaluating(module):
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


def is_plain_convolution(child: nn.Module) -> bool:
    return isinstance(child, CONVOLUTIONS) and not parametrize.is_parametrized(child) and not has_hooks(child)


def has_hooks(child: nn.Module) -> bool:
    """Whether something runs around the forward pass: `torch.nn.utils.weight_norm` makes the weight anew there."""
    return bool(child._forward_pre_hooks or child._forward_hooks)


def scales_with_weight(conv: nn.Module) -> bool:
    """Whether scaled weights and a bias give a scaled and shifted output, and scaled inputs meet their own columns.

    That is all that folding asks of a class derived from convolution: one that pads in its own way does it, one that
    standardises its weights does not.
    """
    assert isinstance(conv, CONVOLUTIONS)
    if type(conv) in CONVOLUTIONS:
        return True
    weight = conv.weight
    scaled = copy.deepcopy(conv)
    factor, shift = noise(weight, conv.out_channels), noise(weight, conv.out_channels)
    columns = torch.ones(1, device=weight.device) if conv.groups > 1 else 1 + noise(weight, conv.in_channels).abs()
    span = max(size * step for size, step in zip(conv.kernel_size, conv.dilation, strict=True))
    x = noise(weight, 2, conv.in_channels, *[2 * span + 3] * (weight.dim() - 2))
    scaled.weight.copy_(weight * along(0, factor, weight) * along(1, columns, weight))
    bias = shift if conv.bias is None else conv.bias * factor + shift
    scaled.bias = nn.Parameter(bias)
    return same(
        lambda: scaled(x / along(1, columns, x)),
        lambda: conv(x) * along(1, factor, x) + along(1, shift, x),
    )


def same(found: Callable[[], Tensor], expected: Callable[[], Tensor]) -> bool:
    """Whether two computations agree; one that fails on input it does not expect has not shown it."""
    try:
        a, b = found(), expected()
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError):
        return False
    return isinstance(a, Tensor) and isinstance(b, Tensor) and close(a.double(), b.double())


def noise(like: Tensor, *shape: int) -> Tensor:
    """Normal values, the same each time and without touching the process's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def along(axis: int, values: Tensor, like: Tensor) -> Tensor:
    """Values of one axis, shaped to be broadcast against `like`."""
    return values.reshape(*[1] * axis, -1, *[1] * (like.dim() - axis - 1))


def close(found: Tensor | None, expected: Tensor) -> bool:
    """Whether values agree as well as a rearranged sum in float32 does, seen over many layers."""
    if found is None or found.shape != expected.shape or not expected.numel():
        return found is not None and found.shape == expected.shape
    allowed = _TOLERANCE * (expected.max() - expected.min()) + _ROUNDING * expected.abs().max()
    return bool(((found - expected).abs() <= allowed).all())
