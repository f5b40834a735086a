"""Channel groups: what is coupled, what is refused and why, and that looking changes nothing."""

import copy

import pytest
import torch
from random_networks import randomise
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedModelError
from compressor.models.xception import Block, xception
from compressor.pruning.groups import ChannelGroup, find_groups, resolve_scope
from compressor.pruning.surgery import mask, shrink

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions around `middle`, pooled, two classes."""

    def __init__(self, middle: nn.Module | None = None, width: int = 8, out: int | None = None):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle or nn.ReLU()
        self.last = nn.Conv2d(out or width, 6, 1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.middle(self.first(x))).mean((2, 3)))


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ChannelSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 1)


class ToImage(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x) if self.first.out_channels != 3 else self.fc(self.last(x + self.first(x)).mean((2, 3)))
        )


class BesideImage(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(torch.cat([x, self.first(x)], 1)).mean((2, 3)))


def by_name(module: nn.Module, example: Tensor = EXAMPLE, ignored: set[str] | None = None) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_groups(module, example, ignored=ignored or set())}


def test_xception_couples_the_middle_flow_and_never_the_classifier() -> None:
    groups = by_name(xception(10), torch.zeros(1, 3, 64, 64))
    assert len(groups) == 29
    middle = groups["block3.skip"]
    writers = {member.layer for member in middle.members if member.kind == "out"}
    assert {f"block{i}.rep.7.pointwise" for i in range(4, 12)} <= writers
    assert middle.channels == 728
    assert not groups["fc"].prunable
    assert groups["fc"].reason == "its channels are outputs of the network"
    assert all(group.prunable for name, group in groups.items() if name != "fc")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Net(ChannelSoftmax()), "one single decision"),
        (ToImage(width=3), "combined with the network's input"),
        (Net(nn.GroupNorm(2, 8)), "'middle' is a GroupNorm"),
        (Net(nn.InstanceNorm2d(8, affine=True)), "'middle' is a InstanceNorm2d"),
        (Net(nn.Conv2d(8, 16, 3, groups=8), out=16), "one single decision"),
        (Net(nn.Conv2d(8, 4, 3, groups=4), out=4), "one filter a group"),
        (Net(nn.ConvTranspose2d(8, 8, 2)), "ConvTranspose2d"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_pruned_is_refused_with_a_reason(network: nn.Module, reason: str) -> None:
    group = by_name(network)["first"]
    assert not group.prunable
    assert reason in (group.reason or "")


def test_a_network_that_ends_in_a_convolution_keeps_its_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    groups = by_name(net)
    assert groups["0"].prunable
    assert not groups["2"].prunable


def test_shared_parameters_are_not_cut() -> None:
    net = Net(nn.Conv2d(8, 8, 1))
    net.last = nn.Conv2d(8, 8, 1)
    net.fc = nn.Linear(8, 2)
    net.last.weight = net.middle.weight
    group = by_name(net)["first"]
    assert not group.prunable
    assert "share a parameter" in (group.reason or "")


def test_a_layer_that_runs_twice_is_cut_as_one() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    net = Net(nn.Sequential(shared, nn.ReLU(), shared))
    groups = by_name(net)
    assert groups["first"].prunable  # its channels and both uses of the shared layer go together
    assert {m.kind for m in groups["first"].members if m.layer == "middle.0"} == {"in", "out"}


def test_grouped_convolution_makes_one_decision_of_the_same_channel_in_every_block() -> None:
    group = by_name(Net(nn.Conv2d(8, 8, 3, groups=2)))["first"]
    assert group.channels == 4
    (reader,) = (m for m in group.members if m.kind == "in")
    assert reader.indices == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_flattening_expands_a_channel_to_its_positions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 2))
    (reader,) = (m for m in by_name(net)["0"].members if m.kind == "in")
    assert [indices[0] for indices in reader.indices] == [0, 64, 128, 192]
    assert all(len(indices) == 64 for indices in reader.indices)


def test_ignored_layers_keep_their_filters_but_may_read_fewer() -> None:
    net = Net()
    groups = by_name(net, ignored={"last"})
    assert groups["first"].prunable
    assert groups["last"].reason == "'last' is in ignored_scope"


def test_looking_changes_nothing() -> None:
    net = Net(nn.BatchNorm2d(8)).train()
    net.first.weight.requires_grad_(False)
    net.middle.eval()
    before = copy.deepcopy(net.state_dict())
    assert by_name(net)["first"].prunable  # frozen parameters are traced too
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not net.middle.training
    assert not net.first.weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_untraceable_networks_are_an_error() -> None:
    class Nothing(Net):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    with pytest.raises(UnsupportedModelError, match="forward returned no tensor"):
        find_groups(Nothing(), EXAMPLE, ignored=())
    with pytest.raises(UnsupportedModelError, match="takes one tensor of shape"):
        find_groups(Net(), torch.zeros(1, 5, 8, 8), ignored=())


def test_scope_takes_children_and_refuses_what_matches_nothing() -> None:
    net = nn.ModuleDict(
        {"head": nn.ModuleDict({"fc": nn.Linear(2, 2), "drop": nn.Dropout()}), "stem": nn.Conv2d(3, 2, 1)}
    )
    assert resolve_scope(net, ["head"], where="s") == {"head", "head.fc", "head.drop"}
    assert resolve_scope(net, ["*.fc", "st*"], where="s") == {"head.fc", "stem"}
    assert resolve_scope(net, [], where="s") == set()
    with pytest.raises(
        RecipeError, match=r"stages\[0\]\.ignored_scope\[1\]: 'head.fcc' matches no module; .* 'head.fc'\?"
    ):
        resolve_scope(net, ["stem", "head.fcc"], where="stages[0].ignored_scope")


def test_surgery_puts_attributes_right_and_keeps_formats() -> None:
    class Featured(Net):
        def __init__(self) -> None:
            super().__init__(nn.BatchNorm2d(8))
            self.num_features = 6

    net = Featured().to(memory_format=torch.channels_last).half().float()
    net.first.weight.requires_grad_(False)
    groups = find_groups(net, EXAMPLE, ignored=())
    shrink(net, groups, {"first": (1, 3, 4), "last": (0, 5)})
    assert (net.first.out_channels, net.last.in_channels, net.last.out_channels) == (3, 3, 2)
    assert (net.middle.num_features, net.fc.in_features, net.num_features) == (3, 2, 2)
    assert net.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.first.weight.requires_grad
    assert net.last.weight.requires_grad
    assert net(EXAMPLE).shape == (1, 2)


def test_a_block_keeps_its_own_width_attributes_true() -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__(8, 16, 2, 2)
            self.in_channels, self.out_channels = 8, 16

    net = Net(Wide(), out=16)
    randomise(net, 0)
    groups = find_groups(net, EXAMPLE, ignored=())
    masked = copy.deepcopy(net).eval()
    keep = {"first": (0, 2), "middle.skip": (1, 2, 3)}
    mask(masked, groups, keep)
    shrink(net.eval(), groups, keep)
    assert (net.middle.in_channels, net.middle.out_channels) == (2, 3)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x), masked(x), rtol=1e-4, atol=1e-5)
