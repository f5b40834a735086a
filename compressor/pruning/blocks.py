"""Removing whole residual blocks: depth reduction that leaves every shape as it was.

Invariant: a block counts as removable only if it was seen to be the identity plus a branch, and the network was seen to
run without it. After "Deep Networks with Stochastic Depth" (arXiv 1603.09382), whose nets survive missing blocks.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError, did_you_mean

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass
class _Calls:
    """What went through a module in one forward pass."""

    inputs: list[tuple[object, ...]]
    outputs: list[object]


def find_blocks(module: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the residual blocks that can be replaced by the identity, in network order; the network is untouched.

    A block is a module with convolutions or linear layers inside that is called once, with one tensor, returns one of
    the same shape, and returns its very input when all its parameters are zero: so its output is input plus branch.
    (A ReLU after the addition is allowed when the block's input is never negative, as in ResNet.) Of nested blocks the
    outermost counts, except that a chain of blocks is not a block.

    Args:
        module: Network whose forward takes one tensor.
        example: Input `(N, C, H, W)` at the size the network is used at; only its shape matters.
    """
    twin = copy.deepcopy(module).eval()
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    names = [
        name
        for name, layer in twin.named_modules()
        if name and next(layer.children(), None) is not None and any(isinstance(m, _LAYERS) for m in layer.modules())
    ]
    calls = _record(twin, names, x)
    residual = [name for name in names if _keeps_shape(calls[name]) and _is_residual(twin, name, calls[name])]
    blocks: list[str] = []
    for name in residual:
        inside = [other for other in residual if other.startswith(f"{name}.")]
        # A chain hands on the output of its last block as its own; a block computes a new one by its addition.
        chain = any(calls[other].outputs[0] is calls[name].outputs[0] for other in inside)
        if not chain and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks.append(name)
    return tuple(name for name in blocks if _runs_without(twin, name, x))


def drop_blocks(module: nn.Module, names: Sequence[str]) -> None:
    """Replace blocks by `nn.Identity`, in place.

    Args:
        module: The network.
        names: From `find_blocks`.

    Raises:
        UnsupportedModelError: If a name is no module, was dropped before, or lies inside another one of `names`.
            Nothing is replaced then.
    """
    modules = {name: layer for name, layer in module.named_modules() if name}
    for name in names:
        if name not in modules:
            raise UnsupportedModelError(f"drop_blocks: the network has no module '{name}'{did_you_mean(name, modules)}")
        if isinstance(modules[name], nn.Identity):
            raise UnsupportedModelError(f"drop_blocks: '{name}' has been dropped already")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None or list(names).count(name) > 1:
            raise UnsupportedModelError(f"drop_blocks: '{name}' is listed twice, as itself or inside '{outer or name}'")
    for name in names:
        _set(module, name, nn.Identity())


def _set(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    new.train(module.get_submodule(name).training)
    setattr(module.get_submodule(parent), leaf, new)


def _record(module: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, _Calls]:
    calls = {name: _Calls([], []) for name in names}

    def hook_for(name: str):  # type: ignore[no-untyped-def]
        def before(_: nn.Module, inputs: tuple[object, ...], keywords: dict[str, object]) -> None:
            # A copy, because an in-place activation inside may overwrite the input.
            copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
            calls[name].inputs.append((*copies, *keywords.values()))

        def after(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            calls[name].outputs.append(output)

        return before, after

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            before, after = hook_for(name)
            layer = module.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(after))
        module(x)
    return calls


def _keeps_shape(calls: _Calls) -> bool:
    if len(calls.inputs) != 1 or len(calls.inputs[0]) != 1:
        return False
    given, output = calls.inputs[0][0], calls.outputs[0]
    return isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape


def _is_residual(twin: nn.Module, name: str, calls: _Calls) -> bool:
    """Whether the module is the identity once its branch computes zero, on the input it really gets."""
    given = calls.inputs[0][0]
    assert isinstance(given, Tensor)
    silent = copy.deepcopy(twin.get_submodule(name))
    with torch.no_grad():
        for layer in silent.modules():
            for parameter in layer.parameters(recurse=False):
                parameter.zero_()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                layer.running_mean.zero_()  # without affine parameters, the statistics alone would shift the branch
        output = silent(given.clone())
    # A constant input would make many modules look like the identity.
    varied = bool((given != given.flatten()[0]).any())
    return varied and isinstance(output, Tensor) and torch.equal(output, given)


def _runs_without(twin: nn.Module, name: str, x: Tensor) -> bool:
    block = twin.get_submodule(name)
    _set(twin, name, nn.Identity())
    try:
        with torch.no_grad():
            twin(x)
    except (RuntimeError, ValueError, AttributeError):  # code around the block may use more of it than its call
        return False
    finally:
        _set(twin, name, block)
    return True
