"""Residual blocks: which can go, and that the network without one is the network without one."""

import pytest
import torch
from random_networks import randomise
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.models.xception import Block, xception
from compressor.pruning.blocks import drop_blocks, find_blocks

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """Input plus branch, with an optional activation behind."""

    def __init__(self, branch: nn.Module, after: nn.Module | None = None):
        super().__init__()
        self.branch, self.after = branch, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.branch(x))


class Plain(nn.Module):
    """Same shape in and out, but no skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Stage(nn.Module):
    """A chain of blocks that is not an `nn.Sequential`."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def branch() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1))


def network(*body: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    randomise(net, 0)
    return net.eval()


def test_xception_can_lose_its_eight_middle_blocks() -> None:
    net = xception(10)
    assert find_blocks(net, torch.zeros(1, 3, 64, 64)) == tuple(f"block{i}" for i in range(4, 12))


@pytest.mark.parametrize(
    ("body", "blocks"),
    [
        ([Residual(branch()), Plain()], ("1",)),
        ([Residual(nn.Sequential(Residual(branch()), nn.Conv2d(4, 4, 1)))], ("1",)),  # the outermost
        ([nn.Sequential(Residual(branch()), Residual(branch()))], ("1.0", "1.1")),  # a chain is no block
        ([Stage(Residual(branch()), Residual(branch()))], ("1.blocks.0", "1.blocks.1")),
        ([nn.ReLU(), Residual(branch(), nn.ReLU())], ("2",)),  # as in ResNet: the input is never negative
        ([Residual(branch(), nn.ReLU())], ()),  # here the ReLU would be lost
        ([Residual(nn.ReLU())], ()),  # nothing to save
        ([Block(4, 4, 2, 2)], ()),  # strided
        ([Block(4, 4, 2)], ("1",)),
    ],
)
def test_only_identity_plus_branch_counts(body: list[nn.Module], blocks: tuple[str, ...]) -> None:
    assert find_blocks(network(*body), EXAMPLE) == blocks


def test_a_block_whose_insides_are_used_elsewhere_stays() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(Residual(branch()))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net[1].branch[1].weight.sum()

    assert find_blocks(Peeking(), EXAMPLE) == ()


def test_dropping_equals_computing_without_it() -> None:
    net = network(Residual(branch()), Residual(branch()), Residual(branch()))
    x = torch.randn(2, 3, 8, 8)
    expected = net[4:](net[3](net[1](net[0](x))))
    before = net.state_dict()
    drop_blocks(net, ["2"])
    assert torch.equal(net(x), expected)
    assert {name for name in before if not name.startswith("2.")} == set(net.state_dict())


def test_finding_changes_nothing() -> None:
    net = network(Residual(branch())).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    find_blocks(net, EXAMPLE)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["7x"], "the network has no module '7x'"),
        (["1", "1"], "'1' is listed twice"),
        (["1", "1.branch"], "'1.branch' is listed twice, as itself or inside '1'"),
        (["2"], "'2' has been dropped already"),
    ],
)
def test_wrong_names_are_refused_before_anything_changes(names: list[str], message: str) -> None:
    net = network(Residual(branch()), nn.Identity())
    with pytest.raises(UnsupportedModelError, match=message):
        drop_blocks(net, names)
    assert isinstance(net[1], Residual)
