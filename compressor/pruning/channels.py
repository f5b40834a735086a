"""Channels and which of them go together, and tensors of labels that say which channel each element belongs to.

Invariant: joining only ever makes sets larger; a number stands for the same channel for as long as its table lives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# One channel of one layer side: ("block1.rep.1.pointwise", "out", 3). The empty layer name stands for what is no layer:
# ("", reason, n) is a channel that must stay, for that reason.
Channel = tuple[str, str, int]


class Channels:
    """Union-find over channels; numbers stand for channels, 0 for none."""

    def __init__(self) -> None:
        self._names: list[Channel] = [("", "", 0)]
        self._numbers: dict[Channel, int] = {}
        self._parent = [0]

    def number(self, layer: str, kind: str, count: int) -> Tensor:
        """Numbers of the channels of a layer side, `(count,)`."""
        return torch.tensor([self._number((layer, kind, index)) for index in range(count)])

    def fixed(self, reason: str, count: int = 1) -> Tensor:
        """Numbers of new channels that must stay, `(count,)`."""
        first = len(self._names)
        return torch.tensor([self._number(("", reason, index)) for index in range(first, first + count)])

    def _number(self, channel: Channel) -> int:
        if channel not in self._numbers:
            self._numbers[channel] = len(self._names)
            self._names.append(channel)
            self._parent.append(self._numbers[channel])
        return self._numbers[channel]

    def _root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        """Say that two channels can only go together."""
        root_a, root_b = self._root(a), self._root(b)
        if root_a != root_b:
            self._parent[root_b] = root_a

    def join_all(self, first: Tensor, second: Tensor) -> None:
        """Join the channels of two equally shaped tensors of numbers, element by element; 0 joins nothing."""
        first, second = first.reshape(-1), second.reshape(-1)
        pairs = torch.stack([first, second])[:, (first != second) & (first > 0) & (second > 0)]
        for a, b in torch.unique(pairs, dim=1).T.tolist():
            self.join(a, b)

    def classes(self) -> list[list[Channel]]:
        """Sets of channels that can only go together, in the order in which they were met."""
        found: dict[int, list[Channel]] = {}
        for number in range(1, len(self._names)):
            found.setdefault(self._root(number), []).append(self._names[number])
        return list(found.values())


def compact(labels: Tensor, keep: int | None = None) -> Tensor:
    """One element of every axis along which the labels are one number seen many times (`expand`)."""
    for axis in range(labels.dim()):
        if axis != keep and labels.shape[axis] > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` of two equally shaped tensors, along the axes that both see many times."""
    for axis in range(first.dim()):
        if first.shape[axis] > 1 and first.stride(axis) == 0 == second.stride(axis):
            first, second = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
    return first, second


def varies(labels: Tensor, axis: int) -> bool:
    """Whether different channels lie along an axis."""
    small = compact(labels)
    return small.shape[axis] > 1 and not bool((small == small.narrow(axis, 0, 1)).all())


def split_axes(before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
    """Groups of axes of `after` into which single runs of axes of `before` are divided."""
    groups: list[list[int]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        axes_after = [j]
        have = before[i] if i < len(before) else 1
        want = after[j] if j < len(after) else 1
        i, j = i + 1, j + 1
        while have != want:
            if have < want and i < len(before):
                have *= before[i]
                i += 1
            elif j < len(after):
                want *= after[j]
                axes_after.append(j)
                j += 1
            else:
                break
        real = [axis for axis in axes_after if axis < len(after) and after[axis] > 1]
        if len(real) > 1:
            groups.append(real)
    return groups
