"""Channels that stay take over from those that go: exactly where they can, in least squares where they cannot."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, Spec, specs
from torch import Tensor, nn

from compressor.pruning import reconstruction
from compressor.pruning.groups import ChannelGroup, find_groups
from compressor.pruning.reconstruction import reader_moments, reconstruct
from compressor.pruning.surgery import mask, shrink


def images(count: int, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed)).double()


def refitted(net: nn.Module, groups: Sequence[ChannelGroup], keep: dict[str, list[int]], *batches: Tensor) -> nn.Module:
    twin = copy.deepcopy(net)
    reconstruct(twin, groups, keep, reader_moments(twin, groups, batches))
    return twin


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)  # type: ignore[no-any-return]


class Reader(nn.Module):
    """A layer of eight filters, and `reader`, which reads what they and an activation give."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.reader = reader
        self.fc = nn.Linear(6, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if isinstance(self.reader, nn.Linear):
            return self.fc(self.reader(x.movedim(1, -1)).mean((1, 2)))  # type: ignore[no-any-return]
        return self.fc(self.reader(x).mean((2, 3)))  # type: ignore[no-any-return]


READERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: nn.Conv2d(8, 6, 1),
    "3x3, padded": lambda: nn.Conv2d(8, 6, 3, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(8, 6, 3, dilation=2, stride=2),
    "linear": lambda: nn.Linear(8, 6),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_channel_that_others_add_up_to_is_not_missed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-12)
    torch.manual_seed(0)
    net = Reader(READERS[kind]())
    with torch.no_grad():  # the activation passes a multiple of a channel on as that multiple
        net.first.weight[5], net.first.bias[5] = 3 * net.first.weight[1], 3 * net.first.bias[1]  # type: ignore[index]
        net.first.weight[7], net.first.bias[7] = 0.5 * net.first.weight[2], 0.5 * net.first.bias[2]  # type: ignore[index]
    groups = find_groups(net, images(1), ignored=())
    keep = {"first": [0, 1, 2, 3, 4, 6]}
    whole = run(net, images(4, seed=9))
    pruned = refitted(net, groups, keep, images(16), images(16, seed=1))
    shrink(pruned, groups, keep)
    torch.testing.assert_close(run(pruned, images(4, seed=9)), whole)
    shrink(net, groups, keep)
    assert (run(net, images(4, seed=9)) - whole).abs().max() > 0.01, "without it they are missed"


def test_two_channels_by_hand() -> None:
    """One channel goes, one stays: the factor is the mean product over the mean square, a little less for the ridge."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1), nn.Flatten()).double().eval()
    x = images(5, size=1)
    a, b = run(net[0], x)[:, :, 0, 0].T
    weight = net[1].weight.detach().clone()
    groups = find_groups(net, images(1, size=1), ignored=())
    twin = refitted(net, groups, {"0": [0]}, x[:2], x[2:])
    factor = float((a * b).mean() / ((a * a).mean() * (1 + reconstruction.RIDGE)))
    torch.testing.assert_close(twin[1].weight[:, 0], weight[:, 0] + factor * weight[:, 1])  # type: ignore[index]


@given(st.integers(0, 2**16), st.sampled_from(("1x1", "linear")), st.sets(st.integers(0, 7), min_size=1, max_size=7))
@settings(max_examples=25, deadline=None)
def test_what_a_reader_gives_is_never_further_off(seed: int, kind: str, kept: set[int]) -> None:
    torch.manual_seed(seed)
    net, x = Reader(READERS[kind]()), images(8, seed=seed)
    groups, keep = find_groups(net, images(1), ignored=()), {"first": sorted(kept)}

    def error(network: nn.Module) -> float:
        cut = copy.deepcopy(network)
        mask(cut, groups, keep)
        inner = torch.relu(run(net.first, x))
        inner = inner if kind == "1x1" else inner.movedim(1, -1)
        return float((run(cut.reader, inner) - run(net.reader, inner)).square().sum())  # type: ignore[arg-type]

    assert error(refitted(net, groups, keep, x)) <= error(net) * (1 + 1e-9) + 1e-18


@given(specs(), st.data())
@settings(max_examples=40, deadline=None)
def test_pruned_equals_masked_and_only_readers_change(spec: Spec, data: Any) -> None:
    net, x = RandomNetwork(spec), images(2, size=spec.size)
    groups = find_groups(net, x, ignored=())
    prunable = [group for group in groups if group.prunable]
    keep = {
        group.name: sorted(data.draw(st.sets(st.integers(0, group.channels - 1), min_size=1), label=group.name))
        for group in prunable
    }
    before = {name: value.clone() for name, value in net.state_dict().items()}
    twin = refitted(net, groups, keep, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "looking changes nothing"
    readers = {f"{m.layer}.weight" for group in prunable for m in group.members if m.kind == "in"}
    changed = {name for name, value in twin.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= readers
    masked = copy.deepcopy(twin)
    mask(masked, groups, keep)
    shrink(twin, groups, keep)
    torch.testing.assert_close(run(twin, x), run(masked, x))


def test_channels_that_say_nothing_take_nothing_over() -> None:
    net = Reader(nn.Conv2d(8, 6, 1))
    with torch.no_grad():
        net.first.weight[:4], net.first.bias[:4] = 0, -1  # type: ignore[index]
    groups, keep = find_groups(net, images(1), ignored=()), {"first": [0, 1, 2, 3]}
    twin = refitted(net, groups, keep, images(4))
    torch.testing.assert_close(twin.state_dict(), net.state_dict())


def test_a_layer_that_reads_too_many_channels_is_named_and_only_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "MOST_CHANNELS", 7)
    net = Reader(nn.Conv2d(8, 6, 1))
    groups, keep = find_groups(net, images(1), ignored=()), {"first": [0, 1, 2, 3], "reader": [0, 1, 2]}
    readers, left_out = reconstruction.readers_of(net, groups)
    assert list(readers) == ["fc"]
    assert left_out == {"reader": "it reads 8 channels, and reconstruction takes on 7 at most"}
    twin = refitted(net, groups, keep, images(4))
    assert torch.equal(twin.reader.weight, net.reader.weight)
    assert not torch.equal(twin.fc.weight, net.fc.weight)
