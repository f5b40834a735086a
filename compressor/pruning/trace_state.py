"""What is known while channels are followed: labels of values, owners of parameters, modules that are running.

Invariant: labels have the shape of the value that carries them.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.pruning.channels import Channels, compact, varies

INPUT = "it is combined with the network's input"
CONSTANT = "a tensor of fixed size is combined with it"
PARAMETER = "a parameter outside the standard layers is coupled to it"
WEIGHS = "it weighs other channels"


def not_prunable(name: str, layer: nn.Module) -> str:
    """Why channels of a layer that is not understood must stay."""
    return f"'{name}' is a {type(layer).__name__}, which cannot be pruned"


def spread(numbers: Tensor, shape: Sequence[int], axis: int = 1) -> Tensor:
    """Labels of a value of this shape whose channels, `(C,)`, lie along one axis."""
    single = [1] * len(shape)
    single[axis] = len(numbers)
    return numbers.reshape(single).expand(tuple(shape))


@dataclass(frozen=True)
class Call:
    """One operation below the modules: its name (`add` for `aten::add_.Tensor`), what was given, what came out."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def first_result(self) -> Any:
        """The result, or the first of several."""
        return self.result[0] if isinstance(self.result, list | tuple) and self.result else self.result

    def labels_of_first(self, labels: Tensor) -> Any:
        """Labels of the result whose first value carries these, and the others none."""
        return labels if isinstance(self.result, Tensor) else [labels, *[None] * (len(self.result) - 1)]


class TraceState:
    """Labels of the values of one forward pass, and what rules for operations ask about parameters and modules."""

    def __init__(self, module: nn.Module, channels: Channels):
        self.channels = channels
        self.running: list[tuple[str, nn.Module]] = [("", module)]  # modules whose forward is under way, innermost last
        self._module = module
        self._labels: Any = WeakTensorKeyDictionary()
        self._aliases: Any = WeakTensorKeyDictionary()  # views of parameters -> the parameter
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for name, layer in module.named_modules():
            for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                self._owners.setdefault(id(value), (name, layer))

    def watching(self) -> ExitStack:
        """Know, while the block runs, which module each operation belongs to."""
        stack = ExitStack()
        for name, layer in self._module.named_modules():
            before = layer.register_forward_pre_hook(lambda m, _i, name=name: self.running.append((name, m)))
            after = layer.register_forward_hook(lambda *_: self.running.pop() and None)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def start(self, x: Tensor) -> None:
        self.attach(x, spread(self.channels.fixed(INPUT, x.shape[1]), x.shape))

    def labels_of(self, value: object) -> Tensor | None:
        return self._labels.get(value) if isinstance(value, Tensor) else None

    def attach(self, result: Any, labels: Any) -> None:
        """Let a value, or each of several, carry its labels."""
        if isinstance(result, Tensor):
            if isinstance(labels, Tensor):
                assert labels.shape == result.shape, "labels have the shape of their value"
                self._labels[result] = labels
        elif isinstance(result, list | tuple) and isinstance(labels, list | tuple):
            for part, label in zip(result, labels, strict=False):
                self.attach(part, label)

    def parameter(self, value: object) -> Tensor | None:
        """The parameter or buffer that a tensor is or views."""
        if not isinstance(value, Tensor):
            return None
        return value if id(value) in self._owners else self._aliases.get(value)

    def owner(self, parameter: Tensor) -> tuple[str, nn.Module]:
        """The layer that a parameter or buffer belongs to."""
        return self._owners[id(parameter)]

    def note_view(self, view: Tensor, value: Tensor) -> None:
        """Know a tensor for a view of a parameter, if the value that it views is one or views one."""
        source = self.parameter(value)
        if source is not None:
            self._aliases[view] = source

    def forbid(self, labels: Tensor | None, reason: str) -> None:
        """None of these channels may go."""
        if labels is None:
            return
        for number in torch.unique(compact(labels)).tolist():
            if number:
                self.channels.join(number, int(self.channels.fixed(reason)))

    def couple(self, layer: str, kind: str, reads: Tensor) -> Tensor:
        """Join the channels of a layer side to what is read at each of them, `(C,)`; returns the side's own numbers."""
        own = self.channels.number(layer, kind, len(reads))
        self.channels.join_all(own, reads)
        return own

    def per_channel(self, labels: Tensor, axis: int = 1) -> Tensor:
        """The channel at each index of an axis, `(C,)`; where several meet at one index, they are joined."""
        rows = compact(labels, keep=axis).movedim(axis, 0).flatten(1)
        highest = rows.amax(1)
        if rows.shape[1] > 1:
            self.channels.join_all(rows, highest[:, None].expand_as(rows))
        return highest

    def reads(self, value: Tensor, axis: int) -> Tensor:
        """What a layer reads at each index of an axis; where that could not be followed, channels that must stay."""
        labels = self.labels_of(value)
        if labels is None:
            return self.channels.fixed(CONSTANT, value.shape[axis])
        return self.per_channel(labels, axis)

    def join_along(self, labels: Tensor, axes: Iterable[int]) -> None:
        """Everything along these axes meets in one number, so what lies along them goes as one."""
        for axis in axes:
            if varies(labels, axis):
                self.channels.join_all(labels, labels.narrow(axis, 0, 1).expand(labels.shape))
