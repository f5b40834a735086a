"""Channels followed through what networks do to them: exact where data only moves, refused where it is not known."""

import copy

import pytest
import torch
import torch_pruning as tp
from random_networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.models.xception import xception
from compressor.pruning.groups import ChannelGroup, find_groups
from compressor.pruning.oracle import holds, randomised_twin

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions around `between`, which subclasses define; pooled, two classes."""

    def __init__(self, width: int = 8, read: int | None = None):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Conv2d(read or width, 6, 1)
        self.fc = nn.Linear(6, 2)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.between(self.first(x))).mean((2, 3)))


class Shuffled(Net):
    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class PixelShuffled(Net):
    def __init__(self) -> None:
        super().__init__(16, 4)

    def between(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class PixelUnshuffled(Net):
    def __init__(self) -> None:
        super().__init__(8, 32)

    def between(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class Halves(Net):
    def between(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b, a.relu()], 1)


class FixedSplit(Net):
    """Splits at numbers that it keeps, in three ways."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.width = 6
        self.sizes = [2, 4]
        self.taken = 5

    def between(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.width, 1)
        c, d = torch.split(b, self.sizes, 1)
        whole = torch.cat([a, c, d], 1)
        return torch.cat([whole[:, self.taken :], whole[:, : self.taken]], 1)


class Radix(Net):
    """Split attention: a softmax over parts of the channels weighs them, their sum goes on."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.gate = nn.Conv2d(4, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, 2, c // 2, h, w)
        weights = self.gate(parts.sum(1).mean((2, 3), keepdim=True)).view(n, 2, c // 2, 1, 1).softmax(1)
        return (parts * weights).sum(1)


class Stacked(Net):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.first(x), self.other(x)], 1)
        return self.fc(self.last(both.amax(1)).mean((2, 3)))


class Padded(Net):
    """A shortcut whose missing channels are zeros: those beside it cannot go."""

    def __init__(self) -> None:
        super().__init__(4, 8)
        self.wide = nn.Conv2d(4, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.wide(x) + F.pad(x, (0, 0, 0, 0, 2, 2))


class SpatialGate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class GlobalContext(Net):
    """Positions weighed by a softmax, gathered by a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weights = self.mask(x).view(n, 1, h * w, 1).softmax(2)
        return x + torch.matmul(x.view(n, 1, c, h * w), weights).view(n, c, 1, 1)


class ChannelsLast(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 10), nn.Linear(10, 8)

    def between(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class BesideImage(Net):
    def __init__(self) -> None:
        super().__init__(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(torch.cat([x, self.first(x)], 1)).mean((2, 3)))


class Blurred(Net):
    """A fixed filter over each channel, as in anti-aliased pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9)

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), padding=1, groups=x.shape[1])


class Multiplied(nn.Module):
    """Returns features and, in a dictionary, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.net.first(x)
        return {"features": features, "logits": self.net(x)}


class WrittenInto(Net):
    """Some channels are computed and written over others, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.partial = nn.Conv2d(4, 4, 3, padding=1)
        self.part = 4

    def between(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, : self.part] = self.partial(x[:, : self.part])
        return x


EXACT = (
    WrittenInto,
    Shuffled,
    PixelShuffled,
    PixelUnshuffled,
    Halves,
    FixedSplit,
    Radix,
    Stacked,
    GlobalContext,
    ChannelsLast,
    BesideImage,
    Blurred,
    SpatialGate,
)


def groups_of(network: nn.Module) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_groups(network, EXAMPLE, ignored=())}


def test_global_pooling_of_channels_last_values_is_followed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    network = network.to(memory_format=torch.channels_last)
    groups = find_groups(network, EXAMPLE.to(memory_format=torch.channels_last), ignored=())
    assert groups[0].prunable, groups[0].reason


@pytest.mark.parametrize("kind", EXACT)
def test_what_only_moves_or_pairs_channels_is_followed_exactly(kind: type[Net]) -> None:
    network = kind()
    randomise(network, 0)
    groups = groups_of(network)
    free = {name for name, group in groups.items() if group.prunable}
    assert "first" in {name.partition("[")[0] for name in free}
    assert "last" in free
    twin, x = randomised_twin(network.double(), EXAMPLE.double())
    chosen = [group for group in groups.values() if group.prunable]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        keep = {
            group.name: sorted(torch.randperm(group.channels, generator=generator)[: group.channels - 1].tolist())
            for group in chosen
        }
        assert holds(twin, x, chosen, keep)


@pytest.mark.parametrize(
    ("network", "group", "reason"),
    [
        (Padded(), "wide", "fixed size"),
        (SpatialGate(), "gate", "weighs other channels"),
        (Multiplied(), "net.first", "outputs of the network"),
    ],
)
def test_what_must_stay_is_named(network: nn.Module, group: str, reason: str) -> None:
    found = [g for name, g in groups_of(network).items() if name.partition("[")[0] == group]
    assert any(reason in (g.reason or "") for g in found)


def test_attributes_that_count_channels_follow_them() -> None:
    network = FixedSplit()
    groups = find_groups(network, EXAMPLE, ignored=())
    from compressor.pruning.surgery import shrink

    first = [group for group in groups if group.name.partition("[")[0] == "first" and group.prunable]
    shrink(network, first, {group.name: list(range(group.channels - 1)) for group in first})
    left = network.first.out_channels
    assert left < 12
    assert network.width == left // 2
    assert sum(network.sizes) == network.width
    assert network(EXAMPLE).shape == (1, 2)


def test_unknown_operations_are_named_and_nothing_they_read_is_pruned() -> None:
    class Sorted(Net):
        def between(self, x: Tensor) -> Tensor:
            return x.sort(1).values

    group = groups_of(Sorted())["first"]
    assert not group.prunable
    assert "sort" in (group.reason or "")


def test_weights_that_are_computed_are_not_cut() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    network = Net()
    network.last = Standardised(8, 6, 1)
    group = groups_of(network)["first"]
    assert "computes its weights" in (group.reason or "")


def test_rounding_that_a_network_amplifies_is_not_taken_for_a_wrong_cut() -> None:
    class Chaotic(Net):
        def between(self, x: Tensor) -> Tensor:
            return torch.sin(1e6 * x)

    assert groups_of(Chaotic())["first"].prunable


def test_torch_pruning_couples_the_same_layers() -> None:
    """Torch-Pruning reads autograd's graph, ours reads operations: where both understand a network they agree."""
    network = xception(10)
    example = torch.zeros(1, 3, 64, 64)
    ours = {
        group.name: {(member.layer, member.kind == "in") for member in group.members}
        for group in find_groups(network, example, ignored=())
    }
    twin = copy.deepcopy(network)
    graph = tp.DependencyGraph().build_dependency(twin, (torch.randn(example.shape),), unwrapped_parameters=None)
    names = {layer: name for name, layer in twin.named_modules()}
    assert len(ours) == 29
    for root, members in ours.items():
        layer = twin.get_submodule(root)
        pruner = graph.get_pruner_of_module(layer)
        theirs = set()
        for item in graph.get_pruning_group(layer, pruner.prune_out_channels, [0]):
            target = item.dep.target.module
            if target in names:
                reads = item.dep.handler == graph.get_pruner_of_module(target).prune_in_channels
                depthwise = isinstance(target, nn.Conv2d) and target.groups > 1
                batchnorm = isinstance(target, nn.BatchNorm2d)
                theirs.add((names[target], reads and not depthwise and not batchnorm))
        assert members == theirs, root
