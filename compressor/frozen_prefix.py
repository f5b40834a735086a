"""Cutting a network where its frozen layers end: the part whose outputs never change, and the part that is trained.

Invariant: the two parts are made of the network's very layers, and one after the other compute what it computes.
"""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.errors import UnsupportedModelError
from compressor.inference import arithmetic

# Layers without weights that still do another thing in training.
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)


@dataclass(frozen=True)
class Cut:
    """A point of a network's graph through which all that is computed later gets its data, as one tensor.

    Attributes:
        node: Name of the graph's node that gives the tensor.
        name: The same for people: the module, and the node where it is no module of its own.
        shape: Of the tensor for one image.
    """

    node: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What the tensor of one image takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def train_mode(module: nn.Module, frozen: Collection[str]) -> None:
    """Training mode, in which frozen BatchNorms keep their statistics and frozen dropouts let everything through."""
    module.train()
    for name in frozen:
        module.get_submodule(name).eval()


def find_cuts(
    module: nn.Module, example: Tensor, frozen: Collection[str], dtype: torch.dtype, device: str
) -> tuple[fx.Graph, list[Cut]]:
    """Trace the network, and find every point before which all is frozen and through which one tensor passes.

    Args:
        example: Two images, so that what lies behind is known to keep images apart.
        dtype: Precision of training, which decides the features' own.

    Returns:
        The graph and its cuts in the order of computation, at least one; the network is left in evaluation mode.

    Raises:
        UnsupportedModelError: The network cannot be traced, or has no such point.
    """
    graph = _trace(module, frozen)
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = [max((position[user] for user in node.users), default=-1) for node in nodes]
    narrow = []
    for i, node in enumerate(nodes):
        if node.op == "output" or not _is_frozen(module, node, frozen):
            break
        if node.op != "placeholder" and [j for j in range(i + 1) if last_use[j] > i] == [i]:
            narrow.append(node)
    recorder = _Recorder(fx.GraphModule(module, graph))
    with torch.no_grad(), arithmetic(dtype, device):
        recorder.run(example)
    found = [(node, recorder.values[node.name]) for node in narrow if node.name in recorder.values]
    cuts = [Cut(node.name, _name(node), shape[1:], kind) for node, (shape, kind) in found if shape[0] == len(example)]
    if not cuts:
        raise UnsupportedModelError("no single tensor leads from frozen layers alone to all the others")
    return graph, cuts


def split_at(module: nn.Module, graph: fx.Graph, cut: Cut) -> tuple[nn.Module, nn.Module]:
    """The network up to a cut and from there on, both of its very layers: training the second trains the network."""
    nodes = list(graph.nodes)
    end = [node.name for node in nodes].index(cut.node) + 1
    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:end]:
        copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(copies[nodes[end - 1]])
    later = {nodes[end - 1]: after.placeholder("features")}
    for node in nodes[end:]:
        later[node] = after.node_copy(node, later.__getitem__)
    return fx.GraphModule(module, before), fx.GraphModule(module, after)


def _trace(module: nn.Module, frozen: Collection[str]) -> fx.Graph:
    if "forward" in vars(module):  # tracing calls the class's forward
        raise UnsupportedModelError("the network's forward is replaced, as quantizers do, and cannot be traced")
    graphs = []
    for set_mode in (lambda: train_mode(module, frozen), module.eval):
        set_mode()
        try:
            graphs.append(fx.Tracer().trace(module))
        except Exception as error:  # the network is foreign code: whatever it raises means that it cannot be traced
            raise UnsupportedModelError(f"tracing the network failed with {type(error).__name__}: {error}") from error
    if str(graphs[0]) != str(graphs[1]):
        raise UnsupportedModelError("traced in training mode and in evaluation mode, the network is not the same")
    return graphs[1]


def _is_frozen(module: nn.Module, node: fx.Node, frozen: Collection[str]) -> bool:
    """Whether a step of the graph gives the same for an image throughout the training."""
    target = str(node.target)
    if node.op == "get_attr":
        return target.rpartition(".")[0] in frozen
    if node.op == "call_module" and target not in frozen:
        layer = module.get_submodule(target)
        has_state = any(True for _ in itertools.chain(layer.parameters(), layer.buffers()))
        return not has_state and not isinstance(layer, _RANDOM)
    return True


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps shape and type of every tensor of floating point."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            self.values[n.name] = tuple(value.shape), value.dtype
        return value


def _name(node: fx.Node) -> str:
    inside = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        return str(node.target)
    return f"{inside[-1]} ({node.name})" if inside and inside[-1] else node.name
