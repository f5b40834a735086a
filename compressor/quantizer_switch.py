"""Some layers of a quantized network in float for a while: what quantizing each of them costs, without quantizing anew.

Invariant: after the block the network is as it was; with every layer in float it computes what the float network does,
bit for bit.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.modes import evaluating
from compressor.quantization import quantized_prefix

_WEIGHT = 1  # place of the weight among the arguments of a convolution or a linear function


def layers_served(quantized: nn.Module, floating: nn.Module, example: Tensor) -> dict[str, frozenset[str]]:
    """Layers that each fake quantizer rounds something for, by the quantizer's name.

    Those are the layers that read its result, through whatever has no weights and is not quantized again. A quantizer
    whose result is rounded again before a layer reads it (a term of an addition) belongs to the layers it comes from.

    Args:
        quantized: From `quantize`.
        floating: The network that was quantized.
        example: Input `(N, C, H, W)`.
    """
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
    from nncf.torch.quantization.layers import BaseQuantizer

    names = {
        name: layer
        for name, layer in quantized.named_modules(remove_duplicate=False)
        if isinstance(layer, BaseQuantizer)
    }
    prefix = quantized_prefix(floating)
    layers = {prefix + name: name for name in weight_layers(floating)}
    with evaluating(quantized):
        graph = build_nncf_graph(quantized, example[:1])
    # The parameters of a quantizer are nodes too, and named after it; what reads them is where it works.
    works: dict[str, list[Any]] = {}
    for node in graph.get_all_nodes():
        owner = node.node_name.rpartition(".")[0]
        if owner in names:
            works.setdefault(owner, []).extend(graph.get_next_nodes(node))
    rounds = {node.node_name for nodes in works.values() for node in nodes}

    def layer_of(node: Any) -> str | None:
        return None if node.node_name in rounds else layers.get(_module_of(node.node_name))

    def reached(nodes: list[Any], neighbours: Any, *, through_rounding: bool) -> frozenset[str]:
        found: set[str] = set()
        seen: set[str] = set()
        waiting = [neighbour for node in nodes for neighbour in neighbours(node)]
        while waiting:
            node = waiting.pop()
            if node.node_name in seen:
                continue
            seen.add(node.node_name)
            layer = layer_of(node)
            if layer is not None:
                found.add(layer)
            elif through_rounding or node.node_name not in rounds:
                waiting += neighbours(node)
        return frozenset(found)

    served = {}
    for name, nodes in works.items():
        readers = reached(nodes, graph.get_next_nodes, through_rounding=False)
        served[name] = readers or reached(nodes, graph.get_previous_nodes, through_rounding=True)
    return served


def quantized_layers(quantizers: Iterable[str], floating: nn.Module) -> frozenset[str]:
    """Names of the layers whose weights one of these fake quantizers rounds."""
    from nncf.torch.function_hook.hook_storage import decode_hook_name

    layers = set(weight_layers(floating))
    found = set()
    for name in quantizers:
        hook, operation, place = decode_hook_name(name)
        layer = _module_of(operation).removeprefix(quantized_prefix(floating))
        if hook == "pre_hooks" and place == _WEIGHT and layer in layers:
            found.add(layer)
    return frozenset(found)


def _module_of(operation: str) -> str:
    """The module in which an operation runs that NNCF calls `module/path/function/call`."""
    return operation.rpartition("/")[0].rpartition("/")[0].replace("/", ".")


def weight_layers(module: nn.Module) -> list[str]:
    """Names of the layers whose weights can be quantized: convolutions and linear layers."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [name for name, layer in module.named_modules() if isinstance(layer, kinds)]


@contextmanager
def only_quantized(
    quantized: nn.Module, floating: nn.Module, layers: Collection[str], served: Mapping[str, frozenset[str]]
) -> Iterator[nn.Module]:
    """Only these layers are quantized while the block runs; the others compute, and have biases, as in `floating`.

    An input that a layer in float shares with a quantized one is rounded for both. Were the network quantized anew with
    that layer left out, NNCF would round it for the other one only.

    Args:
        quantized: From `quantize`, not trained since; changed while the block runs.
        floating: The network that was quantized.
        layers: Names in `floating`.
        served: From `layers_served`.
    """
    wanted = set(layers)
    prefix = quantized_prefix(floating)
    quantizers = {name: quantized.get_submodule(name) for name in served}
    before = {name: quantizer.enabled.clone() for name, quantizer in quantizers.items()}  # type: ignore[operator]
    biases = {}
    for name in weight_layers(floating):
        bias = floating.get_submodule(name).bias
        if isinstance(bias, Tensor) and name not in wanted:
            mine = quantized.get_submodule(prefix + name).bias
            assert isinstance(mine, Tensor)
            biases[name] = (mine, mine.detach().clone(), bias)
    try:
        with torch.no_grad():
            for name, quantizer in quantizers.items():
                # Its own method for this also decides which parameters are trained, whatever was decided before.
                quantizer.enabled.fill_(int(bool(served[name] & wanted)))  # type: ignore[operator]
            for mine, _, theirs in biases.values():
                mine.copy_(theirs)
        yield quantized
    finally:
        with torch.no_grad():
            for name, quantizer in quantizers.items():
                quantizer.enabled.copy_(before[name])  # type: ignore[operator]
            for mine, kept, _ in biases.values():
                mine.copy_(kept)
